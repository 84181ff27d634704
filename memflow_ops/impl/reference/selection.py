"""`impl="reference"` of block descriptors and of the selection of blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Half precisions compute in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def describe_blocks(k: Tensor, block_size: int, frame_tokens: int) -> Tensor:
    means = [
        wide(k[:, start : min(start + block_size, frame + frame_tokens)]).mean(1)
        for frame in range(0, k.shape[1], frame_tokens)
        for start in range(frame, frame + frame_tokens, block_size)
    ]
    return torch.stack(means, 1).to(k.dtype) if means else k[:, :0].clone()


def select_blocks(
    q: Tensor,
    descriptors: Tensor,
    top_k: int,
    query_group: int,
    memory_frames: Tensor | None,
    memory_slots: Tensor | None,
    blocks_per_frame: int,
) -> Tensor:
    batch, queries, heads, _ = q.shape
    slots = slot_table(memory_slots, batch, descriptors.shape[1] // blocks_per_frame)
    blocks = len(slots[0]) * blocks_per_frame
    rows = []
    for b in range(batch):
        valid = len(slots[b]) if memory_frames is None else min(max(int(memory_frames[b]), 0), len(slots[b]))
        places = [s * blocks_per_frame + j for s in slots[b][:valid] for j in range(blocks_per_frame)]
        for h in range(heads):
            candidates = wide(descriptors[b, places, h // (heads // descriptors.shape[2])])
            for start in range(0, queries, query_group):
                group = wide(q[b, start : start + query_group, h]).mean(0)
                chosen = sorted(rank((candidates * group).sum(-1))[:top_k])
                rows.append(chosen + [-1] * (min(top_k, blocks) - len(chosen)))
    shape = (batch, heads, -(-queries // query_group), min(top_k, blocks))
    return torch.tensor(rows, dtype=torch.int32, device=q.device).reshape(shape)


def rank(scores: Tensor) -> list[int]:
    """Indices from best to worst: NaN last, equal scores (-0 equals +0) by index."""
    values = scores.tolist()
    return sorted(
        range(len(values)), key=lambda j: (math.isnan(values[j]), 0 if math.isnan(values[j]) else -values[j], j)
    )


def slot_table(memory_slots: Tensor | None, batch: int, frames: int) -> list[list[int]]:
    """Where the bank's frames lie, per batch element; values are clamped to the frames there are."""
    if memory_slots is None:
        return [list(range(frames))] * batch
    return memory_slots.clamp(0, max(frames - 1, 0)).tolist()
