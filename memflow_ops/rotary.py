"""Rotary position embeddings (RoPE, arXiv 2104.09864) in plain torch."""

from collections.abc import Callable

import torch
from torch import Tensor


def turn_pairs(x: Tensor, turn: Tensor) -> Tensor:
    """Multiply each pair (x[2i], x[2i + 1]) of the last dimension, as a complex number, by `turn`.

    This takes one pass over memory, and is six times faster than products of the halves.

    x (..., D) is float32 or float64 and may have any strides. turn (..., D / 2) is complex of the same precision, and
    is broadcast. Returns a tensor like x.
    """
    x = x.contiguous()
    # Torch views pairs as complex numbers only where they are aligned, and torch.compile cannot ask where x lies.
    if torch.compiler.is_compiling() or x.storage_offset() % 2:
        x = x.clone()
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def rope_rotation(head_dim: int, frames: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines of 3-D RoPE for a grid of tokens.

    frames (F,) or (B, F), rows (h,) and columns (w,) are positions of any size, whole or not. Returns two float32
    tensors (B or 1, F * h * w, 1, head_dim / 2).

    Of the D channels of a head, D - 4 (D // 6) turn with the frame, 2 (D // 6) with the row and as many with the
    column, in interleaved pairs. Angles are computed in float64, so that frame 100,000 is as exact as frame 0, and no
    table limits the positions.
    """
    frames = frames if frames.dim() == 2 else frames[None]
    spatial = 2 * (head_dim // 6)
    parts = []
    for positions, channels in ((frames, head_dim - 2 * spatial), (rows, spatial), (columns, spatial)):
        exponents = torch.arange(0, channels, 2, dtype=torch.float64, device=frames.device) / max(channels, 1)
        parts.append(positions.to(frames.device, torch.float64)[..., None] * 10_000.0**-exponents)
    time, row, column = parts
    shape = (frames.shape[0], frames.shape[1], len(rows), len(columns), -1)

    def spread(of: Callable[[Tensor], Tensor]) -> Tensor:
        # Trigonometry on the few distinct positions, then one expansion to all tokens.
        pieces = (of(time)[:, :, None, None], of(row)[None, None, :, None], of(column)[None, None, None])
        return torch.cat([p.float().expand(*shape[:4], p.shape[-1]) for p in pieces], dim=-1).flatten(1, 3)[:, :, None]

    return spread(torch.cos), spread(torch.sin)


def apply_rotation(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the interleaved pairs of x (B, tokens, heads, head_dim) in float32. Returns a tensor in the dtype of x."""
    return turn_pairs(x.float(), torch.complex(cosines, sines)).to(x.dtype)


def time_pairs(head_dim: int) -> int:
    """How many of the pairs of a head turn with the frame in `rope_rotation`; they come first."""
    return (head_dim - 4 * (head_dim // 6)) // 2


def frame_turn(head_dim: int, frames: int, device: torch.device) -> Tensor:
    """What `turn_pairs` takes to move rotated vectors by so many frames, (head_dim / 2,) complex64."""
    nowhere = torch.zeros(1, dtype=torch.float64, device=device)
    cosines, sines = rope_rotation(head_dim, nowhere + frames, nowhere, nowhere)
    return torch.complex(cosines, sines).flatten()


def move_frames(x: Tensor, turn: Tensor) -> Tensor:
    """Move rotated x (B, tokens, heads, head_dim) in time by a turn of `frame_turn`, in float32; in the dtype of x.

    turn: all of it or its leading pairs; others stay as they are.
    """
    width = 2 * len(turn)
    moved = turn_pairs(x[..., :width].float(), turn).to(x.dtype)
    return moved if width == x.shape[-1] else torch.cat([moved, x[..., width:]], -1)


def move_rotation(rotation: tuple[Tensor, Tensor], turn: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines of `rope_rotation` moved in time by a turn of `frame_turn`, or by its leading pairs; as
    many pairs as the turn has."""
    cosines, sines = (part[..., : len(turn)] for part in rotation)
    moved = torch.complex(cosines, sines) * turn
    return moved.real.contiguous(), moved.imag.contiguous()


def with_other_pairs(leading: tuple[Tensor, Tensor], rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1 or B, tokens, D / 2): of the leading pairs (1 or B, tokens, P), and `rotation`'s for the
    others."""
    batch = max(len(leading[0]), len(rotation[0]))
    cosines, sines = (
        torch.cat([x.expand(batch, -1, -1), rest[..., x.shape[-1] :].expand(batch, -1, -1)], -1)
        for x, rest in zip(leading, rotation, strict=True)
    )
    return cosines, sines


def without_time(rotation: tuple[Tensor, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines of `rope_rotation` for the first so many tokens, as if they were of frame 0."""
    cosines, sines = (part[:, :tokens].clone() for part in rotation)
    pairs = time_pairs(2 * cosines.shape[-1])
    cosines[..., :pairs].fill_(1.0)
    sines[..., :pairs].zero_()
    return cosines, sines
