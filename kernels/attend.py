"""Attention over a dense segment and over selected blocks of a memory bank, in one softmax and one launch."""

import torch
import triton
import triton.language as tl

from .launch import Launch
from .primitives import LN_2, LOG2_E, cast, load_rows, matmul, online_softmax_update, physical_frame


@triton.jit
def attend_tile(
    query,  # [BLOCK_M, DIM]
    k,  # pointer to this batch and head
    v,
    k_stride,  # between tokens
    v_stride,
    tokens,  # [BLOCK_N] which keys
    present,  # [BLOCK_N] false: neither read nor attended to
    scale_log2,
    row_max,
    row_sum,
    accumulator,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """Attend to one tile of keys: returns the softmax state (row_max, row_sum, accumulator) after it."""
    columns = tl.arange(0, DIM)
    tokens = tokens.to(tl.int64)
    key = load_rows(k + tokens * k_stride, present, columns, HEAD_DIM)  # [BLOCK_N, DIM]
    scores = matmul(query, tl.trans(key), tl.zeros([query.shape[0], tokens.shape[0]], tl.float32)) * scale_log2
    scores = tl.where(present[None, :], scores, float("-inf"))
    weights, correction, row_max, row_sum = online_softmax_update(scores, row_max, row_sum)
    value = load_rows(v + tokens * v_stride, present, columns, HEAD_DIM)  # [BLOCK_N, DIM]
    accumulator = matmul(cast(weights, value.dtype), value, accumulator * correction[:, None])
    return row_max, row_sum, accumulator


@triton.jit
def used_entries(indices, entries, blocks, CHUNK: tl.constexpr):
    """The number of leading entries of a selection that reach up to its last valid index."""
    used = tl.zeros([CHUNK], tl.int32)
    for first in range(0, entries, CHUNK):
        places = first + tl.arange(0, CHUNK)
        index = tl.load(indices + places, mask=places < entries, other=-1)
        used = tl.where((index >= 0) & (index < blocks), places + 1, used)
    return tl.max(used, 0)


# FLOPs: 4 * D * H * (Lq * Lk + the sum over queries of their selected keys). Bytes: q, out and k, v of the segments
# once per query tile (from L2, mostly). Bound by the tensor cores.
@triton.jit
def attend_kernel(
    q,  # (B, Lq, H, D)
    k,  # (B, Lk, Hkv, D), or None: no dense segment
    v,
    memory_k,  # (B, physical frames * frame_tokens, Hkv, D), or None: no bank
    memory_v,
    indices,  # (B, H, G, K) int32
    memory_slots,  # (B, F) int32, or None: identity
    resume_out,  # (B, Lq, H, D), or None: start afresh
    resume_lse,  # (B, H, Lq) float32, natural logarithm
    out,  # (B, Lq, H, D)
    lse,  # (B, H, Lq) float32, natural logarithm
    q_strides,  # (B, L, H) of each tensor, in elements; their last dimension is contiguous
    k_strides,
    v_strides,
    memory_k_strides,
    memory_v_strides,
    index_strides,  # (B, H, G)
    slot_stride,
    resume_out_strides,
    resume_lse_strides,  # (B, H, L)
    out_strides,
    lse_strides,
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
    # A tile of queries belongs to one group, because a group shares its selection.
    tiles_per_group = tl.cdiv(query_group, BLOCK_M)
    group = tl.program_id(0) // tiles_per_group
    offset = (tl.program_id(0) - group * tiles_per_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = group * query_group + offset
    row_mask = (offset < query_group) & (rows < queries)
    rows = rows.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, DIM)

    query_rows = q + batch * q_strides[0] + rows * q_strides[1] + head * q_strides[2]
    query = load_rows(query_rows, row_mask, columns, HEAD_DIM)  # [BLOCK_M, DIM]
    scale_log2 = softmax_scale * LOG2_E

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, DIM], tl.float32)
    if resume_out is not None:
        lse_rows = resume_lse + batch * resume_lse_strides[0] + head * resume_lse_strides[1]
        row_max = tl.load(lse_rows + rows * resume_lse_strides[2], mask=row_mask, other=float("-inf")) * LOG2_E
        started = row_max != float("-inf")
        row_sum = tl.where(started, 1.0, 0.0)
        out_rows = resume_out + batch * resume_out_strides[0] + rows * resume_out_strides[1]
        out_rows += head * resume_out_strides[2]
        accumulator = load_rows(out_rows, row_mask & started, columns, HEAD_DIM).to(tl.float32)

    if memory_k is not None:
        memory_k += batch * memory_k_strides[0] + kv_head * memory_k_strides[2]
        memory_v += batch * memory_v_strides[0] + kv_head * memory_v_strides[2]
        indices += batch * index_strides[0] + head * index_strides[1] + group.to(tl.int64) * index_strides[2]
        if memory_slots is not None:
            memory_slots += batch * slot_stride
        blocks_per_frame = tl.cdiv(frame_tokens, BLOCK_SIZE)
        blocks = frames * blocks_per_frame
        used = used_entries(indices, entries, blocks, BLOCK_N)
        for first in range(0, used * BLOCK_SIZE, BLOCK_N):
            # The selected blocks one behind the other: a tile may hold several, or a part of one.
            places = first + tl.arange(0, BLOCK_N)
            entry = places // BLOCK_SIZE
            index = tl.load(indices + entry, mask=entry < used, other=-1)
            frame = index // blocks_per_frame
            offset_in_frame = (index - frame * blocks_per_frame) * BLOCK_SIZE + (places - entry * BLOCK_SIZE)
            present = (index >= 0) & (index < blocks) & (offset_in_frame < frame_tokens)
            slot = physical_frame(memory_slots, frame, present, physical_frames)
            tokens = slot.to(tl.int64) * frame_tokens + offset_in_frame
            row_max, row_sum, accumulator = attend_tile(
                query, memory_k, memory_v, memory_k_strides[1], memory_v_strides[1], tokens, present, scale_log2,
                row_max, row_sum, accumulator, HEAD_DIM, DIM,
            )  # fmt: skip

    if k is not None:
        k += batch * k_strides[0] + kv_head * k_strides[2]
        v += batch * v_strides[0] + kv_head * v_strides[2]
        for first in range(0, keys, BLOCK_N):
            tokens = first + tl.arange(0, BLOCK_N)
            row_max, row_sum, accumulator = attend_tile(
                query, k, v, k_strides[1], v_strides[1], tokens, tokens < keys, scale_log2,
                row_max, row_sum, accumulator, HEAD_DIM, DIM,
            )  # fmt: skip

    # A row without any key: out 0, lse -inf.
    row_sum_or_one = tl.where(row_sum == 0.0, 1.0, row_sum)
    out_rows = out + batch * out_strides[0] + rows * out_strides[1] + head * out_strides[2]
    out_mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    normalised = cast(accumulator / row_sum_or_one[:, None], out.dtype.element_ty)
    tl.store(out_rows[:, None] + columns[None, :], normalised, mask=out_mask)
    lse_rows = lse + batch * lse_strides[0] + head * lse_strides[1] + rows * lse_strides[2]
    tl.store(lse_rows, (row_max + tl.math.log2(row_sum_or_one)) * LN_2, mask=row_mask)


def tile_sizes(dtype: torch.dtype, head_dim: int, query_group: int) -> tuple[dict[str, int], dict[str, int]]:
    """BLOCK_M, BLOCK_N and DIM, and the launch options: the largest query tiles whose state stays in registers."""
    dim = max(triton.next_power_of_2(head_dim), 16)
    group = max(triton.next_power_of_2(query_group), 16)  # a tensor-core product has at least 16 rows
    if dtype == torch.float32:  # no tensor cores: the operands, too, have to fit in registers
        return dict(BLOCK_M=min(group, 32), BLOCK_N=16, DIM=dim), dict(num_warps=8, num_stages=2)
    block_m = min(group, 128 if dim <= 128 else 64)
    return dict(BLOCK_M=block_m, BLOCK_N=64, DIM=dim), dict(num_warps=8 if block_m >= 64 else 4, num_stages=2)


def plan_attend(
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
    memory_slots: torch.Tensor | None = None,
    resume_out: torch.Tensor | None = None,
    resume_lse: torch.Tensor | None = None,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch that fills out and lse, and these two tensors. See `attend`."""
    batch, queries, heads, head_dim = q.shape
    if k is None or v is None or k.shape[1] == 0:
        k = v = None
    if memory_k is None or memory_v is None or indices is None or indices.shape[-1] == 0 or memory_k.shape[1] == 0:
        memory_k = memory_v = indices = memory_slots = None
        # Without a selection the groups mean nothing, and one group makes full tiles.
        query_group = max(queries, 1)
        frames = physical_frames = entries = 0
    else:
        physical_frames = memory_k.shape[1] // frame_tokens
        frames = physical_frames if memory_slots is None else memory_slots.shape[1]
        entries = indices.shape[-1]
        indices = indices if indices.stride(-1) == 1 else indices.contiguous()
    kv_heads = next((segment.shape[2] for segment in (k, memory_k) if segment is not None), heads)
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    tiles, options = tile_sizes(q.dtype, head_dim, query_group)

    def strides(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
        return None if tensor is None else tensor.stride()[:3]

    arguments = dict(
        q=q,
        k=k,
        v=v,
        memory_k=memory_k,
        memory_v=memory_v,
        indices=indices,
        memory_slots=memory_slots,
        resume_out=resume_out,
        resume_lse=resume_lse,
        out=out,
        lse=lse,
        q_strides=strides(q),
        k_strides=strides(k),
        v_strides=strides(v),
        memory_k_strides=strides(memory_k),
        memory_v_strides=strides(memory_v),
        index_strides=strides(indices),
        slot_stride=None if memory_slots is None else memory_slots.stride(0),
        resume_out_strides=strides(resume_out),
        resume_lse_strides=strides(resume_lse),
        out_strides=strides(out),
        lse_strides=strides(lse),
        queries=queries,
        keys=0 if k is None else k.shape[1],
        frames=frames,
        physical_frames=physical_frames,
        frame_tokens=frame_tokens,
        query_group=query_group,
        entries=entries,
        softmax_scale=float(softmax_scale),
        HEADS_PER_KV_HEAD=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        **tiles,
    )
    groups = triton.cdiv(queries, query_group)
    grid = (groups * triton.cdiv(query_group, tiles["BLOCK_M"]), heads, batch)
    return Launch(attend_kernel, grid, arguments, options), out, lse


def attend(
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
    memory_slots: torch.Tensor | None = None,
    resume_out: torch.Tensor | None = None,
    resume_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over {k} and the keys of the selected blocks, and over what `resume_*` has already seen.

    q (B, Lq, H, D); k, v (B, Lk, Hkv, D), or None: no dense segment; memory_k, memory_v (B, physical frames *
    frame_tokens, Hkv, D) and indices (B, H, G, K) int32 with G = ceil(Lq / query_group), or None: no bank. One dtype
    (float32, bfloat16, float16), last dimensions contiguous, D up to 256, H a multiple of Hkv. memory_slots (B, F)
    int32: the physical frame of each bank frame, clamped (None: identity). resume_out (B, Lq, H, D) of any float
    dtype and resume_lse (B, H, Lq) float32: the state to continue.
    -> out (B, Lq, H, D) in q's dtype, lse (B, H, Lq) float32, the natural logarithm of the sum of exp(scaled score);
    0 and -inf where a query has no key. Scores, softmax and accumulation are float32; the weights are rounded to v's
    dtype for the product with v. Indices outside of 0..N-1 are skipped. What is not selected is not read.
    """
    launch, out, lse = plan_attend(
        q, k, v, memory_k, memory_v, indices, block_size=block_size, frame_tokens=frame_tokens, query_group=query_group,
        softmax_scale=softmax_scale, memory_slots=memory_slots, resume_out=resume_out, resume_lse=resume_lse,
    )  # fmt: skip
    launch.run()
    return out, lse
