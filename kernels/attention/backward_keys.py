"""The gradients of keys and values: one program per block of keys, which visits all queries that attended to it.

Every block belongs to one program, so sums have one order and need no atomics, and a block that nobody selected gets
zeros. A block that many groups selected keeps its program busy longer than others. Its neighbours fill the machine
meanwhile; the cost of the imbalance is the time after most programs have finished.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.backward_queries import load_terms
from memflow_ops.kernels.attention.blocks import (
    Blocks,
    Segment,
    count_valid_keys,
    locate_block,
    segment_of_head,
    stored_tokens,
    valid_keys_of,
)
from memflow_ops.kernels.attention.inverse import Inverse
from memflow_ops.kernels.configs import backward_keys_config, capability_of
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import LOG2_E, cast, load_rows, mask_if, matmul, row_pointers, strided, strides_like


@triton.jit
def query_places(
    tile,
    count,  # of members
    members,  # pointer to the members of the block, see Inverse; or None: all queries of each query head
    query_group,
    queries,
    skipped,  # the first tiles of each member, which see none of the keys
    BLOCK_M: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Where the queries [BLOCK_M] of a tile are: head, first row, offset from it, and which of the queries exist.

    PACKED: the groups of the members follow one another without gaps, and each query has its own head and first row.
    Otherwise each group begins with a tile of its own, and head and first row are scalars.
    """
    lanes = tl.arange(0, BLOCK_M)
    if PACKED:
        places = tile * BLOCK_M + lanes
        entry = places // query_group
        offset = places - entry * query_group
        there = entry < count
        member = tl.load(members + entry, mask=there, other=0)
        first = (member & 0xFFFFFFFF).to(tl.int32)
    else:
        tiles_per_member = tl.cdiv(query_group, BLOCK_M) - skipped
        entry = tile // tiles_per_member
        start = (tile - entry * tiles_per_member + skipped) * BLOCK_M
        offset = lanes
        there = start + offset < query_group
        member = entry.to(tl.int64) << 32
        if members is not None:
            member = tl.load(members + entry)
        first = (member & 0xFFFFFFFF).to(tl.int32) + start
    return member >> 32, first.to(tl.int64), offset.to(tl.int64), there & (first + offset < queries)


# FLOPs: 8 * D for every query and key that attend to each other. Bytes: q and the gradient of out once per block that
# a query attends to (from L2, mostly), keys, values and their gradients once. Bound by the tensor cores.
@triton.jit
def backward_keys_kernel(
    grad_out,  # Strided (B, Lq, H, D), strides None: those of q
    q,  # Strided (B, Lq, H, D)
    segment,  # Segment (B, frames * frame_tokens, Hkv, D); of a window in stored frames: (B, stored tokens, Hkv, D)
    inverse,  # Inverse, or None: the segment is the window
    seqused,  # (B,) int32, contiguous: how many leading keys of the window are valid; None: all
    terms,  # (B, H, Lq) int64 of row_terms_kernel
    grad_k,  # Strided (B, frames * frame_tokens, Hkv, D), or None: not wanted
    grad_v,
    queries,
    blocks,
    frame_tokens,
    query_group,
    softmax_scale,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    PACKED: tl.constexpr,
    CAUSAL: tl.constexpr,  # key j is seen by the queries from j + queries - keys on
):
    PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // PARTS
    offsets = tl.program_id(0) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, DIM)
    scale_log2 = softmax_scale * LOG2_E
    grad_out = strides_like(grad_out, q)
    # Stored blocks, not those of the bank: the inverse names them, and a frame that no slot names gets zeros.
    stored = Blocks((), 0, frame_tokens, tl.cdiv(frame_tokens, BLOCK_SIZE), blocks)
    frame, start, length = locate_block(block, stored, BLOCK_SIZE)
    tokens = frame.to(tl.int64) * frame_tokens + start + offsets
    present = offsets < length

    count = HEADS_PER_KV_HEAD
    members = None
    if inverse is not None:
        number = (batch * tl.num_programs(1) + kv_head) * blocks + block
        begin = tl.load(inverse.starts + number)
        count = tl.load(inverse.starts + number + 1) - begin
        members = inverse.members + begin
    first_key = start + tl.program_id(0) % PARTS * BLOCK_N
    skipped = 0
    keys = frame_tokens
    if seqused is not None:
        keys = count_valid_keys(seqused, batch, frame_tokens)
    if CAUSAL:
        skipped = tl.minimum(tl.maximum(first_key + queries - keys, 0) // BLOCK_M, tl.cdiv(query_group, BLOCK_M))
    tiles = tl.cdiv(count * query_group, BLOCK_M) if PACKED else count * (tl.cdiv(query_group, BLOCK_M) - skipped)
    read = present
    if seqused is not None:
        tiles = tl.where(first_key < keys, tiles, 0)
        read = read & (tokens < keys)
    read = mask_if(tiles > 0, read)  # what nobody attended to is not read
    segment = segment_of_head(segment, batch, kv_head)
    stored_rows = tokens
    if len(segment.frames) > 0:
        stored_rows = stored_tokens(segment.frames[0], tokens, read)
    key = load_rows(segment.k + stored_rows * segment.k_strides[1], read, columns, HEAD_DIM)  # [BLOCK_N, DIM]
    if grad_k is not None:
        value = load_rows(segment.v + stored_rows * segment.v_strides[1], read, columns, HEAD_DIM)
    first_head = kv_head * HEADS_PER_KV_HEAD if inverse is None else 0
    grad_key = tl.zeros([BLOCK_N, DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_N, DIM], tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    query_base = q.pointer + batch * q.strides[0]
    grad_base = grad_out.pointer + batch * grad_out.strides[0]
    terms += batch * tl.num_programs(1) * HEADS_PER_KV_HEAD * queries
    for tile in range(tiles):
        # What all lanes share is added first: it needs no registers per lane.
        head, first, offset, there = query_places(tile, count, members, query_group, queries, skipped, BLOCK_M, PACKED)
        head += first_head
        query_rows = query_base + head * q.strides[2] + first * q.strides[1] + offset * q.strides[1]
        query = load_rows(query_rows, there, columns, HEAD_DIM)  # [BLOCK_M, DIM]
        grad_rows = grad_base + head * grad_out.strides[2] + first * grad_out.strides[1] + offset * grad_out.strides[1]
        grad = load_rows(grad_rows, there, columns, HEAD_DIM)
        row_lse, row_delta = load_terms(terms + head * queries + first + offset, there)
        if grad_k is not None:  # both products before the rest: fewer registers
            slopes = matmul(value, tl.trans(grad), zeros - row_delta[None, :])
        scores = matmul(key, tl.trans(query), zeros) * scale_log2  # [BLOCK_N, BLOCK_M]
        weights = tl.math.exp2(scores - row_lse[None, :])
        if CAUSAL:
            shift = first.to(tl.int32) + keys - queries  # the last key that the first query sees
            sees = (tl.arange(0, BLOCK_N) - shift + first_key)[:, None] <= tl.arange(0, BLOCK_M)[None, :]
            weights = tl.where(sees, weights, 0.0)
        if grad_v is not None:
            grad_value = matmul(cast(weights, grad.dtype), grad, grad_value)
        if grad_k is not None:
            grad_key = matmul(cast(weights * slopes, query.dtype), query, grad_key)

    if seqused is not None and not CAUSAL:  # Keys that are not valid counted as zeros. A causal mask hides them.
        valid = (first_key + tl.arange(0, BLOCK_N) < count_valid_keys(seqused, batch, frame_tokens))[:, None]
        grad_key = tl.where(valid, grad_key, 0.0)
        grad_value = tl.where(valid, grad_value, 0.0)
    mask = present[:, None] & (columns < HEAD_DIM)[None, :]
    if grad_k is not None:
        grad_rows = row_pointers(grad_k, batch, tokens, kv_head)
        grad_key = cast(grad_key * softmax_scale, grad_k.pointer.dtype.element_ty)
        tl.store(grad_rows[:, None] + columns[None, :], grad_key, mask=mask)
    if grad_v is not None:
        grad_rows = row_pointers(grad_v, batch, tokens, kv_head)
        tl.store(grad_rows[:, None] + columns[None, :], cast(grad_value, grad_v.pointer.dtype.element_ty), mask=mask)


def plan_backward_keys(
    grad_out: torch.Tensor,
    terms: torch.Tensor,
    q: torch.Tensor,
    segment: Segment,
    inverse: Inverse | None,
    geometry: Geometry,
    wanted: tuple[bool, bool],
    *,
    capability: int | None = None,
) -> tuple[Launch, torch.Tensor | None, torch.Tensor | None]:
    """The launch that fills the gradients of k and v of the segment, and these tensors, None where not wanted.

    inverse: which groups selected which block; None: the segment is the window, whose gradients are (B, Lk, Hkv, D),
    wherever its keys are stored.
    """
    batch, queries, heads, head_dim = q.shape
    kv_heads = segment.k.shape[2]
    length = segment.k.shape[1] if inverse is not None else geometry.window_keys(segment.k)
    query_group, frame_tokens = (queries, length) if inverse is None else (geometry.query_group, geometry.frame_tokens)
    block_size = None if inverse is None else geometry.block_size
    tiles, options = backward_keys_config(capability or capability_of(q), q.dtype, head_dim, block_size, query_group)
    block_size = block_size or tiles["BLOCK_N"]
    blocks = length // frame_tokens * cdiv(frame_tokens, block_size)
    grad_k, grad_v = (
        torch.empty((batch, length, kv_heads, head_dim), dtype=x.dtype, device=x.device) if want else None
        for x, want in zip((segment.k, segment.v), wanted, strict=True)
    )
    arguments = dict(
        grad_out=strided(grad_out, like=q),
        q=strided(q),
        segment=segment,
        inverse=inverse,
        seqused=None if inverse is not None else valid_keys_of(geometry),
        terms=terms,
        grad_k=None if grad_k is None else strided(grad_k),
        grad_v=None if grad_v is None else strided(grad_v),
        queries=queries,
        blocks=blocks,
        frame_tokens=frame_tokens,
        query_group=query_group,
        softmax_scale=float(geometry.softmax_scale),
        HEADS_PER_KV_HEAD=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        CAUSAL=geometry.causal and inverse is None,
        **tiles,
    )
    parts = cdiv(block_size, tiles["BLOCK_N"])
    return Launch(backward_keys_kernel, (blocks * parts, kv_heads, batch), arguments, options), grad_k, grad_v
