"""Selection for query groups: the top-k blocks of the bank for each group, exactly. No score ever reaches memory.

There are few groups, so the keys of a whole span of the bank fit in registers, and one reading of the descriptors is
enough: the k-th highest key is found bit by bit, then the blocks above it and the first blocks equal to it are written
down. A large bank is a tournament: each span writes down its own k best blocks. The selection is the k best of these
candidates, which are in the order of the bank. `attend_kernel` can play the last round itself.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.configs import SPAN_BLOCKS, merge_config, span_config
from memflow_ops.kernels.launch import Launch, run_all
from memflow_ops.kernels.primitives import load_rows, row_pointers, strided
from memflow_ops.kernels.selection.describe import plan_block_means
from memflow_ops.kernels.selection.ranking import sortable_key, write_top_k
from memflow_ops.kernels.selection.rows import plan_select_rows
from memflow_ops.kernels.selection.scores import (
    choosable,
    described_bank,
    descriptor_pointers,
    descriptors_of_head,
    differs_by_group,
    score_tile,
    valid_blocks_of_rows,
)


@triton.jit
def select_one(
    mean,  # [DIM] float32, the group's descriptor
    descriptors,  # HeadDescriptors
    candidates,  # pointer to the group's list, -1 where unused; or None: all blocks
    count,  # of the candidates or blocks
    output,  # pointer to the group's indices
    top_k,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the top_k best of up to CHUNKS * COLUMNS blocks for one group. The keys of the group stay in registers."""
    keys = tl.zeros([CHUNKS, COLUMNS], tl.uint32)
    for chunk in range(tl.cdiv(count, COLUMNS)):
        places = chunk * COLUMNS + tl.arange(0, COLUMNS)
        valid = places < count
        blocks = places
        if candidates is not None:
            blocks = tl.load(candidates + places, mask=valid, other=-1)
            valid = blocks >= 0
        rows = descriptor_pointers(descriptors, blocks, valid)
        descriptor = load_rows(rows, valid, tl.arange(0, DIM), HEAD_DIM).to(tl.float32)  # [COLUMNS, DIM]
        scores = tl.sum(descriptor * mean[None, :], 1)
        chunk_keys = tl.where(valid, sortable_key(scores), 0).to(tl.uint32)
        keys = tl.where((tl.arange(0, CHUNKS) == chunk)[:, None], chunk_keys[None, :], keys)
    row = tl.arange(0, 1)
    write_top_k(output + row, row == 0, 0, tl.reshape(keys, [1, CHUNKS * COLUMNS]), top_k, candidates)


# FLOPs: 2 * G * N * D. Bytes: the group means, the descriptors once per 16 groups (from L2), k indices per span.
@triton.jit
def span_kernel(
    means,  # Strided (B, G, H, D) float32
    bank,  # DescribedBank
    indices,  # (B, H, G, spans * K) int32, contiguous
    groups,
    top_k,
    spans,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # blocks of a span
    DIM_TILE: tl.constexpr,
    BY_GROUP: tl.constexpr,  # groups differ in how many frames are valid
):
    span = tl.program_id(0) % spans
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) // spans * ROWS + tl.arange(0, ROWS)
    row_mask = rows < groups
    mean_rows = row_pointers(means, batch, rows.to(tl.int64), head)
    descriptors = descriptors_of_head(bank, batch, head // HEADS_PER_KV_HEAD)
    blocks = span * COLUMNS + tl.arange(0, COLUMNS)
    valid_blocks, each = valid_blocks_of_rows(bank, batch, rows, row_mask, BY_GROUP)
    valid = blocks < valid_blocks
    pointers = descriptor_pointers(descriptors, blocks, valid)
    scores = score_tile(None, mean_rows, row_mask, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
    keys = tl.where(choosable(blocks, each, BY_GROUP), sortable_key(scores), 0).to(tl.uint32)
    output_rows = indices + (((batch * tl.num_programs(1) + head) * groups + rows) * spans + span) * top_k
    write_top_k(output_rows, row_mask, span * COLUMNS, keys, top_k, None)


# FLOPs: 2 * D per candidate. Bytes: their descriptors, gathered from L2.
@triton.jit
def merge_kernel(
    means,  # Strided (B, G, H, D) float32
    bank,  # DescribedBank
    candidates,  # (B, H, G, C) int32, contiguous
    indices,  # (B, H, G, K) int32, contiguous
    groups,
    top_k,
    candidate_count,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, DIM)
    mean_row = row_pointers(means, batch, group.to(tl.int64), head)
    mean = tl.load(mean_row + columns, mask=columns < HEAD_DIM, other=0.0)
    descriptors = descriptors_of_head(bank, batch, head // HEADS_PER_KV_HEAD)
    row = (batch * tl.num_programs(1) + head) * groups + group
    select_one(
        mean, descriptors, candidates + row * candidate_count, candidate_count, indices + row * top_k, top_k,
        HEAD_DIM, DIM, CHUNKS, COLUMNS,
    )  # fmt: skip


@dataclass(frozen=True)
class Shortlist:
    """What is known before the last round of a selection."""

    launches: list[Launch]
    """Of all rounds but the last."""
    indices: torch.Tensor
    """(B, H, G, C) int32, filled by the launches: the selection, or candidates in bank order, -1 where unused."""
    final: bool
    """Whether `indices` is the selection itself, so that there is no last round."""
    means: torch.Tensor | None = None
    """The group means (B, G, H, D) float32, against which the last round scores the candidates."""


def plan_shortlist(q: torch.Tensor, descriptors: torch.Tensor, top_k: int, geometry: Geometry) -> Shortlist:
    """All rounds of a selection that come before the last one. See `select_blocks`."""
    bank = described_bank(descriptors, geometry.memory_frames, geometry.memory_slots, geometry.blocks_per_frame)
    if geometry.query_group == 1:
        launch, indices = plan_select_rows(q, bank, top_k)
        return Shortlist([launch], indices, final=True)
    batch, length, heads, head_dim = q.shape
    mean_launch, means = plan_block_means(q, geometry.query_group, frame_tokens=length, dtype=torch.float32)
    groups, blocks = means.shape[1], bank.frames * bank.blocks_per_frame
    top_k = min(top_k, blocks)
    spans = triton.cdiv(blocks, SPAN_BLOCKS)
    if spans > 1 and (2 * top_k > SPAN_BLOCKS or merge_config(spans * top_k) is None):
        launch, indices = plan_select_rows(means, bank, top_k)  # registers do not hold so many candidates
        return Shortlist([mean_launch, launch], indices, final=True)
    indices = torch.empty((batch, heads, groups, spans * top_k), dtype=torch.int32, device=q.device)
    tiles, options = span_config()
    arguments = dict(
        means=strided(means),
        bank=bank,
        indices=indices,
        groups=groups,
        top_k=top_k,
        spans=spans,
        HEADS_PER_KV_HEAD=heads // descriptors.shape[2],
        HEAD_DIM=head_dim,
        BY_GROUP=differs_by_group(geometry.memory_frames),
        **tiles,
    )
    grid = (triton.cdiv(groups, tiles["ROWS"]) * spans if top_k else 0, heads, batch)
    return Shortlist([mean_launch, Launch(span_kernel, grid, arguments, options)], indices, spans <= 1, means)


def plan_select(
    q: torch.Tensor, descriptors: torch.Tensor, top_k: int, geometry: Geometry
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that fill the indices, in order, and the indices. See `select_blocks`."""
    first = plan_shortlist(q, descriptors, top_k, geometry)
    if first.final or first.means is None:
        return first.launches, first.indices
    batch, heads, groups, candidates = first.indices.shape
    bank = described_bank(descriptors, None, geometry.memory_slots, geometry.blocks_per_frame)
    top_k = min(top_k, bank.frames * bank.blocks_per_frame)
    indices = torch.empty((batch, heads, groups, top_k), dtype=torch.int32, device=q.device)
    head_dim = q.shape[-1]
    tiles, options = merge_config(candidates) or ({}, {})
    arguments = dict(
        means=strided(first.means),
        bank=bank,
        candidates=first.indices,
        indices=indices,
        groups=groups,
        top_k=top_k,
        candidate_count=candidates,
        HEADS_PER_KV_HEAD=heads // descriptors.shape[2],
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        **tiles,
    )
    return [*first.launches, Launch(merge_kernel, (groups, heads, batch), arguments, options)], indices


def select_blocks(q: torch.Tensor, descriptors: torch.Tensor, top_k: int, geometry: Geometry) -> torch.Tensor:
    """The `top_k` blocks of the bank with the highest scores, for every batch element, query head and query group.

    q (B, Lq, H, D); descriptors (B, stored blocks, Hkv, D); last dimensions contiguous. Of the geometry the sizes, the
    slot table and the number of valid frames count.
    -> (B, H, G, K) int32, K = min(top_k, blocks of the bank): indices in bank order, ascending, then -1. The score is
    the float32 mean of the group's queries times the descriptor, accumulated in float32. Equal scores go to the lower
    index, -0 equals +0, and NaN ranks below -inf. The host reads nothing back.
    """
    launches, indices = plan_select(q, descriptors, top_k, geometry)
    run_all(launches)
    return indices
