"""Block descriptors and the selection of blocks, in loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from memflow_ops.geometry import PART_QUERIES, Geometry
from memflow_ops.impl.precision import widened


def describe_blocks(k: Tensor, block_size: int, frame_tokens: int, moments: int = 1) -> Tensor:
    """
    for every block:
        mean       = mean of its keys
        variance   = mean of (key - mean)^2, at most the largest number of k's dtype
        descriptor = mean, or with two moments [mean, variance]
    """
    largest = torch.finfo(k.dtype).max
    described = [k.new_empty(k.shape[0], 0, k.shape[2], moments * k.shape[3])]
    for frame in range(0, k.shape[1], frame_tokens):
        for start in range(frame, frame + frame_tokens, block_size):
            keys = widened(k[:, start : min(start + block_size, frame + frame_tokens)])
            mean = keys.mean(1, keepdim=True)
            variance = (keys - mean).square().mean(1, keepdim=True).clamp(max=largest)
            described.append(torch.cat([mean, variance][:moments], -1).to(k.dtype))
    return torch.cat(described, 1)


def select_blocks(q: Tensor, descriptors: Tensor, top_k: int, geometry: Geometry) -> Tensor:
    """
    for every batch element, query head and query group:
        score of block j = feature of the group's queries . descriptor j
                           (score "moments": + log(tokens of the block / tokens of a whole block))
        or, with the score "normalised" and several parts of PART_QUERIES queries in the group,
                           log(sum over the parts of (its queries) exp(x_j) / (sum over blocks i of exp(x_i)))
                           where x_j is the score "moments" of the part
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
                group = widened(q[b, g * geometry.query_group : (g + 1) * geometry.query_group, h])
                parts = group.split(PART_QUERIES if geometry.parts > 1 else len(group))
                of_parts = []
                for part in parts:
                    x = (candidates * feature(part, geometry)).sum(-1)
                    x[blocks_per_frame - 1 :: blocks_per_frame] += geometry.last_block_score
                    of_parts.append(x)
                scores = of_parts[0] if len(parts) == 1 else normalised(of_parts, parts)
                selected = sorted(best_first(scores)[:top_k])
                selections.append(selected + [-1] * (entries - len(selected)))
    shape = (batch, heads, groups, entries)
    return torch.tensor(selections, dtype=torch.int32, device=q.device).reshape(shape)


def feature(group: Tensor, geometry: Geometry) -> Tensor:
    """What the descriptors are multiplied with, of the queries [n, D] of a group.

    For a query and the scale s, log sum exp(s q . k) over the n keys of a block is about
    log n + s q . mean + s^2 / 2 sum(q^2 variance): exact for normally distributed keys whose channels do not correlate.
    """
    if geometry.score == "mean":
        return group.mean(0)
    scale = geometry.softmax_scale
    return torch.cat([scale * group.mean(0), scale**2 / 2 * group.square().mean(0)])


def normalised(scores: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mass [N] that a group gives to each block: its parts' scores [N], each normalised by itself.

    A block whose score is not a number has no part in the sum over the blocks.
    """
    masses = []
    for x, part in zip(scores, parts, strict=True):
        largest = torch.finfo(x.dtype).max
        total = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).logsumexp(0)
        masses.append(x - total.clamp(-largest, largest) + math.log(len(part)))
    return torch.stack(masses).logsumexp(0)


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
