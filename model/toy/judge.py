"""The judge looks at frames of the toy world and says who is there and how they look. It knows only the pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from memflow_ops.model.toy.language import CHARACTERS
from memflow_ops.model.toy.world import FRAME_SIZE, pattern_distances, shape_distances

SAME_HUE_DEGREES = 30.0
"""Two looks closer than this have the same hue. By chance 60 of 360 degrees, one in six, do."""
PRESENT_SHARE = 0.02
"""A character is present when its colour mask covers at least this share of the frame."""
# Templates are shifted, as the mask's centre is not quite the shape's.
_SHIFTS = torch.arange(-1, 2, dtype=torch.float32, device="cpu") / FRAME_SIZE
_ABOUT_AS_WELL = 0.05  # difference of intersection over union
Hue = TypeVar("Hue", float, Tensor)


@dataclass(frozen=True)
class Verdict:
    """What the pixels say about each picture. Hue, pattern and shape mean nothing where nobody is present."""

    present: Tensor
    """bool (...): whether the colour mask covers at least PRESENT_SHARE of the frame"""
    hue: Tensor
    """float32 (...), degrees in 0..360: circular mean over the mask, weighted by chroma"""
    pattern: Tensor
    """int64 (...): index in PATTERNS of the pattern whose two tones correlate best with the pixels' values"""
    shape: Tensor
    """int64 (...): index in CHARACTERS of the shape with the largest intersection over union"""
    area: Tensor
    """float32 (...): share of the frame that the mask covers"""


def colour_mask(frames: Tensor) -> Tensor:
    """Frames (..., 3, H, W) in -1..1 -> which pixels are vivid enough to belong to a character, bool (..., H, W)."""
    rgb = (frames.clamp(-1, 1) + 1) / 2
    value, darkest = rgb.amax(-3), rgb.amin(-3)
    return ((value - darkest) > 0.5 * value) & (value > 0.35)


def halves(frames: Tensor) -> Tensor:
    """Frames (..., 3, H, W) -> their left and right halves, where two characters stand, (..., 2, 3, H, W / 2)."""
    return torch.stack(frames.chunk(2, dim=-1), dim=-4)


def judge(pictures: Tensor) -> Verdict:
    """Looks for one character in each picture, (..., 3, H, W) in -1..1: a whole frame, or one of its `halves`."""
    height, width = pictures.shape[-2:]
    leading = pictures.shape[:-3]
    pictures = pictures.reshape(-1, 3, height, width)
    rgb, mask = (pictures.clamp(-1, 1) + 1) / 2, colour_mask(pictures)
    area = mask.flatten(1).sum(1) / height**2
    red, green, blue = (rgb * mask[:, None]).flatten(2).sum(-1).unbind(-1)
    # On the colour circle red, green and blue are 120 degrees apart; this is the direction of their sum.
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    shape = torch.zeros(len(mask), dtype=torch.long, device="cpu")
    pattern = torch.zeros(len(mask), dtype=torch.long, device="cpu")
    pictures_left = torch.arange(len(mask), dtype=torch.long, device="cpu")
    for part in pictures_left.split(64):  # templates for all pictures at once would fill the memory
        shape[part], pattern[part] = _compare(mask[part].float(), rgb[part].amax(1))
    verdict = (area >= PRESENT_SHARE, hue, pattern, shape, area)
    return Verdict(*(x.reshape(leading) for x in verdict))


def _compare(mask: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and HSV value, both (N, H, W) -> the shape that fits the mask best, and the pattern that fits the values
    best where that shape lies; both (N,) int64."""
    count, height, width = mask.shape
    x, y = ((torch.arange(n, dtype=torch.float32, device="cpu") + 0.5) / height for n in (width, height))
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
    # The pattern is compared at every shift at which the shape fits about as well as at the best one.
    here = overlap[shape, :, torch.arange(count, dtype=torch.long, device="cpu")].T  # (shifts, N)
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
    """What the pixels of one chunk, its frames taken together, say about one character; see `Verdict`."""

    present: bool
    hue: float
    pattern: int
    shape: int


def look_at(frames: Tensor, sides: Sequence[int | None]) -> list[Look]:
    """What N chunks show: frames (N, 3, F, H, W) in -1..1, and the side on which to look in each (0: the left half,
    1: the right half, None: the whole frame)."""
    frames = frames.cpu().transpose(1, 2)  # (N, F, 3, H, W)
    looks: list[Look | None] = [None] * len(sides)
    for side in (None, 0, 1):
        here = [i for i, wanted in enumerate(sides) if wanted == side]
        if not here:
            continue
        pictures = frames[here]
        verdict = judge(pictures if side is None else halves(pictures)[:, :, side])
        # Hues are averaged on the circle, weighted by area.
        angle, weight = torch.deg2rad(verdict.hue), verdict.area * verdict.present
        hue = torch.rad2deg(torch.atan2((angle.sin() * weight).sum(1), (angle.cos() * weight).sum(1))) % 360
        present = verdict.present.float().mean(1) > 0.5
        pattern, shape = verdict.pattern.mode(1).values, verdict.shape.mode(1).values
        for i, *seen in zip(here, *(x.tolist() for x in (present, hue, pattern, shape)), strict=True):
            looks[i] = Look(*seen)
    return [look for look in looks if look is not None]


def hue_difference(a: Hue, b: Hue) -> Hue:
    """The degrees, 0..180, between hues that are given in degrees."""
    return abs((a - b + 180) % 360 - 180)
