"""The toy world: four characters, four places, and hues that no prompt names; its renderer and its pixel judge.

A frame is RGB in -1..1, 32 x 32. A place is a pale picture (HSV saturation below 0.3), a character a vivid shape of its
own (above 0.7) on 15 to 19 % of the frame. A prompt says who is where; the hue is the model's to invent when a
character first appears, and to bring back when it returns. So whether memory works can be read off the pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memflow_ops.model.text import CHARACTERS, PLACES, VOCABULARY

FRAME_SIZE = 32
"""Pixels per side."""
SAME_HUE_DEGREES = 30.0
"""Two appearances closer than this count as the same hue; by chance 60 of 360 degrees, one in six, do."""
PRESENT_SHARE = 0.02
"""A character is present when its colour mask covers at least this share of the frame."""

EMPTY_INDEX = len(CHARACTERS)
"""The character index of nobody: characters are indexed as in the vocabulary, 0..3 and this."""

# Per place RGB in 0..1, pale on purpose: top and horizon of the sky, horizon and foreground of the ground.
_PLACE_COLOURS = {
    "meadow": ((0.66, 0.74, 0.80), (0.80, 0.84, 0.84), (0.52, 0.62, 0.47), (0.42, 0.50, 0.38)),
    "desert": ((0.80, 0.76, 0.66), (0.88, 0.82, 0.72), (0.76, 0.68, 0.56), (0.62, 0.55, 0.46)),
    "sea": ((0.74, 0.76, 0.80), (0.82, 0.84, 0.86), (0.44, 0.52, 0.60), (0.36, 0.42, 0.50)),
    "night": ((0.11, 0.11, 0.14), (0.17, 0.17, 0.21), (0.24, 0.24, 0.28), (0.30, 0.30, 0.33)),
}
_HORIZON = 0.55
_SATURATION, _VALUE = 0.9, 0.95  # of a character
PLACE_LOW, PLACE_HIGH = (0.36, 0.50), (0.64, 0.58)
"""Characters' centres lie between these (x, y), in frame sides: on the ground, and never cut by the frame's edge."""


def hue_to_rgb(hue: Tensor) -> Tensor:
    """Hue in turns (...) -> the colour of a character of that hue, RGB in 0..1, (..., 3)."""
    offsets = torch.tensor([5.0, 3.0, 1.0], device=hue.device)
    k = (offsets + hue[..., None] * 6) % 6
    return _VALUE * (1 - _SATURATION * torch.minimum(k, 4 - k).clamp(0, 1))


def backgrounds(size: int = FRAME_SIZE) -> Tensor:
    """The four empty places, RGB in 0..1, (4, 3, size, size)."""
    colours = torch.tensor([_PLACE_COLOURS[place] for place in PLACES])[..., None]  # (places, 4, 3, 1)
    height = (torch.arange(size) + 0.5) / size
    sky = (height / _HORIZON).clamp(0, 1)
    ground = ((height - _HORIZON) / (1 - _HORIZON)).clamp(0, 1)
    below = ((height - _HORIZON) * size + 0.5).clamp(0, 1)  # one pixel of soft edge
    above_colour = colours[:, 0] * (1 - sky) + colours[:, 1] * sky
    below_colour = colours[:, 2] * (1 - ground) + colours[:, 3] * ground
    column = above_colour * (1 - below) + below_colour * below  # (places, 3, size)
    return column[..., None].expand(-1, -1, -1, size)


def _star_distance(x: Tensor, y: Tensor, radius: float, inner: float) -> Tensor:
    """Distance to the edge of a five-pointed star that points up, positive inside; `inner` is its inner radius."""
    # Fold the plane into one tenth of the star: between a tip, along +x, and the notch beside it, at 36 degrees.
    sector = 2 * math.pi / 5
    folded = ((torch.atan2(x, -y) + sector / 2) % sector - sector / 2).abs()
    distance = torch.hypot(x, y)
    tip_to_x, tip_to_y = distance * folded.cos() - radius, distance * folded.sin()
    # The straight edge runs from the tip to the notch; the sign of the cross product tells its two sides apart.
    edge_x, edge_y = inner * math.cos(sector / 2) - radius, inner * math.sin(sector / 2)
    return (tip_to_y * edge_x - tip_to_x * edge_y) / math.hypot(edge_x, edge_y)


def shape_distances(x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of offsets x, y (in frame sides) to the edge of each shape, positive inside: (5, ...).

    In the vocabulary's order: ball, box, star, ring, and nothing for an empty place.
    """
    distance = torch.hypot(x, y)
    ball = 0.23 - distance
    box = 0.205 - torch.maximum(x.abs(), y.abs())
    star = _star_distance(x, y, radius=0.345, inner=0.165)
    ring = torch.minimum(0.285 - distance, distance - 0.15)
    return torch.stack([ball, box, star, ring, torch.full_like(distance, -1.0)])


def render(who: Tensor, place: Tensor, hue: Tensor, centre: Tensor, size: int = FRAME_SIZE) -> Tensor:
    """Frames from their ground truth.

    who (...) 0..4, place (...) 0..3 int64 · hue (...) in turns · centre (..., 2) as x, y in frame sides
    -> (..., 3, size, size) float32 in -1..1, edges anti-aliased.
    """
    pixels = (torch.arange(size) + 0.5) / size
    x = pixels[None, :] - centre[..., 0, None, None]  # (..., 1, size)
    y = pixels[:, None] - centre[..., 1, None, None]  # (..., size, 1)
    x, y = torch.broadcast_tensors(x, y)
    distances = shape_distances(x, y)
    inside = distances.gather(0, who[None, ..., None, None].expand(1, *x.shape))[0]
    cover = (inside * size + 0.5).clamp(0, 1).unsqueeze(-3)
    colour = hue_to_rgb(hue)[..., None, None]
    return (backgrounds(size)[place] * (1 - cover) + colour * cover) * 2 - 1


def coordinates(frames: int, height: int, width: int) -> Tensor:
    """The toy model's condition: x and y of every pixel, -1..1 from edge to edge, (1, 2, frames, height, width).

    RoPE tells tokens how far apart they are, never where in the frame they stand; a horizon needs to know.
    """
    x, y = ((torch.arange(n) + 0.5) * 2 / n - 1 for n in (width, height))
    return torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]))[None, :, None].expand(1, 2, frames, -1, -1)


# ---------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Clips:
    """Random clips with their ground truth; C chunks of 3 frames, F = 3 C."""

    frames: Tensor
    """(B, 3, F, size, size) in -1..1"""
    who: Tensor
    """(B, C) character index, 4 = nobody"""
    place: Tensor
    """(B, C) place index"""
    hue: Tensor
    """(B, C) in turns; a character keeps its hue for the whole clip"""


def prompt_ids(who: Tensor, place: Tensor) -> Tensor:
    """Character and place indices (...) -> vocabulary indices (..., 2) for `text.embed_ids`."""
    return torch.stack([who, place + VOCABULARY.index(PLACES[0])], dim=-1)


def random_clips(
    batch: int, chunks: int, generator: torch.Generator, *, chunk_frames: int = 3, size: int = FRAME_SIZE
) -> Clips:
    """Clips in which two characters and an empty place take turns, so that returns are frequent.

    A prompt lasts one chunk or more; at each switch somebody else (or nobody) comes, the place and the position are
    drawn anew, and a character that was there before has its old hue. Hues are uniform and independent.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    switch = uniform(batch, chunks) < 0.7
    switch &= uniform(batch, 1) > 0.15  # copying is learned first where one character simply stays
    switch[:, 0] = True
    segment = switch.cumsum(1) - 1  # (B, C), which prompt of the clip a chunk belongs to
    turns = (integers(0, 3, batch, 1) + integers(1, 3, batch, chunks).cumsum(1)) % 3  # never the same twice running
    cast = torch.cat([uniform(batch, 4).argsort(-1)[:, :2], torch.full((batch, 1), EMPTY_INDEX)], dim=1)
    who = cast.gather(1, turns).gather(1, segment)
    place = integers(0, len(PLACES), batch, chunks).gather(1, segment)
    hue = uniform(batch, EMPTY_INDEX + 1).gather(1, who)

    per_frame = segment.repeat_interleave(chunk_frames, 1)[..., None].expand(-1, -1, 2)
    low, high = torch.tensor(PLACE_LOW), torch.tensor(PLACE_HIGH)
    start = low + uniform(batch, chunks, 2) * (high - low)
    velocity = (uniform(batch, chunks, 2) - 0.5) * torch.tensor([0.015, 0.0])
    time = torch.arange(chunks * chunk_frames)[:, None]
    centre = (start.gather(1, per_frame) + velocity.gather(1, per_frame) * time).clamp(low, high)
    whom, where, tint = (x.repeat_interleave(chunk_frames, 1) for x in (who, place, hue))
    return Clips(render(whom, where, tint, centre, size).transpose(1, 2), who, place, hue)


# ---------------------------------------------------------------------------------------------------------------- judge


def colour_mask(frames: Tensor) -> Tensor:
    """Which pixels are vivid enough to belong to a character: frames (..., 3, H, W) in -1..1 -> bool (..., H, W)."""
    rgb = (frames.clamp(-1, 1) + 1) / 2
    value, darkest = rgb.amax(-3), rgb.amin(-3)
    return ((value - darkest) > 0.5 * value) & (value > 0.35)


@dataclass(frozen=True)
class Verdict:
    """What the pixels say, per frame."""

    present: Tensor
    """bool (...): the colour mask covers at least PRESENT_SHARE of the frame"""
    hue: Tensor
    """degrees in 0..360 (...): circular mean over the mask, weighted by chroma; meaningless where nobody is present"""
    area: Tensor
    """share of the frame covered by the mask (...)"""


def judge(frames: Tensor) -> Verdict:
    """Looks for a character in frames (..., 3, H, W) in -1..1, knowing nothing but the pixels."""
    mask = colour_mask(frames)
    red, green, blue = (((frames.clamp(-1, 1) + 1) / 2) * mask.unsqueeze(-3)).flatten(-2).sum(-1).unbind(-1)
    # On the colour circle red, green and blue stand 120 degrees apart; this is the sum's direction.
    hue = torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    area = mask.flatten(-2).float().mean(-1)
    return Verdict(area >= PRESENT_SHARE, hue, area)


def recognise(frames: Tensor) -> Tensor:
    """Which character frames (..., 3, H, W) in -1..1 look most like, 0..3 (int64); meaningless where none is present.

    The colour mask is laid over each shape, drawn at the mask's centre, and compared by intersection over union.
    """
    mask = colour_mask(frames).float()
    height, width = mask.shape[-2:]
    y, x = ((torch.arange(n, device=mask.device) + 0.5) / n for n in (height, width))
    mass = mask.sum((-2, -1)).clamp(min=1)
    centre_x = (mask.sum(-2) * x).sum(-1) / mass
    centre_y = (mask.sum(-1) * y).sum(-1) / mass
    offset_x, offset_y = torch.broadcast_tensors(
        x[None, :] - centre_x[..., None, None], y[:, None] - centre_y[..., None, None]
    )
    shapes = (shape_distances(offset_x, offset_y)[: len(CHARACTERS)] > 0).float()  # (4, ..., H, W)
    both = (shapes * mask).sum((-2, -1))
    return (both / (shapes.sum((-2, -1)) + mask.sum((-2, -1)) - both).clamp(min=1)).argmax(0)


def hue_difference(a: Tensor, b: Tensor) -> Tensor:
    """Degrees between two hues in degrees, 0..180."""
    return ((a - b + 180) % 360 - 180).abs()
