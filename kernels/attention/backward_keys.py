"""The gradients of keys and values: one program per block of keys, which visits all queries that attended to it.

Every block belongs to one program, so sums have one order and no atomics, and a block that nobody selected is zero. A
block that many groups selected keeps its program busy for as long: its neighbours fill the machine meanwhile, and the
last ones to finish are what the imbalance costs.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.attention.backward_queries import load_terms
from memflow_ops.kernels.attention.blocks import bank_place
from memflow_ops.kernels.attention.forward import strides_of
from memflow_ops.kernels.attention.inverse import Inverse
from memflow_ops.kernels.configs import backward_keys_config, capability_of
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import LOG2_E, cast, load_rows, matmul


@triton.jit
def query_places(
    tile,
    count,  # of members
    members,  # pointer to the block's members, see Inverse; or None: all queries of each query head
    query_group,
    queries,
    BLOCK_M: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Where the queries [BLOCK_M] of a tile are: head, first row, offset from that, and which of them there are.

    PACKED: the groups of the members lie one behind the other, and each query has a head and a first row of its own;
    else each group begins with a tile of its own, and head and first row are scalars.
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
        tiles_per_member = tl.cdiv(query_group, BLOCK_M)
        entry = tile // tiles_per_member
        start = (tile - entry * tiles_per_member) * BLOCK_M
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
    grad_out,  # (B, Lq, H, D)
    q,  # (B, Lq, H, D)
    k,  # (B, frames * frame_tokens, Hkv, D)
    v,
    members,  # int64, see Inverse; or None: every query attended to every block
    starts,  # (B * Hkv * blocks + 1,) int32
    terms,  # (B, H, Lq) int64 of row_terms_kernel
    grad_k,  # like k, or None: not wanted
    grad_v,
    grad_out_strides,  # (B, L, H) of each tensor, in elements; their last dimension is contiguous. None: those of q
    q_strides,
    k_strides,
    v_strides,  # None: those of k
    grad_k_strides,
    grad_v_strides,
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
):
    PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // PARTS
    offsets = tl.program_id(0) % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, DIM)
    scale_log2 = softmax_scale * LOG2_E
    if grad_out_strides is None:
        grad_out_strides = q_strides
    if v_strides is None:
        v_strides = k_strides
    frame, start, length = bank_place(
        block, blocks, tl.cdiv(frame_tokens, BLOCK_SIZE), frame_tokens, None, 0, BLOCK_SIZE
    )
    tokens = frame.to(tl.int64) * frame_tokens + start + offsets
    present = offsets < length

    count = HEADS_PER_KV_HEAD
    if members is not None:
        number = (batch * tl.num_programs(1) + kv_head) * blocks + block
        begin = tl.load(starts + number)
        count = tl.load(starts + number + 1) - begin
        members += begin
    tiles = tl.cdiv(count * query_group, BLOCK_M) if PACKED else count * tl.cdiv(query_group, BLOCK_M)
    read = present & (tiles > 0)  # what nobody attended to is not read
    key_rows = k + batch * k_strides[0] + tokens * k_strides[1] + kv_head * k_strides[2]
    value_rows = v + batch * v_strides[0] + tokens * v_strides[1] + kv_head * v_strides[2]
    key = load_rows(key_rows, read, columns, HEAD_DIM)  # [BLOCK_N, DIM]
    if grad_k is not None:
        value = load_rows(value_rows, read, columns, HEAD_DIM)
    first_head = kv_head * HEADS_PER_KV_HEAD if members is None else 0
    grad_key = tl.zeros([BLOCK_N, DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_N, DIM], tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    q += batch * q_strides[0]
    grad_out += batch * grad_out_strides[0]
    terms += batch * tl.num_programs(1) * HEADS_PER_KV_HEAD * queries
    for tile in range(tiles):
        # added up in this order: what all lanes share needs no registers
        head, first, offset, there = query_places(tile, count, members, query_group, queries, BLOCK_M, PACKED)
        head += first_head
        query_rows = q + head * q_strides[2] + first * q_strides[1] + offset * q_strides[1]
        query = load_rows(query_rows, there, columns, HEAD_DIM)  # [BLOCK_M, DIM]
        grad_rows = grad_out + head * grad_out_strides[2] + first * grad_out_strides[1] + offset * grad_out_strides[1]
        grad = load_rows(grad_rows, there, columns, HEAD_DIM)
        row_lse, row_delta = load_terms(terms + head * queries + first + offset, there)
        if grad_k is not None:  # both products before the rest: fewer registers
            slopes = matmul(value, tl.trans(grad), zeros - row_delta[None, :])
        scores = matmul(key, tl.trans(query), zeros) * scale_log2  # [BLOCK_N, BLOCK_M]
        weights = tl.math.exp2(scores - row_lse[None, :])
        if grad_v is not None:
            grad_value = matmul(cast(weights, grad.dtype), grad, grad_value)
        if grad_k is not None:
            grad_key = matmul(cast(weights * slopes, query.dtype), query, grad_key)

    mask = present[:, None] & (columns < HEAD_DIM)[None, :]
    if grad_k is not None:
        grad_rows = grad_k + batch * grad_k_strides[0] + tokens * grad_k_strides[1] + kv_head * grad_k_strides[2]
        grad_key = cast(grad_key * softmax_scale, grad_k.dtype.element_ty)
        tl.store(grad_rows[:, None] + columns[None, :], grad_key, mask=mask)
    if grad_v is not None:
        grad_rows = grad_v + batch * grad_v_strides[0] + tokens * grad_v_strides[1] + kv_head * grad_v_strides[2]
        tl.store(grad_rows[:, None] + columns[None, :], cast(grad_value, grad_v.dtype.element_ty), mask=mask)


def plan_backward_keys(
    grad_out: torch.Tensor,
    terms: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    inverse: Inverse | None,
    *,
    wanted: tuple[bool, bool],
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    capability: int | None = None,
) -> tuple[Launch, torch.Tensor | None, torch.Tensor | None]:
    """The launch that fills the gradients of k and v, and these tensors, None where not wanted.

    inverse: who attended to which block; None: every query to all keys, whatever the sizes of blocks and groups say.
    """
    batch, queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if inverse is None:
        query_group, frame_tokens = queries, k.shape[1]
    tiles, options = backward_keys_config(
        capability or capability_of(q), q.dtype, head_dim, None if inverse is None else block_size, query_group
    )
    if inverse is None:
        block_size = tiles["BLOCK_N"]
    blocks = k.shape[1] // frame_tokens * triton.cdiv(frame_tokens, block_size)
    grad_k, grad_v = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if want else None
        for x, want in zip((k, v), wanted, strict=True)
    )
    arguments = dict(
        grad_out=grad_out,
        q=q,
        k=k,
        v=v,
        members=None if inverse is None else inverse.members,
        starts=None if inverse is None else inverse.starts,
        terms=terms,
        grad_k=grad_k,
        grad_v=grad_v,
        grad_out_strides=strides_of(grad_out, q),
        q_strides=strides_of(q),
        k_strides=strides_of(k),
        v_strides=strides_of(v, k),
        grad_k_strides=strides_of(grad_k),
        grad_v_strides=strides_of(grad_v),
        queries=queries,
        blocks=blocks,
        frame_tokens=frame_tokens,
        query_group=query_group,
        softmax_scale=float(softmax_scale),
        HEADS_PER_KV_HEAD=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        **tiles,
    )
    parts = triton.cdiv(block_size, tiles["BLOCK_N"])
    return Launch(backward_keys_kernel, (blocks * parts, kv_heads, batch), arguments, options), grad_k, grad_v
