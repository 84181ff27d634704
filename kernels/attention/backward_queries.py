"""The gradient of the queries: the walk of the forward kernel over the same keys, under the final LSE."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.blocks import (
    Segment,
    blocks_of,
    count_valid_keys,
    frames_of,
    list_pointers,
    plan_unions,
    segment_of_head,
    tile_mask,
    union_of_tile,
    used_entries,
    valid_keys_of,
    walk_list,
    walk_union,
    walk_window,
)
from memflow_ops.kernels.attention.split import rows_of_tile
from memflow_ops.kernels.configs import BACKWARD_QUERIES_TILES, attend_config, capability_of
from memflow_ops.kernels.integers import cdiv, next_power_of_2
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import (
    LOG2_E,
    cast,
    load_rows,
    lse_pointers,
    matmul,
    row_pointers,
    strided,
    strides_like,
)


# Bytes: out and its gradient once; bound by memory.
@triton.jit
def row_terms_kernel(
    grad_out,  # Strided (B, Lq, H, D)
    out,  # Strided (B, Lq, H, D)
    lse,  # Strided (B, H, Lq) float32, natural logarithm, over all keys
    grad_lse,  # Strided (B, H, Lq) float32, or None: 0
    terms,  # (B, H, Lq) int64, contiguous
    queries,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Pack what the backward pass needs of each row into one integer, so that one load reads it: see load_terms.

    The high half is delta = rowsum(dO * O) - dLSE. The low half is the LSE in base 2, or infinity for a row without a
    key, whose weights are then 0.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < queries
    rows = rows.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, DIM)
    grad_rows = row_pointers(grad_out, batch, rows, head)
    out_rows = row_pointers(out, batch, rows, head)
    grad = load_rows(grad_rows, row_mask, columns, HEAD_DIM).to(tl.float32)
    delta = tl.sum(grad * load_rows(out_rows, row_mask, columns, HEAD_DIM).to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(lse_pointers(grad_lse, batch, head, rows), mask=row_mask, other=0.0)
    row_lse = tl.load(lse_pointers(lse, batch, head, rows), mask=row_mask, other=0.0) * LOG2_E
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    low = row_lse.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    high = delta.to(tl.int32, bitcast=True).to(tl.int64) << 32
    tl.store(terms + (batch * tl.num_programs(1) + head) * queries + rows, high | low, mask=row_mask)


@triton.jit
def load_terms(term_rows, row_mask):
    """LSE in base 2 and delta of rows (pointers). A masked row counts as one without a key."""
    terms = tl.load(term_rows, mask=row_mask, other=0x7F800000)
    return terms.to(tl.int32).to(tl.float32, bitcast=True), (terms >> 32).to(tl.int32).to(tl.float32, bitcast=True)


class BackwardRows(NamedTuple):
    """What queries_tile knows of its rows of queries."""

    query: Any
    """[BLOCK_M, DIM]"""
    grad: Any
    """[BLOCK_M, DIM], the gradient of out."""
    lse: Any
    """[BLOCK_M] in base 2, see load_terms."""
    delta: Any
    """[BLOCK_M]"""
    scale_log2: Any
    """The scale of the scores times log2 e."""


@triton.jit
def queries_tile(
    rows,  # BackwardRows
    grad_query,  # [BLOCK_M, DIM], not yet times the softmax scale
    key,
    value,
    present,
    ragged,
    wanted,
    GUARD: tl.constexpr,
):
    """Add one tile of keys to the gradient of the queries, as a step of a walk (see blocks.py)."""
    lse = rows.lse
    zeros = tl.zeros([rows.query.shape[0], key.shape[0]], tl.float32)
    scores = matmul(rows.query, tl.trans(key), zeros)
    slopes = matmul(rows.grad, tl.trans(value), zeros) - rows.delta[:, None]
    if wanted is not None:
        lse = tl.where(wanted, lse, float("inf"))
    grad_scores = tl.math.exp2(scores * rows.scale_log2 - lse[:, None]) * slopes
    if ragged:
        grad_scores = tl.where(tile_mask(present), grad_scores, 0.0)
    if GUARD:
        grad_scores = tl.where(wanted[:, None], grad_scores, 0.0)
    after = matmul(cast(grad_scores, key.dtype), key, grad_query)
    if GUARD:
        after = tl.where(wanted[:, None], after, grad_query)
    return after


# FLOPs: 6 * D * H * (Lq * Lk + the sum over query tiles of the keys that they walk over). Bytes: q, its gradient and
# that of out, and k, v of the segments once per query tile (from L2, mostly). Bound by the tensor cores.
@triton.jit
def backward_queries_kernel(
    grad_out,  # Strided (B, Lq, H, D), strides None: those of q
    q,  # Strided (B, Lq, H, D)
    window,  # Segment (B, Lk, Hkv, D), or without keys
    seqused,  # (B,) int32, contiguous: how many leading keys of the window are valid; None: all
    memory,  # Segment (B, stored frames * frame_tokens, Hkv, D), or without keys: no bank
    frames,  # Frames of the bank, or None
    indices,  # Strided (B, H, G, K) int32
    unions,  # Unions of the tiles, or None: the rows of a tile share a selection
    terms,  # (B, H, Lq) int64 of row_terms_kernel
    others,  # Strided (B, Lq, H, D) float32: the gradient that arrives over other keys, added to this; None: 0
    grad_q,  # Strided (B, Lq, H, D)
    queries,
    keys,  # Lk
    query_group,
    entries,  # K
    softmax_scale,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    CAUSAL: tl.constexpr,  # the window, see walk_window
):
    tile = tl.program_id(0)
    group, rows, row_mask = rows_of_tile(tile, queries, query_group, unions is None, BLOCK_M)
    rows = rows.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, DIM)

    query = load_rows(row_pointers(q, batch, rows, head), row_mask, columns, HEAD_DIM)  # [BLOCK_M, DIM]
    grad = load_rows(row_pointers(strides_like(grad_out, q), batch, rows, head), row_mask, columns, HEAD_DIM)
    row_lse, row_delta = load_terms(terms + (batch * tl.num_programs(1) + head) * queries + rows, row_mask)
    query_tile = BackwardRows(query, grad, row_lse, row_delta, softmax_scale * LOG2_E)
    grad_query = tl.zeros([BLOCK_M, DIM], tl.float32)

    if memory.k is not None:
        memory = segment_of_head(memory, batch, kv_head)
        lists = list_pointers(indices, batch, head, group)
        blocks = blocks_of(frames, batch, BLOCK_SIZE)
        if unions is None:
            used = used_entries(lists, entries, blocks.count, 32)
            grad_query = walk_list(
                queries_tile, query_tile, grad_query, memory, blocks, lists, used, columns, HEAD_DIM, BLOCK_SIZE,
                BLOCK_N,
            )  # fmt: skip
        else:
            union, size = union_of_tile(unions, batch, head, tile, entries, BLOCK_M)
            grad_query = walk_union(
                queries_tile, query_tile, grad_query, memory, blocks, lists, row_mask, entries, union, size, columns,
                HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            if tl.max((grad_query != grad_query).to(tl.int32)) > 0:
                # A key that is not finite reached rows that did not choose it. This is rare: walk again with GUARD.
                grad_query = tl.zeros([BLOCK_M, DIM], tl.float32)
                grad_query = walk_union(
                    queries_tile, query_tile, grad_query, memory, blocks, lists, row_mask, entries, union, size,
                    columns, HEAD_DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, True,
                )  # fmt: skip

    if window.k is not None:
        window = segment_of_head(window, batch, kv_head)
        grad_query = walk_window(
            queries_tile, query_tile, grad_query, window, count_valid_keys(seqused, batch, keys), rows, row_mask,
            queries, columns, HEAD_DIM, BLOCK_N, CAUSAL,
        )  # fmt: skip

    grad_rows = row_pointers(grad_q, batch, rows, head)
    mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    grad_query *= softmax_scale
    if others is not None:
        grad_query += load_rows(row_pointers(others, batch, rows, head), row_mask, columns, HEAD_DIM)
    tl.store(grad_rows[:, None] + columns[None, :], cast(grad_query, grad_q.pointer.dtype.element_ty), mask=mask)


def plan_row_terms(
    grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor | None
) -> tuple[Launch, torch.Tensor]:
    """The launch that fills the terms (B, H, Lq) int64 of row_terms_kernel, and the terms."""
    batch, queries, heads, head_dim = out.shape
    terms = torch.empty((batch, heads, queries), dtype=torch.int64, device=out.device)
    dim = next_power_of_2(head_dim)
    rows = max(4096 // dim, 1)
    arguments = dict(
        grad_out=strided(grad_out),
        out=strided(out),
        lse=strided(lse),
        grad_lse=None if grad_lse is None else strided(grad_lse),
        terms=terms,
        queries=queries,
        HEAD_DIM=head_dim,
        DIM=dim,
        ROWS=rows,
    )
    options = dict(num_warps=4, num_stages=2)
    return Launch(row_terms_kernel, (cdiv(queries, rows), heads, batch), arguments, options), terms


def plan_backward_queries(
    grad_out: torch.Tensor,
    terms: torch.Tensor,
    q: torch.Tensor,
    window: Segment,
    memory: Segment,
    indices: torch.Tensor | None,
    geometry: Geometry,
    *,
    capability: int | None = None,
    others: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that fill the gradient of q, in order, and that gradient.

    others: a gradient (B, Lq, H, D) in float32 over other keys, added to it. out_dtype: None: that of q.
    """
    batch, queries, heads, head_dim = q.shape
    if memory.k is None or indices is None:
        frames = indices = None
        entries = blocks = 0
        query_group = max(queries, 1)  # one group makes full tiles
    else:
        frames, entries = frames_of(memory.k, geometry), indices.shape[-1]
        blocks, query_group = geometry.bank_blocks(frames.stored), geometry.query_group
    tiles, options, by_row = attend_config(
        capability or capability_of(q), q.dtype, head_dim, query_group, queries, BACKWARD_QUERIES_TILES
    )
    if indices is not None and window.k is not None and by_row and geometry.block_size < tiles["BLOCK_N"]:
        # As in the forward pass: in one launch ptxas for sm_90 lets every product wait for the one before (C7515).
        first, others = plan_backward_queries(
            grad_out, terms, q, Segment(), memory, indices, geometry,
            capability=capability, others=others, out_dtype=torch.float32,
        )  # fmt: skip
        then, grad_q = plan_backward_queries(
            grad_out, terms, q, window, Segment(), None, geometry, capability=capability, others=others
        )
        return [*first, *then], grad_q
    grad_q = torch.empty(q.shape, dtype=out_dtype or q.dtype, device=q.device)
    launches, unions = [], None
    if by_row and indices is not None:
        launch, unions = plan_unions(indices, queries, query_group, blocks, tiles["BLOCK_M"])
        launches.append(launch)
    arguments = dict(
        grad_out=strided(grad_out, like=q),
        q=strided(q),
        window=window,
        seqused=None if window.k is None else valid_keys_of(geometry),
        memory=memory,
        frames=frames,
        indices=None if indices is None else strided(indices),
        unions=unions,
        terms=terms,
        others=None if others is None else strided(others),
        grad_q=strided(grad_q),
        queries=queries,
        keys=0 if window.k is None else geometry.window_keys(window.k),
        query_group=query_group,
        entries=entries,
        softmax_scale=float(geometry.softmax_scale),
        HEADS_PER_KV_HEAD=heads // next((part.k.shape[2] for part in (window, memory) if part.k is not None), heads),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=geometry.block_size,
        CAUSAL=geometry.causal,
        **tiles,
    )
    groups = 1 if by_row else cdiv(queries, query_group)
    tiles_of_group = cdiv(queries if by_row else query_group, tiles["BLOCK_M"])
    launches.append(Launch(backward_queries_kernel, (groups * tiles_of_group, heads, batch), arguments, options))
    return launches, grad_q
