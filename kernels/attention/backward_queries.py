"""The gradient of the queries: the forward kernel's walk over the same keys, under the final LSE, without a softmax."""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.attention.blocks import (
    bank_place,
    heads_of_lists,
    plan_union,
    used_entries,
    used_entries_of_rows,
)
from memflow_ops.kernels.attention.forward import strides_of
from memflow_ops.kernels.configs import BACKWARD_QUERIES_TILES, attend_config, capability_of
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import LOG2_E, cast, load_rows, matmul


# Bytes: out and its gradient once; bound by memory.
@triton.jit
def row_terms_kernel(
    grad_out,  # (B, Lq, H, D)
    out,  # (B, Lq, H, D)
    lse,  # (B, H, Lq) float32, natural logarithm, over all keys
    grad_lse,  # (B, H, Lq) float32, or None: 0
    terms,  # (B, H, Lq) int64, contiguous
    grad_strides,  # (B, L, H), in elements
    out_strides,
    lse_strides,  # (B, H, L)
    grad_lse_strides,
    queries,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write what a row takes part with, in one integer, so that it is read at once: see load_terms.

    The high half is delta, the low half the LSE in base 2, infinite for a row without a key: its weights are 0.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < queries
    rows = rows.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, DIM)
    grad_rows = grad_out + batch * grad_strides[0] + rows * grad_strides[1] + head * grad_strides[2]
    out_rows = out + batch * out_strides[0] + rows * out_strides[1] + head * out_strides[2]
    grad = load_rows(grad_rows, row_mask, columns, HEAD_DIM).to(tl.float32)
    delta = tl.sum(grad * load_rows(out_rows, row_mask, columns, HEAD_DIM).to(tl.float32), 1)
    if grad_lse is not None:
        grad_lse += batch * grad_lse_strides[0] + head * grad_lse_strides[1]
        delta -= tl.load(grad_lse + rows * grad_lse_strides[2], mask=row_mask, other=0.0)
    lse += batch * lse_strides[0] + head * lse_strides[1]
    row_lse = tl.load(lse + rows * lse_strides[2], mask=row_mask, other=0.0) * LOG2_E
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse)
    low = row_lse.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    high = delta.to(tl.int32, bitcast=True).to(tl.int64) << 32
    tl.store(terms + (batch * tl.num_programs(1) + head) * queries + rows, high | low, mask=row_mask)


@triton.jit
def load_terms(term_rows, row_mask):
    """LSE in base 2 and delta of rows (pointers); a masked row is as one without a key."""
    terms = tl.load(term_rows, mask=row_mask, other=0x7F800000)
    return terms.to(tl.int32).to(tl.float32, bitcast=True), (terms >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def queries_tile(
    query,  # [BLOCK_M, DIM]
    grad,  # [BLOCK_M, DIM] of out
    lse,  # [BLOCK_M] of load_terms
    delta,  # [BLOCK_M]
    key,  # [BLOCK_N, DIM], 0 where there is none
    value,
    present,  # [BLOCK_N] false: there is no such key
    ragged,  # scalar: whether any is false
    wanted,  # [BLOCK_M] false: this row does not attend to the tile; or None: all rows do
    scale_log2,
    grad_query,  # [BLOCK_M, DIM], not yet times the softmax scale
    GUARD: tl.constexpr,
):
    """Add one tile of keys to the queries' gradient. GUARD: as in attend_tile."""
    zeros = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    scores = matmul(query, tl.trans(key), zeros)
    slopes = matmul(grad, tl.trans(value), zeros) - delta[:, None]
    if wanted is not None:
        lse = tl.where(wanted, lse, float("inf"))
    grad_scores = tl.math.exp2(scores * scale_log2 - lse[:, None]) * slopes
    if ragged:
        grad_scores = tl.where(present[None, :], grad_scores, 0.0)
    if GUARD:
        grad_scores = tl.where(wanted[:, None], grad_scores, 0.0)
    after = matmul(cast(grad_scores, key.dtype), key, grad_query)
    if GUARD:
        after = tl.where(wanted[:, None], after, grad_query)
    return after


@triton.jit
def queries_list(
    query, grad, lse, delta, k, v, k_stride, v_stride, indices, used, blocks, blocks_per_frame, frame_tokens,
    memory_slots, physical_frames, scale_log2, grad_query,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the first `used` blocks of a list that all rows share; walks as attend_list does."""
    columns = tl.arange(0, DIM)
    lanes = tl.arange(0, BLOCK_N)
    shared: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
    offset = 0 if shared else lanes
    end = used * BLOCK_SIZE
    index = tl.load(indices + offset // BLOCK_SIZE, mask=offset < end, other=-1)
    slot, start, length = bank_place(
        index, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
    )
    offset += BLOCK_N
    index = tl.load(indices + offset // BLOCK_SIZE, mask=offset < end, other=-1)
    for first in range(0, end, BLOCK_N):
        if shared:
            part = first % BLOCK_SIZE
            present = part + lanes < length
            ragged = part + BLOCK_N > length
        else:
            part = (first + lanes) % BLOCK_SIZE
            present = part < length
            ragged = True
        token = slot.to(tl.int64) * frame_tokens + start + part
        within = 0 if not shared else lanes.to(tl.int64)
        key = load_rows(k + token * k_stride + within * k_stride, present, columns, HEAD_DIM)  # [BLOCK_N, DIM]
        value = load_rows(v + token * v_stride + within * v_stride, present, columns, HEAD_DIM)
        grad_query = queries_tile(
            query, grad, lse, delta, key, value, present, ragged, None, scale_log2, grad_query, False
        )
        slot, start, length = bank_place(
            index, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
        )
        offset += BLOCK_N
        index = tl.load(indices + offset // BLOCK_SIZE, mask=offset < end, other=-1)
    return grad_query


@triton.jit
def queries_union(
    query, grad, lse, delta, k, v, k_stride, v_stride, lists, row_mask, entries, union, size, blocks,
    blocks_per_frame, frame_tokens, memory_slots, physical_frames, scale_log2, grad_query,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GUARD: tl.constexpr,
):  # fmt: skip
    """Add the blocks of each row's own list, all rows together walking over the union of the lists as attend_union."""
    PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    columns = tl.arange(0, DIM)
    lanes = tl.arange(0, BLOCK_N)
    used = used_entries_of_rows(lists, row_mask, entries, blocks, BLOCK_M)
    cursor = tl.zeros([BLOCK_M], tl.int32)
    heads = heads_of_lists(lists, cursor, used, blocks)
    index = tl.load(union, mask=size > 0, other=-1)
    slot, start, length = bank_place(
        index, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
    )
    wanted = heads == index
    index = tl.load(union + 1 // PARTS, mask=size * PARTS > 1, other=-1)
    for step in range(size * PARTS):
        part = step % PARTS * BLOCK_N
        present = part + lanes < length
        token = slot.to(tl.int64) * frame_tokens + start + part
        within = lanes.to(tl.int64)
        key = load_rows(k + token * k_stride + within * k_stride, present, columns, HEAD_DIM)  # [BLOCK_N, DIM]
        value = load_rows(v + token * v_stride + within * v_stride, present, columns, HEAD_DIM)
        grad_query = queries_tile(
            query, grad, lse, delta, key, value, present, part + BLOCK_N > length, wanted, scale_log2, grad_query,
            GUARD,
        )  # fmt: skip
        last_part = step % PARTS == PARTS - 1
        cursor += (wanted & last_part).to(tl.int32)
        heads = heads_of_lists(lists, cursor, used, blocks)
        wanted = heads == index
        slot, start, length = bank_place(
            index, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
        )
        index = tl.load(union + (step + 2) // PARTS, mask=step + 2 < size * PARTS, other=-1)
    return grad_query


# FLOPs: 6 * D * H * (Lq * Lk + the sum over query tiles of the keys that they walk over). Bytes: q, its gradient and
# that of out, and k, v of the segments once per query tile (from L2, mostly). Bound by the tensor cores.
@triton.jit
def backward_queries_kernel(
    grad_out,  # (B, Lq, H, D)
    q,  # (B, Lq, H, D)
    k,  # (B, Lk, Hkv, D), or None: no dense segment
    v,
    memory_k,  # (B, physical frames * frame_tokens, Hkv, D), or None: no bank
    memory_v,
    memory_slots,  # (B, F) int32, or None: identity
    indices,  # (B, H, G, K) int32
    unions,  # (B, H, tiles, BLOCK_M * K) int32 of union_kernel, or None: the rows of a tile share a selection
    union_sizes,  # (B, H, tiles) int32
    terms,  # (B, H, Lq) int64 of row_terms_kernel
    grad_q,  # (B, Lq, H, D)
    grad_out_strides,  # (B, L, H) of each tensor, in elements; their last dimension is contiguous. None: those of q
    q_strides,
    k_strides,
    v_strides,  # None: those of k
    memory_k_strides,
    memory_v_strides,  # None: those of memory_k
    slot_stride,
    index_strides,  # (B, H, G)
    grad_q_strides,
    queries,
    keys,
    frames,
    physical_frames,
    frame_tokens,
    query_group,
    entries,  # K
    softmax_scale,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM rounded up to a power of two
):
    tile = tl.program_id(0)
    if unions is None:
        # A tile of queries belongs to one group, because a group shares its selection.
        tiles_per_group = tl.cdiv(query_group, BLOCK_M)
        group = tile // tiles_per_group
        offset = (tile - group * tiles_per_group) * BLOCK_M + tl.arange(0, BLOCK_M)
        rows = group * query_group + offset
        row_mask = (offset < query_group) & (rows < queries)
    else:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < queries
        group = rows // query_group
    rows = rows.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, DIM)
    scale_log2 = softmax_scale * LOG2_E
    if grad_out_strides is None:
        grad_out_strides = q_strides

    query_rows = q + batch * q_strides[0] + rows * q_strides[1] + head * q_strides[2]
    query = load_rows(query_rows, row_mask, columns, HEAD_DIM)  # [BLOCK_M, DIM]
    grad_rows = grad_out + batch * grad_out_strides[0] + rows * grad_out_strides[1] + head * grad_out_strides[2]
    grad = load_rows(grad_rows, row_mask, columns, HEAD_DIM)
    row_lse, row_delta = load_terms(terms + (batch * tl.num_programs(1) + head) * queries + rows, row_mask)
    grad_query = tl.zeros([BLOCK_M, DIM], tl.float32)

    if memory_k is not None:
        memory_k += batch * memory_k_strides[0] + kv_head * memory_k_strides[2]
        if memory_v_strides is None:
            memory_v_strides = memory_k_strides
        memory_v += batch * memory_v_strides[0] + kv_head * memory_v_strides[2]
        indices += batch * index_strides[0] + head * index_strides[1] + group.to(tl.int64) * index_strides[2]
        if memory_slots is not None:
            memory_slots += batch * slot_stride
        blocks_per_frame = tl.cdiv(frame_tokens, BLOCK_SIZE)
        blocks = frames * blocks_per_frame
        if unions is None:
            used = used_entries(indices, entries, blocks, 32)
            grad_query = queries_list(
                query, grad, row_lse, row_delta, memory_k, memory_v, memory_k_strides[1], memory_v_strides[1],
                indices, used, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, scale_log2,
                grad_query, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N,
            )  # fmt: skip
        else:
            place = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tile
            unions += place * BLOCK_M * entries
            size = tl.load(union_sizes + place)
            grad_query = queries_union(
                query, grad, row_lse, row_delta, memory_k, memory_v, memory_k_strides[1], memory_v_strides[1],
                indices, row_mask, entries, unions, size, blocks, blocks_per_frame, frame_tokens, memory_slots,
                physical_frames, scale_log2, grad_query, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            if tl.max((grad_query != grad_query).to(tl.int32)) > 0:
                # A key that is not finite reached rows that did not choose it. Rare: once more, with care.
                grad_query = queries_union(
                    query, grad, row_lse, row_delta, memory_k, memory_v, memory_k_strides[1], memory_v_strides[1],
                    indices, row_mask, entries, unions, size, blocks, blocks_per_frame, frame_tokens, memory_slots,
                    physical_frames, scale_log2, tl.zeros([BLOCK_M, DIM], tl.float32), HEAD_DIM, DIM, BLOCK_SIZE,
                    BLOCK_M, BLOCK_N, True,
                )  # fmt: skip

    if k is not None:
        k += batch * k_strides[0] + kv_head * k_strides[2]
        if v_strides is None:
            v_strides = k_strides
        v += batch * v_strides[0] + kv_head * v_strides[2]
        for first in range(0, keys, BLOCK_N):
            lanes = tl.arange(0, BLOCK_N)
            token = tl.zeros([], tl.int64) + first
            present = first + lanes < keys
            rows_of_k = k + token * k_strides[1] + lanes.to(tl.int64) * k_strides[1]
            rows_of_v = v + token * v_strides[1] + lanes.to(tl.int64) * v_strides[1]
            grad_query = queries_tile(
                query, grad, row_lse, row_delta, load_rows(rows_of_k, present, columns, HEAD_DIM),
                load_rows(rows_of_v, present, columns, HEAD_DIM), present, first + BLOCK_N > keys, None, scale_log2,
                grad_query, False,
            )  # fmt: skip

    grad_rows = grad_q + batch * grad_q_strides[0] + rows * grad_q_strides[1] + head * grad_q_strides[2]
    mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(
        grad_rows[:, None] + columns[None, :], cast(grad_query * softmax_scale, grad_q.dtype.element_ty), mask=mask
    )


def plan_row_terms(
    grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad_lse: torch.Tensor | None
) -> tuple[Launch, torch.Tensor]:
    """The launch that fills the terms (B, H, Lq) int64, with delta = rowsum(grad_out * out) - grad_lse, and these."""
    batch, queries, heads, head_dim = out.shape
    terms = torch.empty((batch, heads, queries), dtype=torch.int64, device=out.device)
    dim = triton.next_power_of_2(head_dim)
    rows = max(4096 // dim, 1)
    arguments = dict(
        grad_out=grad_out,
        out=out,
        lse=lse,
        grad_lse=grad_lse,
        terms=terms,
        grad_strides=strides_of(grad_out),
        out_strides=strides_of(out),
        lse_strides=strides_of(lse),
        grad_lse_strides=strides_of(grad_lse),
        queries=queries,
        HEAD_DIM=head_dim,
        DIM=dim,
        ROWS=rows,
    )
    options = dict(num_warps=4, num_stages=2)
    return Launch(row_terms_kernel, (triton.cdiv(queries, rows), heads, batch), arguments, options), terms


def plan_backward_queries(
    grad_out: torch.Tensor,
    terms: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor | None,
    memory_v: torch.Tensor | None,
    indices: torch.Tensor | None,
    *,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    memory_slots: torch.Tensor | None,
    capability: int | None = None,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that fill the gradient of q, in order, and that tensor. A segment without keys is None."""
    batch, queries, heads, head_dim = q.shape
    frames = physical_frames = blocks = entries = 0
    if memory_k is None or indices is None:
        query_group = max(queries, 1)  # full tiles
    else:
        physical_frames = memory_k.shape[1] // frame_tokens
        frames = physical_frames if memory_slots is None else memory_slots.shape[1]
        blocks, entries = frames * triton.cdiv(frame_tokens, block_size), indices.shape[-1]
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tiles, options, by_row = attend_config(
        capability or capability_of(q), q.dtype, head_dim, query_group, queries, BACKWARD_QUERIES_TILES
    )
    launches, unions, union_sizes = [], None, None
    if by_row and indices is not None:
        launch, unions, union_sizes = plan_union(indices, queries, query_group, blocks, tiles["BLOCK_M"])
        launches.append(launch)
    arguments = dict(
        grad_out=grad_out,
        q=q,
        k=k,
        v=v,
        memory_k=memory_k,
        memory_v=memory_v,
        memory_slots=memory_slots,
        indices=indices,
        unions=unions,
        union_sizes=union_sizes,
        terms=terms,
        grad_q=grad_q,
        grad_out_strides=strides_of(grad_out, q),
        q_strides=strides_of(q),
        k_strides=strides_of(k),
        v_strides=strides_of(v, k),
        memory_k_strides=strides_of(memory_k),
        memory_v_strides=strides_of(memory_v, memory_k),
        slot_stride=None if memory_slots is None else memory_slots.stride(0),
        index_strides=strides_of(indices),
        grad_q_strides=strides_of(grad_q),
        queries=queries,
        keys=0 if k is None else k.shape[1],
        frames=frames,
        physical_frames=physical_frames,
        frame_tokens=frame_tokens,
        query_group=query_group,
        entries=entries,
        softmax_scale=float(softmax_scale),
        HEADS_PER_KV_HEAD=heads // next((x.shape[2] for x in (k, memory_k) if x is not None), heads),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        **tiles,
    )
    groups = 1 if by_row else triton.cdiv(queries, query_group)
    tiles_of_group = triton.cdiv(queries if by_row else query_group, tiles["BLOCK_M"])
    launches.append(Launch(backward_queries_kernel, (groups * tiles_of_group, heads, batch), arguments, options))
    return launches, grad_q
