"""Keys and values of a bank as int8: how they are made, and how they become numbers again.

Keys are stored as what they differ from the mean of their block by, with a scale for every channel of the block: what
the keys of a block have in common costs no precision, and a channel with large numbers takes none from the others.
Values have a scale each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.impl.precision import wide_dtype

LARGEST = 127
"""The largest absolute value that is stored: -128 is not used, so that both signs have the same range."""


def quantise_memory(
    k: Tensor, v: Tensor, descriptors: Tensor, block_size: int, frame_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The int8 keys and values, and k_scale and v_scale, of `memflow_ops.quantise_memory`."""
    frames, blocks = k.shape[1] // frame_tokens, -(-frame_tokens // block_size)
    wide, lacking = wide_dtype(k.dtype), blocks * block_size - frame_tokens
    # A frame's last block is filled up: [B, N, block_size, Hkv, D].
    filled = F.pad(k.to(wide).unflatten(1, (frames, frame_tokens)), (0, 0, 0, 0, 0, lacking))
    filled = filled.unflatten(2, (blocks, block_size)).flatten(1, 2)
    difference = filled - descriptors[..., : k.shape[3]].to(wide).unsqueeze(2)
    difference.unflatten(1, (frames, blocks))[:, :, -1, block_size - lacking :] = 0
    k_scale = (difference.abs().amax(2) / LARGEST).to(k.dtype)
    v_scale = (v.to(wide).abs().amax(3) / LARGEST).to(v.dtype)
    keys = _rounded(difference, k_scale.unsqueeze(2)).unflatten(1, (frames, blocks)).flatten(2, 3)
    return keys[:, :, :frame_tokens].flatten(1, 2), _rounded(v.to(wide), v_scale.unsqueeze(3)), k_scale, v_scale


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale to the nearest integer, as int8; 0 where the scale is 0 or not finite."""
    integers = (x / scale.to(x.dtype)).round_().clamp_(-LARGEST, LARGEST)
    return integers.nan_to_num_(0.0).to(torch.int8)


def numbers_of(stored: Tensor, scale: Tensor, means: Tensor | None = None) -> Tensor:
    """scale * stored, or means + scale * stored, rounded once to the dtype of the scale. Shapes broadcast."""
    wide = wide_dtype(scale.dtype)
    numbers = stored.to(wide).mul_(scale.to(wide))
    return (numbers if means is None else numbers.add_(means.to(wide))).to(scale.dtype)
