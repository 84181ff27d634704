"""The toy world: four characters, four places, and looks that no prompt names; its renderer and random clips.

A frame is RGB in -1..1, 32 x 32. A place is a pale picture (HSV saturation below 0.3). A character is a vivid shape of
its own (saturation 0.9) on 8 to 14 % of the frame, in two tones of one hue. A prompt says who is where. Hue and pattern
are the character's look: the model invents it when the character first appears, and has to bring it back when the
character returns. Characters hop up and down on the spot. One alone is in the middle of the frame; of two the first is
on the left and the second on the right. So who is there, and whether memory works, can be read off the pixels
(judge.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from memflow_ops.model.toy.language import NOBODY, PLACES

FRAME_SIZE = 32
"""Pixels per side."""
PATTERNS = ("halves", "sides", "checks")
"""Any two of them differ on half of the character, so that a mixture of two is not a third."""

# Per place RGB in 0..1, pale on purpose: top and horizon of the sky, horizon and foreground of the ground.
_PLACE_COLOURS = {
    "meadow": ((0.66, 0.74, 0.80), (0.80, 0.84, 0.84), (0.52, 0.62, 0.47), (0.42, 0.50, 0.38)),
    "desert": ((0.80, 0.76, 0.66), (0.88, 0.82, 0.72), (0.76, 0.68, 0.56), (0.62, 0.55, 0.46)),
    "sea": ((0.74, 0.76, 0.80), (0.82, 0.84, 0.86), (0.44, 0.52, 0.60), (0.36, 0.42, 0.50)),
    "night": ((0.11, 0.11, 0.14), (0.17, 0.17, 0.21), (0.24, 0.24, 0.28), (0.30, 0.30, 0.33)),
}
_HORIZON = 0.55
SATURATION = 0.9  # of a character
BRIGHT, DARK = 0.98, 0.52  # HSV value of its two tones
_PIXEL = 1 / FRAME_SIZE  # shapes and distances are given in pixels of the full size

HEIGHTS = (24 * _PIXEL, 20 * _PIXEL, 16 * _PIXEL, 12 * _PIXEL, 16 * _PIXEL, 20 * _PIXEL)
"""Where a character's centre is in the frames of a hop, in frame sides from the top. The hop starts over when the scene
changes. It goes by whole patches of the model, which need not learn how a shape looks at every offset from them."""
MIDDLE, LEFT, RIGHT = 0.5, 0.25, 0.75
"""Where characters stand, in frame sides from the left edge."""


def hue_to_rgb(hue: Tensor) -> Tensor:
    """Hues in turns (...) -> vivid colours of HSV value 1, RGB in 0..1, (..., 3)."""
    offsets = torch.tensor([5.0, 3.0, 1.0], device=hue.device, dtype=torch.float32)
    k = (offsets + hue[..., None] * 6) % 6
    return 1 - SATURATION * torch.minimum(k, 4 - k).clamp(0, 1)


def backgrounds(size: int = FRAME_SIZE) -> Tensor:
    """The four empty places, RGB in 0..1, (4, 3, size, size)."""
    colours = torch.tensor([_PLACE_COLOURS[place] for place in PLACES], dtype=torch.float32, device="cpu")
    colours = colours[..., None]  # (places, 4, 3, 1)
    height = (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5) / size
    sky = (height / _HORIZON).clamp(0, 1)
    ground = ((height - _HORIZON) / (1 - _HORIZON)).clamp(0, 1)
    below = ((height - _HORIZON) * size + 0.5).clamp(0, 1)  # one pixel of soft edge
    above_colour = colours[:, 0] * (1 - sky) + colours[:, 1] * sky
    below_colour = colours[:, 2] * (1 - ground) + colours[:, 3] * ground
    column = above_colour * (1 - below) + below_colour * below  # (places, 3, size)
    return column[..., None].expand(-1, -1, -1, size)


def _star_distance(x: Tensor, y: Tensor, radius: float, inner: float) -> Tensor:
    """Signed distance to the edge of a five-pointed star that points up, positive inside. `inner`: the inner radius."""
    # Fold the plane into one tenth of the star: between a tip, along +x, and the notch beside it, at 36 degrees.
    sector = 2 * math.pi / 5
    folded = ((torch.atan2(x, -y) + sector / 2) % sector - sector / 2).abs()
    distance = torch.hypot(x, y)
    tip_to_x, tip_to_y = distance * folded.cos() - radius, distance * folded.sin()
    # The straight edge runs from the tip to the notch; the sign of the cross product tells its two sides apart.
    edge_x, edge_y = inner * math.cos(sector / 2) - radius, inner * math.sin(sector / 2)
    return (tip_to_y * edge_x - tip_to_x * edge_y) / math.hypot(edge_x, edge_y)


def shape_distances(x: Tensor, y: Tensor) -> Tensor:
    """Signed distances of offsets x, y (...), in frame sides, to the edges of the shapes, positive inside: (5, ...).

    The order is that of CHARACTERS: ball, box (a wide one), star, ring; then nobody, who has no inside.
    """
    distance = torch.hypot(x, y)
    ball = 6.25 * _PIXEL - distance
    box = torch.minimum(7 * _PIXEL - x.abs(), 4 * _PIXEL - y.abs())
    star = _star_distance(x, y, radius=8 * _PIXEL, inner=3.75 * _PIXEL)
    ring = torch.minimum(7.25 * _PIXEL - distance, distance - 3.25 * _PIXEL)
    return torch.stack([ball, box, star, ring, torch.full_like(distance, -1.0)])


def pattern_distances(x: Tensor, y: Tensor) -> Tensor:
    """Signed distances of offsets x, y (...), in frame sides, to the edges of the patterns' dark tones: (3, ...).

    They are positive in the dark tone. In the order of PATTERNS it covers the lower half, the left half, and the upper
    left and lower right quarters.
    """
    checks = torch.minimum(x.abs(), y.abs()) * (x * y).sign()
    return torch.stack([y, -x, checks])


def render(who: Tensor, place: Tensor, hue: Tensor, pattern: Tensor, centre: Tensor, size: int = FRAME_SIZE) -> Tensor:
    """Frames from their ground truth: N characters each, drawn one over the other, with anti-aliased edges.

    who (..., N) 0..4, place (...) 0..3 int64 · hue (..., N) in turns · pattern (..., N) 0..2 int64 · centre (..., N, 2)
    as x, y in frame sides -> (..., 3, size, size) float32 in -1..1.
    """
    pixels = (torch.arange(size, dtype=torch.float32, device="cpu") + 0.5) / size
    picture = backgrounds(size)[place]
    for n in range(who.shape[-1]):
        x = pixels[None, :] - centre[..., n, 0, None, None]  # (..., 1, size)
        y = pixels[:, None] - centre[..., n, 1, None, None]  # (..., size, 1)
        x, y = torch.broadcast_tensors(x, y)

        def share(distances: Tensor, of: Tensor) -> Tensor:
            chosen = distances.gather(0, of[None, ..., None, None].expand(1, *distances.shape[1:]))[0]
            return (chosen * size + 0.5).clamp(0, 1).unsqueeze(-3)

        cover, dark = share(shape_distances(x, y), who[..., n]), share(pattern_distances(x, y), pattern[..., n])
        colour = hue_to_rgb(hue[..., n])[..., None, None] * (BRIGHT + (DARK - BRIGHT) * dark)
        picture = picture * (1 - cover) + colour * cover
    return picture * 2 - 1


# ---------------------------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Clips:
    """B random clips with their ground truth: C chunks, F frames."""

    frames: Tensor
    """(B, 3, F, size, size) in -1..1"""
    ids: Tensor
    """(B, C, 3) int64, what each chunk's prompt says, as `embed_ids` takes it: first character, second, place"""
    hue: Tensor
    """(B, C, 2) in turns, of the first and the second character; a character keeps its look for the whole clip"""
    pattern: Tensor
    """(B, C, 2) int64, index in PATTERNS, likewise"""


def random_clips(
    batch: int, chunks: int, generator: torch.Generator, *, chunk_frames: int = 3, size: int = FRAME_SIZE
) -> Clips:
    """Clips in which empty places and three characters, alone and in pairs, take turns, so that returns are frequent.

    A prompt lasts one chunk or more. At each switch the place and the cast are drawn anew, and a character that was
    there before has its old look. Looks are uniform and independent.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu")

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.long, device="cpu")

    switch = uniform(batch, chunks) < 0.7
    switch &= uniform(batch, 1) > 0.15  # copying is learned first where one character simply stays
    switch[:, 0] = True
    segment = switch.cumsum(1) - 1  # (B, C), which prompt of the clip a chunk belongs to

    cast = uniform(batch, 4).argsort(-1)[:, :3]
    cast = cast.gather(1, uniform(batch, chunks, 3).argsort(-1)[..., :2].flatten(1)).unflatten(1, (chunks, 2))
    named = uniform(batch, chunks)  # 15 % nobody, 50 % one, 35 % two
    cast = torch.where(torch.stack([named < 0.15, named < 0.65], -1), NOBODY, cast)
    pair_of_segment = segment[..., None].expand(-1, -1, 2)
    who = cast.gather(1, pair_of_segment)  # (B, C, 2)
    place = integers(len(PLACES), batch, chunks).gather(1, segment)
    hue = uniform(batch, NOBODY + 1).gather(1, who.flatten(1)).view(who.shape)
    pattern = integers(len(PATTERNS), batch, NOBODY + 1).gather(1, who.flatten(1)).view(who.shape)

    changed = torch.ones(batch, chunks, dtype=torch.bool, device="cpu")
    changed[:, 1:] = (who[:, 1:] != who[:, :-1]).any(-1) | (place[:, 1:] != place[:, :-1])
    chunk = torch.arange(chunks, dtype=torch.long, device="cpu")
    since = chunk - torch.where(changed, chunk, 0).cummax(1).values  # chunks since the scene changed
    in_chunk = torch.arange(chunk_frames, dtype=torch.long, device="cpu").repeat(chunks)
    frame = since.repeat_interleave(chunk_frames, 1) * chunk_frames + in_chunk
    heights = torch.tensor(HEIGHTS, dtype=torch.float32, device="cpu")
    y = heights[frame % len(HEIGHTS)][..., None].expand(-1, -1, 2)  # (B, F, 2)
    sides = torch.tensor([LEFT, RIGHT], dtype=torch.float32, device="cpu")
    x = torch.where(who[..., 1:] == NOBODY, MIDDLE, sides).repeat_interleave(chunk_frames, 1)
    centre = torch.stack([x, y], dim=-1)
    whom, where, tint, tones = (z.repeat_interleave(chunk_frames, 1) for z in (who, place, hue, pattern))
    frames = render(whom, where, tint, tones, centre, size).transpose(1, 2)
    return Clips(frames, torch.cat([who, place[..., None]], dim=-1), hue, pattern)
