"""Attention to selected blocks that have been copied beside the local window, so that both are one run of keys.

Where one selection serves all queries of a head, its blocks are the same few keys for all of them. With a copy of these
right before the window, one call of torch's attention sees both: nothing is merged, and later passes that keep the
selection gather nothing. A head whose blocks have fewer tokens than others leaves room, which is hidden.

All of this is for CPUs, where the host may read values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl.dense import attend_folded, cpu_attention
from memflow_ops.impl.torch.int8 import numbers_of


def copy_selected(
    memory_k: Tensor,
    memory_v: Tensor,
    indices: Tensor,
    geometry: Geometry,
    target_k: Tensor,
    target_v: Tensor,
    hidden: Tensor,
) -> None:
    """Copy the selected blocks of a bank (B, L, H, D), one selection per head, to target_k and target_v (B, S, H, D).

    indices (B, H, 1, K) int32, S = K * block_size. What an unused entry or a shorter block leaves free becomes 0, and
    True in hidden (B, H, S). The copies of an int8 bank are of the dtype of the targets.
    """
    size, frame_tokens, slots = geometry.block_size, geometry.frame_tokens, geometry.memory_slots
    stored = geometry.stored_frames(memory_k)
    in_order = torch.arange(stored, dtype=torch.int32, device=memory_k.device).expand(len(memory_k), -1)
    places = (in_order if slots is None else slots.clamp(0, stored - 1)).tolist()
    hidden.zero_()
    for b, (of_heads, of_story) in enumerate(zip(indices[:, :, 0].tolist(), places, strict=True)):
        for h, blocks in enumerate(of_heads):
            keys, values = (memory_k[b, :, h], target_k[b, :, h]), (memory_v[b, :, h], target_v[b, :, h])
            for entry, block in enumerate(blocks):
                start, length, first = entry * size, 0, 0
                frame, number = divmod(block, geometry.blocks_per_frame)
                if 0 <= frame < len(of_story):
                    length = min(size, frame_tokens - number * size)
                    first = of_story[frame] * frame_tokens + number * size
                of_bank, copy = slice(first, first + length), slice(start, start + length)
                for source, target in (keys, values):
                    if geometry.int8 is None:
                        target[copy] = source[of_bank]
                    if length < size:  # what lies there may be NaN, and a score of NaN cannot be hidden
                        target[start + length : start + size] = 0
                if geometry.int8 is not None and length:
                    descriptors, k_scale, v_scale = (x[b, :, h] for x in geometry.int8)
                    place = of_story[frame] * geometry.blocks_per_frame + number
                    means = descriptors[place, : k_scale.shape[1]]
                    keys[1][copy] = numbers_of(keys[0][of_bank], k_scale[place], means)
                    values[1][copy] = numbers_of(values[0][of_bank], v_scale[of_bank, None])
                if length < size:
                    hidden[b, h, start + length : start + size] = True


def attend_with_copies(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, softmax_scale: float) -> Tensor:
    """Attention from q (B, Lq, H, D) to k and v (B, S + window, H, D), but not to the first S keys that are hidden."""
    bias = None
    if hidden.any():
        bias = torch.zeros((*hidden.shape[:2], 1, k.shape[1]), dtype=q.dtype, device=q.device)
        bias[..., 0, : hidden.shape[2]].masked_fill_(hidden, -torch.inf)

    def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return cpu_attention(q, k, v, scale, bias)

    return attend_folded(attention, q, k, v, softmax_scale)[0]
