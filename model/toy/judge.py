"""Looks at frames of the toy world and says who is there and how they look, knowing nothing but the pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memflow_ops.model.toy.language import CHARACTERS
from memflow_ops.model.toy.world import FRAME_SIZE, pattern_distances, shape_distances

SAME_HUE_DEGREES = 30.0
"""Two appearances closer than this count as the same hue; by chance 60 of 360 degrees, one in six, do."""
PRESENT_SHARE = 0.02
"""A character is present when its colour mask covers at least this share of the frame."""
_SHIFTS = torch.arange(-1, 2) * 1.0 / FRAME_SIZE  # the mask's centre is not quite the shape's
_ABOUT_AS_WELL = 0.05  # of intersection over union


@dataclass(frozen=True)
class Verdict:
    """What the pixels say, per picture; hue, pattern and shape mean nothing where nobody is present."""

    present: Tensor
    """bool (...): the colour mask covers at least PRESENT_SHARE of the frame"""
    hue: Tensor
    """degrees in 0..360 (...): circular mean over the mask, weighted by chroma"""
    pattern: Tensor
    """int64 (...): index in PATTERNS of the one whose two tones correlate best with the pixels' values"""
    shape: Tensor
    """int64 (...): index in CHARACTERS of the shape with the largest intersection over union"""
    area: Tensor
    """share of the frame covered by the mask (...)"""


def colour_mask(frames: Tensor) -> Tensor:
    """Which pixels are vivid enough to belong to a character: frames (..., 3, H, W) in -1..1 -> bool (..., H, W)."""
    rgb = (frames.clamp(-1, 1) + 1) / 2
    value, darkest = rgb.amax(-3), rgb.amin(-3)
    return ((value - darkest) > 0.5 * value) & (value > 0.35)


def halves(frames: Tensor) -> Tensor:
    """The left and the right half of frames (..., 3, H, W), where two characters stand: (..., 2, 3, H, W / 2)."""
    return torch.stack(frames.chunk(2, dim=-1), dim=-4)


def judge(pictures: Tensor) -> Verdict:
    """Looks for one character in pictures (..., 3, H, W) in -1..1: whole frames, or `halves` of them (W = H / 2)."""
    height, width = pictures.shape[-2:]
    leading = pictures.shape[:-3]
    pictures = pictures.reshape(-1, 3, height, width)
    rgb, mask = (pictures.clamp(-1, 1) + 1) / 2, colour_mask(pictures)
    area = mask.flatten(1).sum(1) / height**2
    red, green, blue = (rgb * mask[:, None]).flatten(2).sum(-1).unbind(-1)
    # On the colour circle red, green and blue stand 120 degrees apart; this is the sum's direction.
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    shape = torch.zeros(len(mask), dtype=torch.long)
    pattern = torch.zeros(len(mask), dtype=torch.long)
    for part in torch.arange(len(mask)).split(64):  # the templates of many pictures at once would fill the memory
        shape[part], pattern[part] = _compare(mask[part].float(), rgb[part].amax(1))
    verdict = (area >= PRESENT_SHARE, hue, pattern, shape, area)
    return Verdict(*(x.reshape(leading) for x in verdict))


def _compare(mask: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and value (N, H, W) -> the shape that fits best and, laid over it, the pattern that does, both (N,)."""
    count, height, width = mask.shape
    x, y = ((torch.arange(n) + 0.5) / height for n in (width, height))
    mass = mask.sum((1, 2)).clamp(min=1)
    centre_x, centre_y = (mask.sum(1) * x).sum(1) / mass, (mask.sum(2) * y).sum(1) / mass
    # All shifts of all pictures: (shifts, N, H, W).
    shift_x, shift_y = (s.flatten()[:, None] for s in torch.meshgrid(_SHIFTS, _SHIFTS, indexing="xy"))
    offset_x = x - (centre_x + shift_x)[..., None, None]
    offset_y = y[:, None] - (centre_y + shift_y)[..., None, None]
    offset_x, offset_y = torch.broadcast_tensors(offset_x, offset_y)

    shapes = (shape_distances(offset_x, offset_y)[: len(CHARACTERS)] > 0).float()  # (4, shifts, N, H, W)
    both = (shapes * mask).sum((-2, -1))
    overlap = both / (shapes.sum((-2, -1)) + mass - both).clamp(min=1)
    best, shape = overlap.amax(1).max(dim=0)  # (N,)
    # The pattern is looked for wherever the shape fits about as well as it does at its best.
    here = overlap[shape, :, torch.arange(count)].T  # (shifts, N)
    fits = here >= best - _ABOUT_AS_WELL
    dark = (pattern_distances(offset_x, offset_y) > 0).float()  # (3, shifts, N, H, W)

    def centred(z: Tensor) -> Tensor:
        return (z - ((z * mask).sum((-2, -1)) / mass)[..., None, None]) * mask

    expected, seen = centred(-dark), centred(value)
    correlation = (expected * seen).sum((-2, -1)) / expected.square().sum((-2, -1)).clamp(min=1e-6).sqrt()
    pattern = correlation.masked_fill(~fits, -torch.inf).amax(1).argmax(0)
    return shape, pattern


@dataclass(frozen=True)
class Look:
    """What the pixels of one chunk say about one character, its frames taken together; see `Verdict`."""

    present: bool
    hue: float
    pattern: int
    shape: int


def look_at(frames: Tensor, slots: Sequence[int | None]) -> list[Look]:
    """N chunks (N, 3, F, H, W) and where to look in each (left 0, right 1, None: everywhere) -> what is seen."""
    frames = frames.cpu().transpose(1, 2)  # (N, F, 3, H, W)
    looks: list[Look | None] = [None] * len(slots)
    for kind in (None, 0, 1):
        here = [i for i, slot in enumerate(slots) if slot == kind]
        if not here:
            continue
        pictures = frames[here]
        verdict = judge(pictures if kind is None else halves(pictures)[:, :, kind])
        # Hues are averaged on the circle, by area.
        angle, weight = torch.deg2rad(verdict.hue), verdict.area * verdict.present
        hue = torch.rad2deg(torch.atan2((angle.sin() * weight).sum(1), (angle.cos() * weight).sum(1))) % 360
        present = verdict.present.float().mean(1) > 0.5
        pattern, shape = verdict.pattern.mode(1).values, verdict.shape.mode(1).values
        for i, *seen in zip(here, *(x.tolist() for x in (present, hue, pattern, shape)), strict=True):
            looks[i] = Look(*seen)
    return [look for look in looks if look is not None]


def hue_difference(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between two hues in degrees, 0..180."""
    return ((a - b + 180) % 360 - 180).abs()
