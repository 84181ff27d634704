"""The kernel of the forward pass: a dense segment and selected blocks of a memory bank in one softmax.

It can continue the softmax of another kernel over other keys (`resume`), and each row of queries can have blocks of its
own. plan.py decides what a launch does.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from memflow_ops.kernels.attention.blocks import (
    blocks_of,
    count_valid_keys,
    list_pointers,
    segment_of_head,
    tile_mask,
    union_of_tile,
    used_entries,
    walk_list,
    walk_union,
    walk_window,
)
from memflow_ops.kernels.attention.split import rows_of_tile, tile_and_split
from memflow_ops.kernels.primitives import (
    LN_2,
    LOG2_E,
    SoftmaxState,
    cast,
    initial_state,
    load_rows,
    lse_pointers,
    mask_if,
    matmul,
    online_softmax_update,
    row_pointers,
)


class ForwardRows(NamedTuple):
    """What attend_tile knows of its rows of queries."""

    query: Any
    """[BLOCK_M, DIM]"""
    scale_log2: Any
    """The scale of the scores times log2 e, above 0."""


@triton.jit
def attend_tile(
    rows,  # ForwardRows
    state,  # SoftmaxState
    key,
    value,
    present,
    ragged,
    wanted,
    GUARD: tl.constexpr,
):
    """Attend to one tile of keys, as a step of a walk (see blocks.py). Returns the softmax state after it.

    A row that does not want the tile has weights of 0. Yet 0 times a value that is not finite is NaN, and so is the
    weight of a score that is not finite: with GUARD such rows keep their state.
    """
    query = rows.query
    scores = matmul(query, tl.trans(key), tl.zeros([query.shape[0], key.shape[0]], tl.float32))
    if ragged:
        scores = tl.where(tile_mask(present), scores, float("-inf"))
    if GUARD:
        scores = tl.where(wanted[:, None], scores, float("-inf"))
    weights, correction, row_max, row_sum = online_softmax_update(
        scores, rows.scale_log2, wanted, state.row_max, state.row_sum
    )
    after = matmul(cast(weights, value.dtype), value, state.accumulator * correction[:, None])
    if GUARD:
        after = tl.where(wanted[:, None], after, state.accumulator)
    return SoftmaxState(row_max, row_sum, after)


@triton.jit
def load_queries(query_rows, row_mask, columns, HEAD_DIM: tl.constexpr, NEGATIVE_SCALE: tl.constexpr):
    """The queries [BLOCK_M, DIM] behind pointers [BLOCK_M], negated for a negative scale."""
    query = load_rows(query_rows, row_mask, columns, HEAD_DIM)
    if NEGATIVE_SCALE:
        query = cast(-query.to(tl.float32), query.dtype)  # the interpreter holds bfloat16 as bits
    return query


@triton.jit
def write_result(state, out, lse, batch, head, rows, row_mask, HEAD_DIM: tl.constexpr, DIM: tl.constexpr):
    """Write out and lse of the rows where row_mask says so. Returns both. A row without any key: out 0, lse -inf."""
    columns = tl.arange(0, DIM)
    row_sum_or_one = tl.where(state.row_sum == 0.0, 1.0, state.row_sum)
    out_rows = row_pointers(out, batch, rows, head)
    out_mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    normalised = state.accumulator / row_sum_or_one[:, None]
    tl.store(out_rows[:, None] + columns[None, :], cast(normalised, out.pointer.dtype.element_ty), mask=out_mask)
    row_lse = (state.row_max + tl.math.log2(row_sum_or_one)) * LN_2
    tl.store(lse_pointers(lse, batch, head, rows), row_lse, mask=row_mask)
    return normalised, row_lse


# FLOPs: 4 * D * H * (Lq * Lk, or with a causal mask the pairs that see each other, + the sum over query tiles of the
# keys of the bank that they walk over). Bytes: q, out and k, v of the segments once per query tile (from L2, mostly).
# Bound by the tensor cores.
@triton.jit
def attend_kernel(
    q,  # Strided (B, Lq, H, D)
    window_q,  # Strided (B, Lq, H, D): what attends to the window; None: q
    window,  # Segment (B, Lk, Hkv, D), or without keys
    seqused,  # (B,) int32, contiguous: how many leading keys of the window are valid; None: all
    memory,  # Segment (B, stored frames * frame_tokens, Hkv, D), or without keys: no bank
    frames,  # Frames of the bank, or None
    indices,  # Strided (B, H, G, K) int32: the selection
    unions,  # Unions of the tiles, or None: the rows of a tile share a selection
    resume,  # (out, lse) to continue, Strided (B, Lq, H, D) and (B, H, Lq) float32, or None: start afresh
    out,  # Strided (B, Lq, H, D)
    lse,  # Strided (B, H, Lq) float32, natural logarithm
    partial,  # PartialResults, or None: one program per tile
    queries,
    keys,  # Lk
    query_group,
    entries,  # K
    heads,
    softmax_scale,
    NEGATIVE_SCALE: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    SPLITS: tl.constexpr,  # programs per tile of the last wave
    CAUSAL: tl.constexpr,  # the window, see walk_window
):
    tile = tl.program_id(0)
    if partial is not None:
        tile, head, batch, split, splits = tile_and_split(partial, heads, SPLITS)
    group, rows, row_mask = rows_of_tile(tile, queries, query_group, unions is None, BLOCK_M)
    rows = rows.to(tl.int64)
    if partial is None:
        head = tl.program_id(1).to(tl.int64)
        batch = tl.program_id(2).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    columns = tl.arange(0, DIM)

    query_rows = row_pointers(q, batch, rows, head)
    if memory.k is not None:
        memory = segment_of_head(memory, batch, kv_head)
        lists = list_pointers(indices, batch, head, group)
        blocks = blocks_of(frames, batch, BLOCK_SIZE)

    query = load_queries(query_rows, row_mask, columns, HEAD_DIM, NEGATIVE_SCALE)
    # The softmax takes the maximum first, so its scale is above 0: the least for 0, and a sign goes to the query.
    query_tile = ForwardRows(query, tl.maximum(tl.abs(softmax_scale), 1.2e-38) * LOG2_E)
    continues = row_mask
    if partial is not None:
        continues = mask_if(split == 0, row_mask)  # only one program of the tile continues the other kernel's softmax
    state = initial_state(resume, batch, rows, head, continues, HEAD_DIM, BLOCK_M, DIM)

    if memory.k is not None:
        if unions is None:
            used = used_entries(lists, entries, blocks.count, 32)
            if partial is not None:
                first_entry = used * split // splits
                lists += first_entry
                used = used * (split + 1) // splits - first_entry
            state = walk_list(
                attend_tile, query_tile, state, memory, blocks, lists, used, columns, HEAD_DIM, BLOCK_SIZE, BLOCK_N
            )
        else:
            union, size = union_of_tile(unions, batch, head, tile, entries, BLOCK_M)
            state = walk_union(
                attend_tile, query_tile, state, memory, blocks, lists, row_mask, entries, union, size, columns,
                HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            if tl.max((state.accumulator != state.accumulator).to(tl.int32)) > 0:
                # A value that is not finite reached rows that did not choose it. This is rare: walk again with GUARD.
                state = initial_state(resume, batch, rows, head, row_mask, HEAD_DIM, BLOCK_M, DIM)
                state = walk_union(
                    attend_tile, query_tile, state, memory, blocks, lists, row_mask, entries, union, size, columns,
                    HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, True,
                )  # fmt: skip

    if window.k is not None:
        if window_q is not None:
            query_rows = row_pointers(window_q, batch, rows, head)
            query = load_queries(query_rows, row_mask, columns, HEAD_DIM, NEGATIVE_SCALE)
            query_tile = ForwardRows(query, query_tile.scale_log2)
        window = segment_of_head(window, batch, kv_head)
        state = walk_window(
            attend_tile, query_tile, state, window, count_valid_keys(seqused, batch, keys), rows, row_mask, queries,
            columns, HEAD_DIM, BLOCK_N, CAUSAL,
        )  # fmt: skip

    final = row_mask
    if partial is not None:
        final = mask_if(splits == 1, row_mask)
    normalised, row_lse = write_result(state, out, lse, batch, head, rows, final, HEAD_DIM, DIM)
    if partial is not None:
        part = mask_if(splits > 1, row_mask)
        partial_rows = (tl.program_id(0) - partial.whole_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        partial_tile = partial.out + partial_rows[:, None] * HEAD_DIM + columns[None, :]
        tl.store(partial_tile, normalised, mask=part[:, None] & (columns < HEAD_DIM)[None, :])
        tl.store(partial.lse + partial_rows, row_lse, mask=part)
