"""Block descriptors and the selection of blocks, in loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl.precision import widened


def describe_blocks(k: Tensor, block_size: int, frame_tokens: int) -> Tensor:
    means = [
        widened(k[:, start : min(start + block_size, frame + frame_tokens)]).mean(1)
        for frame in range(0, k.shape[1], frame_tokens)
        for start in range(frame, frame + frame_tokens, block_size)
    ]
    return torch.stack(means, 1).to(k.dtype) if means else k[:, :0].clone()


def select_blocks(q: Tensor, descriptors: Tensor, top_k: int, geometry: Geometry) -> Tensor:
    """
    for every batch element, query head and query group:
        score of block j = mean of the group's queries . descriptor j
        selected         = the top_k highest, equal scores to the lower block; in ascending order, then -1
    """
    batch, queries, heads, _ = q.shape
    blocks_per_frame, memory_frames = geometry.blocks_per_frame, geometry.memory_frames
    slots = slot_lists(geometry, batch, descriptors.shape[1] // blocks_per_frame)
    entries = min(top_k, len(slots[0]) * blocks_per_frame)
    selections = []
    groups = geometry.query_groups(queries)
    if memory_frames is None:
        memory_frames = torch.full((batch,), len(slots[0]), dtype=torch.int64, device="cpu")
    valid = memory_frames.clamp(0, len(slots[0])).view(batch, -1).expand(batch, groups).tolist()
    for b in range(batch):
        places = [slot * blocks_per_frame + j for slot in slots[b] for j in range(blocks_per_frame)]
        for h in range(heads):
            kv_head = h // (heads // descriptors.shape[2])
            for g in range(groups):
                candidates = widened(descriptors[b, places[: valid[b][g] * blocks_per_frame], kv_head])
                group = widened(q[b, g * geometry.query_group : (g + 1) * geometry.query_group, h]).mean(0)
                selected = sorted(best_first((candidates * group).sum(-1))[:top_k])
                selections.append(selected + [-1] * (entries - len(selected)))
    shape = (batch, heads, groups, entries)
    return torch.tensor(selections, dtype=torch.int32, device=q.device).reshape(shape)


def best_first(scores: Tensor) -> list[int]:
    """Indices of the scores from the highest to the lowest. Equal scores stay in order (-0 equals +0); NaN is last."""
    values = scores.tolist()

    def key(j: int) -> tuple[bool, float, int]:
        is_nan = math.isnan(values[j])
        return is_nan, 0.0 if is_nan else -values[j], j

    return sorted(range(len(values)), key=key)


def slot_lists(geometry: Geometry, batch: int, stored_frames: int) -> list[list[int]]:
    """For each batch element the stored frame behind every frame of the bank."""
    if geometry.memory_slots is None:
        return [list(range(stored_frames))] * batch
    return geometry.memory_slots.clamp(0, max(stored_frames - 1, 0)).tolist()
