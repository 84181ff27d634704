"""Selection for query groups: the top-k blocks of the bank for each group, exactly.

There are few groups, so the keys of a whole span of the bank fit in registers, and one reading of the descriptors is
enough: the k-th highest key is found bit by bit, then the blocks above it and the first blocks equal to it are written
down. A large bank is a tournament: each span writes down its own k best blocks with their keys, and a second launch
takes the k best of these candidates, which are in the order of the bank. A score is computed once, so that both rounds
rank the same numbers; of all scores only those of the candidates reach memory.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.configs import SPAN_BLOCKS, merge_config, span_config
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch, run_all
from memflow_ops.kernels.primitives import row_pointers, strided
from memflow_ops.kernels.selection.describe import plan_block_means
from memflow_ops.kernels.selection.normalised import normalised_scores, plan_parts
from memflow_ops.kernels.selection.ranking import fill_unused, place_top_k, sortable_key
from memflow_ops.kernels.selection.rows import plan_select_rows
from memflow_ops.kernels.selection.scores import (
    add_length,
    choosable,
    described_bank,
    descriptor_pointers,
    descriptors_of_head,
    differs_by_group,
    score_tile,
    valid_blocks_of_rows,
)


@triton.jit
def write_blocks(chosen, row_mask, places, taken, top_k, blocks, block_rows, keys, key_rows):
    """Write the chosen blocks [1 or ROWS, COLUMNS] of each row at their places in its list, then -1.

    chosen, places [ROWS, COLUMNS] and taken [ROWS]: of place_top_k; block_rows [ROWS]: pointers to the lists; key_rows:
    likewise for the keys [ROWS, COLUMNS] of the blocks, 0 where there is no block; or None: they are not wanted.
    """
    mask = chosen & row_mask[:, None]
    tl.store(block_rows[:, None] + places, blocks, mask=mask)
    fill_unused(block_rows, row_mask, taken, top_k, -1)
    if key_rows is not None:
        tl.store(key_rows[:, None] + places, keys.to(tl.int32, bitcast=True), mask=mask)
        fill_unused(key_rows, row_mask, taken, top_k, 0)


# FLOPs: 2 * G * N * D. Bytes: the group means, the descriptors once per 16 groups (from L2), k blocks and keys a span.
@triton.jit
def span_kernel(
    means,  # Strided (B, G, H, D) float32
    bank,  # DescribedBank
    indices,  # (B, H, G, spans * K) int32, contiguous
    candidate_keys,  # their keys, likewise; None where there is one span: then the indices are the selection
    parts,  # Parts: means are of the parts of groups, and scores normalised; None: means are of groups
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
    descriptors = descriptors_of_head(bank, batch, head // HEADS_PER_KV_HEAD)
    blocks = span * COLUMNS + tl.arange(0, COLUMNS)
    valid_blocks, each = valid_blocks_of_rows(bank, batch, rows, row_mask, BY_GROUP)
    valid = blocks < valid_blocks
    if parts is None:
        mean_rows = row_pointers(means, batch, rows.to(tl.int64), head)
        pointers = descriptor_pointers(descriptors, blocks, valid)
        scores = score_tile(None, mean_rows, row_mask, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
        scores = add_length(scores, descriptors, blocks[None, :])
    else:
        scores = normalised_scores(
            means, parts, descriptors, batch, head, tl.num_programs(1), rows, row_mask, blocks, valid,
            ROWS, COLUMNS, HEAD_DIM, DIM_TILE,
        )  # fmt: skip
    keys = tl.where(choosable(blocks, each, BY_GROUP), sortable_key(scores), 0).to(tl.uint32)
    chosen, places, taken = place_top_k(keys, top_k)
    offsets = (((batch * tl.num_programs(1) + head) * groups + rows) * spans + span) * top_k
    key_rows = candidate_keys
    if key_rows is not None:
        key_rows += offsets
    write_blocks(chosen, row_mask, places, taken, top_k, blocks[None, :], indices + offsets, keys, key_rows)


# FLOPs: none. Bytes: the candidates and their keys once, k indices per group. Bound by latency: each bit is a count.
@triton.jit
def merge_kernel(
    candidates,  # (B, H, G, C) int32, contiguous: blocks in bank order, -1 where unused
    candidate_keys,  # (B, H, G, C) int32, contiguous: the bits of their keys, 0 where unused
    indices,  # (B, H, G, K) int32, contiguous
    top_k,
    candidate_count,  # C
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    columns = tl.arange(0, COLUMNS)
    valid = (columns < candidate_count)[None, :]
    offsets = row[:, None] * candidate_count + columns[None, :]
    keys = tl.load(candidate_keys + offsets, mask=valid, other=0).to(tl.uint32, bitcast=True)
    blocks = tl.load(candidates + offsets, mask=valid, other=-1)
    chosen, places, taken = place_top_k(keys, top_k)
    write_blocks(chosen, row >= 0, places, taken, top_k, blocks, indices + row * top_k, keys, None)


def plan_select(
    q: torch.Tensor, descriptors: torch.Tensor, top_k: int, geometry: Geometry
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that fill the indices, in order, and the indices. See `select_blocks`."""
    bank = described_bank(descriptors, geometry)
    if geometry.query_group == 1 and geometry.score == "mean":
        launch, indices = plan_select_rows(q, bank, top_k)
        return [launch], indices
    batch, queries, heads, _ = q.shape
    parts = None
    if geometry.parts > 1:
        launches, means, parts = plan_parts(q, bank, descriptors.shape[2], geometry)
    else:
        launch, means = plan_features(q, geometry)
        launches = [launch]
    if geometry.query_group == 1:
        # The squares of queries do not fit in their dtype, so that these rows are not for the tensor cores.
        launch, indices = plan_select_rows(means, bank, top_k)
        return [*launches, launch], indices
    groups, blocks = geometry.query_groups(queries), bank.frames * bank.blocks_per_frame
    top_k = min(top_k, blocks)
    spans, merging = cdiv(blocks, SPAN_BLOCKS), merge_config(cdiv(blocks, SPAN_BLOCKS) * top_k)
    if not takes_spans(blocks, top_k):
        assert parts is None, "the caller asks takes_spans before it ranks by parts"
        launch, indices = plan_select_rows(means, bank, top_k)
        return [*launches, launch], indices
    indices = torch.empty((batch, heads, groups, top_k), dtype=torch.int32, device=q.device)
    candidates, candidate_keys = indices, None
    if spans > 1:
        candidates = indices.new_empty((batch, heads, groups, spans * top_k))
        candidate_keys = torch.empty_like(candidates)
    tiles, options = span_config()
    arguments = dict(
        means=strided(means),
        bank=bank,
        indices=candidates,
        candidate_keys=candidate_keys,
        parts=parts,
        groups=groups,
        top_k=top_k,
        spans=spans,
        HEADS_PER_KV_HEAD=heads // descriptors.shape[2],
        HEAD_DIM=means.shape[-1],
        BY_GROUP=differs_by_group(geometry.memory_frames),
        **tiles,
    )
    grid = (cdiv(groups, tiles["ROWS"]) * spans if top_k else 0, heads, batch)
    launches.append(Launch(span_kernel, grid, arguments, options))
    if spans > 1 and merging is not None:
        tiles, options = merging
        arguments = dict(
            candidates=candidates,
            candidate_keys=candidate_keys,
            indices=indices,
            top_k=top_k,
            candidate_count=spans * top_k,
            **tiles,
        )
        launches.append(Launch(merge_kernel, (batch * heads * groups, 1, 1), arguments, options))
    return launches, indices


def takes_spans(blocks: int, top_k: int) -> bool:
    """Whether registers hold the candidates of groups that choose top_k of so many blocks."""
    spans, top_k = cdiv(blocks, SPAN_BLOCKS), min(top_k, blocks)
    return spans <= 1 or (2 * top_k <= SPAN_BLOCKS and merge_config(spans * top_k) is not None)


def plan_features(q: torch.Tensor, geometry: Geometry) -> tuple[Launch, torch.Tensor]:
    """The launch that fills what descriptors are multiplied with, and this: (B, G, H, D) float32, the group means.

    With the other scores it is (B, G, H, 2 D): means times the scale s, means of squares times s^2 / 2.
    """
    scale, length = geometry.softmax_scale, q.shape[1]
    if geometry.score == "mean":
        return plan_block_means(q, geometry.query_group, length, torch.float32)
    return plan_block_means(q, geometry.query_group, length, torch.float32, "square", (scale, scale**2 / 2))


def select_blocks(q: torch.Tensor, descriptors: torch.Tensor, top_k: int, geometry: Geometry) -> torch.Tensor:
    """The `top_k` blocks of the bank with the highest scores, for every batch element, query head and query group.

    q (B, Lq, H, D); descriptors (B, stored blocks, Hkv, D), but for "mean" of width 2 D; last dimensions contiguous.
    Of the geometry the sizes, the slot table and the number of valid frames count, and the scale but for "mean".
    -> (B, H, G, K) int32, K = min(top_k, blocks of the bank): indices in bank order, ascending, then -1. The score is
    the group's feature times the descriptor, accumulated in float32 (see `plan_features`). Equal scores go to the lower
    index, -0 equals +0, and NaN ranks below -inf. The host reads nothing back.
    """
    launches, indices = plan_select(q, descriptors, top_k, geometry)
    run_all(launches)
    return indices
