"""Attention over a dense segment and over selected blocks of a memory bank, in one softmax and one launch.

The kernel can choose the blocks itself: the last round of the selection (kernels/select.py), or all of it where the
bank is small. It can also continue the softmax of another kernel (`resume`), and rows can have blocks of their own.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.attention.blocks import attend_list, attend_tile, attend_union, plan_union, used_entries
from memflow_ops.kernels.attention.split import plan_merge_splits, rows_of_tile, tile_and_split
from memflow_ops.kernels.configs import (
    ONE_LAUNCH_BYTES,
    attend_config,
    capability_of,
    merge_config,
    multiprocessors_of,
    splits_config,
)
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import LN_2, LOG2_E, cast, initial_state, load_rows
from memflow_ops.kernels.selection.groups import plan_select, plan_shortlist, select_one
from memflow_ops.kernels.selection.scores import count_valid_blocks


# FLOPs: 4 * D * H * (Lq * Lk + the sum over query tiles of the keys that they walk over). Bytes: q, out and k, v of
# the segments once per query tile (from L2, mostly). Bound by the tensor cores.
@triton.jit
def attend_kernel(
    q,  # (B, Lq, H, D)
    k,  # (B, Lk, Hkv, D), or None: no dense segment
    v,
    memory_k,  # (B, physical frames * frame_tokens, Hkv, D), or None: no bank
    memory_v,
    memory_slots,  # (B, F) int32, or None: identity
    indices,  # (B, H, G, K) int32: read, or with descriptors written
    unions,  # (B, H, tiles, BLOCK_M * K) int32 of union_kernel, or None: the rows of a tile share a selection
    union_sizes,  # (B, H, tiles) int32
    descriptors,  # (B, physical blocks, Hkv, D), or None: the selection is given
    candidates,  # (B, H, G, C) int32, or None: all blocks
    means,  # (B, G, H, D) float32, or None: a tile is a whole group
    memory_frames,  # (B,) int32, or None: all
    resume_out,  # (B, Lq, H, D), or None: start afresh
    resume_lse,  # (B, H, Lq) float32, natural logarithm
    out,  # (B, Lq, H, D)
    lse,  # (B, H, Lq) float32, natural logarithm
    partial_out,  # (split tiles * SPLITS, BLOCK_M, HEAD_DIM) float32, contiguous, or None: one program per tile
    partial_lse,  # (split tiles * SPLITS, BLOCK_M) float32, contiguous
    q_strides,  # (B, L, H) of each tensor, in elements; their last dimension is contiguous. Of values None: the keys'
    k_strides,
    v_strides,
    memory_k_strides,
    memory_v_strides,
    slot_stride,
    index_strides,  # (B, H, G)
    descriptor_strides,  # (B, block, Hkv)
    mean_strides,  # (B, G, H)
    frame_stride,  # of memory_frames
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
    candidate_count,  # C
    whole_tiles,  # the tiles before those that are split, see tile_and_split
    tiles,
    heads,
    softmax_scale,
    NEGATIVE_SCALE: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    CHUNKS: tl.constexpr,  # of candidates, see select_one
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,  # programs per tile of the last wave
):
    tile = tl.program_id(0)
    if partial_out is not None:
        tile, head, batch, split, splits = tile_and_split(whole_tiles, tiles, heads, SPLITS)
    if unions is None:
        group, rows, row_mask = rows_of_tile(tile, 0, queries, query_group, BLOCK_M, BLOCK_M)
    else:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < queries
        group = rows // query_group
    rows = rows.to(tl.int64)
    if partial_out is None:
        head = tl.program_id(1).to(tl.int64)
        batch = tl.program_id(2).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    columns = tl.arange(0, DIM)

    query_rows = q + batch * q_strides[0] + rows * q_strides[1] + head * q_strides[2]
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
        if descriptors is not None:
            descriptors += batch * descriptor_strides[0] + kv_head * descriptor_strides[2]
            if means is None:
                group_rows = load_rows(query_rows, row_mask, columns, HEAD_DIM).to(tl.float32)  # [BLOCK_M, DIM]
                count_rows = tl.sum(row_mask.to(tl.float32), 0)
                mean = tl.div_rn(tl.sum(group_rows, 0), tl.zeros([DIM], tl.float32) + count_rows)
            else:
                means += batch * mean_strides[0] + group.to(tl.int64) * mean_strides[1] + head * mean_strides[2]
                mean = tl.load(means + columns, mask=columns < HEAD_DIM, other=0.0)
            if candidates is None:
                count = count_valid_blocks(memory_frames, batch * frame_stride, frames, blocks_per_frame)
            else:
                groups = tl.cdiv(queries, query_group)
                candidates += ((batch * heads + head) * groups + group) * candidate_count
                count = candidate_count
            select_one(
                mean, descriptors, descriptor_strides[1], memory_slots, candidates, count, indices, entries,
                blocks_per_frame, physical_frames, HEAD_DIM, DIM, CHUNKS, COLUMNS,
            )  # fmt: skip
            tl.debug_barrier()  # the indices that other threads of this program wrote are read from here on

    query = load_rows(query_rows, row_mask, columns, HEAD_DIM)  # [BLOCK_M, DIM], not held above
    # The softmax takes the maximum first, so its scale is above 0: the least for 0, and a sign goes to the query.
    if NEGATIVE_SCALE:
        query = cast(-query.to(tl.float32), query.dtype)  # the interpreter holds bfloat16 as bits
    scale_log2 = tl.maximum(tl.abs(softmax_scale), 1.2e-38) * LOG2_E
    lse_rows = None
    out_rows = None
    if resume_out is not None:
        lse_rows = resume_lse + batch * resume_lse_strides[0] + head * resume_lse_strides[1]
        lse_rows += rows * resume_lse_strides[2]
        out_rows = resume_out + batch * resume_out_strides[0] + rows * resume_out_strides[1]
        out_rows += head * resume_out_strides[2]
    continues = row_mask
    if partial_out is not None:
        continues = row_mask & (split == 0)  # once
    row_max, row_sum, accumulator = initial_state(out_rows, lse_rows, continues, HEAD_DIM, BLOCK_M, DIM)

    if memory_k is not None:
        if unions is None:
            used = used_entries(indices, entries, blocks, 32)
            if partial_out is not None:
                first_entry = used * split // splits
                indices += first_entry
                used = used * (split + 1) // splits - first_entry
            row_max, row_sum, accumulator = attend_list(
                query, memory_k, memory_v, memory_k_strides[1], memory_v_strides[1],
                indices, used, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, scale_log2,
                row_max, row_sum, accumulator, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_N,
            )  # fmt: skip
        else:
            number = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tile
            unions += number * BLOCK_M * entries
            size = tl.load(union_sizes + number)
            row_max, row_sum, accumulator = attend_union(
                query, memory_k, memory_v, memory_k_strides[1], memory_v_strides[1],
                indices, row_mask, entries, unions, size, blocks, blocks_per_frame, frame_tokens,
                memory_slots, physical_frames, scale_log2, row_max, row_sum, accumulator, HEAD_DIM, DIM, BLOCK_SIZE,
                BLOCK_M, BLOCK_N, False,
            )  # fmt: skip
            if tl.max((accumulator != accumulator).to(tl.int32)) > 0:
                # A value that is not finite reached rows that did not choose it. Rare: once more, with care.
                row_max, row_sum, accumulator = initial_state(out_rows, lse_rows, row_mask, HEAD_DIM, BLOCK_M, DIM)
                row_max, row_sum, accumulator = attend_union(
                    query, memory_k, memory_v, memory_k_strides[1], memory_v_strides[1],
                    indices, row_mask, entries, unions, size, blocks, blocks_per_frame, frame_tokens,
                    memory_slots, physical_frames, scale_log2, row_max, row_sum, accumulator, HEAD_DIM, DIM, BLOCK_SIZE,
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
            key_rows = k + token * k_strides[1] + lanes.to(tl.int64) * k_strides[1]
            value_rows = v + token * v_strides[1] + lanes.to(tl.int64) * v_strides[1]
            row_max, row_sum, accumulator = attend_tile(
                query, load_rows(key_rows, present, columns, HEAD_DIM),
                load_rows(value_rows, present, columns, HEAD_DIM), present, first + BLOCK_N > keys, None, scale_log2,
                row_max, row_sum, accumulator, False,
            )  # fmt: skip

    # A row without any key: out 0, lse -inf.
    row_sum_or_one = tl.where(row_sum == 0.0, 1.0, row_sum)
    final = row_mask
    if partial_out is not None:
        final = row_mask & (splits == 1)
    out_rows = out + batch * out_strides[0] + rows * out_strides[1] + head * out_strides[2]
    out_mask = final[:, None] & (columns < HEAD_DIM)[None, :]
    normalised = accumulator / row_sum_or_one[:, None]
    tl.store(out_rows[:, None] + columns[None, :], cast(normalised, out.dtype.element_ty), mask=out_mask)
    lse_rows = lse + batch * lse_strides[0] + head * lse_strides[1] + rows * lse_strides[2]
    row_lse = (row_max + tl.math.log2(row_sum_or_one)) * LN_2
    tl.store(lse_rows, row_lse, mask=final)
    if partial_out is not None:
        part = row_mask & (splits > 1)
        partial_rows = (tl.program_id(0) - whole_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        partial_tile = partial_out + partial_rows[:, None] * HEAD_DIM + columns[None, :]
        tl.store(partial_tile, normalised, mask=part[:, None] & (columns < HEAD_DIM)[None, :])
        tl.store(partial_lse + partial_rows, row_lse, mask=part)


@dataclass(frozen=True)
class Chosen:
    """Where the blocks come from, for attend_kernel: the selection (B, H, G, K), or the arguments to make it."""

    indices: torch.Tensor
    descriptors: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    means: torch.Tensor | None = None
    memory_frames: torch.Tensor | None = None


def strides_of(tensor: torch.Tensor | None, like: torch.Tensor | None = None) -> tuple[int, ...] | None:
    """The first three; None if they are those of `like`, because one offset for keys and values saves registers."""
    if tensor is None or (like is not None and tensor.stride() == like.stride()):
        return None
    return tensor.stride()[:3]


def plan_attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor | None,
    memory_v: torch.Tensor | None,
    chosen: Chosen | None,
    *,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    memory_slots: torch.Tensor | None = None,
    resume_out: torch.Tensor | None = None,
    resume_lse: torch.Tensor | None = None,
    capability: int | None = None,
    multiprocessors: int | None = None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches that fill out and lse, in order, and these two tensors. See `attend`.

    capability: of the device, 90 for sm_90 (None: that of q's).
    multiprocessors: that the last wave of tiles is to fill (None: those of q's device, 0 without a GPU: as it comes).
    """
    batch, queries, heads, head_dim = q.shape
    if k is None or v is None or k.shape[1] == 0:
        k = v = None
    indices = unions = union_sizes = None
    if memory_k is None or memory_v is None or chosen is None or not chosen.indices.shape[-1] or not memory_k.shape[1]:
        memory_k = memory_v = memory_slots = chosen = None
        # Without a selection the groups mean nothing, and one group makes full tiles.
        query_group = max(queries, 1)
        frames = physical_frames = blocks = entries = 0
    else:
        physical_frames = memory_k.shape[1] // frame_tokens
        frames = physical_frames if memory_slots is None else memory_slots.shape[1]
        blocks = frames * triton.cdiv(frame_tokens, block_size)
        indices = chosen.indices if chosen.indices.stride(-1) == 1 else chosen.indices.contiguous()
        entries = indices.shape[-1]
    kv_heads = next((segment.shape[2] for segment in (k, memory_k) if segment is not None), heads)
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    capability = capability or capability_of(q)
    tiles, options, by_row = attend_config(capability, q.dtype, head_dim, query_group, queries)
    making = chosen or Chosen(q)
    launches = []
    if by_row and indices is not None:
        launch, unions, union_sizes = plan_union(indices, queries, query_group, blocks, tiles["BLOCK_M"])
        launches.append(launch)
    candidates = 0 if making.candidates is None else making.candidates.shape[-1]
    rounds: dict[str, int] = dict(CHUNKS=1, COLUMNS=1)
    if making.descriptors is not None:
        rounds, _ = merge_config(candidates or blocks) or (rounds, {})
    arguments = dict(
        q=q,
        k=k,
        v=v,
        memory_k=memory_k,
        memory_v=memory_v,
        memory_slots=memory_slots,
        indices=indices,
        unions=unions,
        union_sizes=union_sizes,
        descriptors=making.descriptors,
        candidates=making.candidates,
        means=making.means,
        memory_frames=making.memory_frames,
        resume_out=resume_out,
        resume_lse=resume_lse,
        out=out,
        lse=lse,
        q_strides=strides_of(q),
        k_strides=strides_of(k),
        v_strides=strides_of(v, k),
        memory_k_strides=strides_of(memory_k),
        memory_v_strides=strides_of(memory_v, memory_k),
        slot_stride=None if memory_slots is None else memory_slots.stride(0),
        index_strides=strides_of(indices),
        descriptor_strides=strides_of(making.descriptors),
        mean_strides=strides_of(making.means),
        frame_stride=0 if making.memory_frames is None else making.memory_frames.stride(0),
        resume_out_strides=strides_of(resume_out),
        resume_lse_strides=strides_of(resume_lse),
        out_strides=strides_of(out),
        lse_strides=strides_of(lse),
        queries=queries,
        keys=0 if k is None else k.shape[1],
        frames=frames,
        physical_frames=physical_frames,
        frame_tokens=frame_tokens,
        query_group=query_group,
        entries=entries,
        candidate_count=candidates,
        heads=heads,
        softmax_scale=float(softmax_scale),
        NEGATIVE_SCALE=softmax_scale < 0,
        HEADS_PER_KV_HEAD=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        **tiles,
        **rounds,
    )
    groups = 1 if by_row else triton.cdiv(queries, query_group)
    row_tiles = groups * triton.cdiv(queries if by_row else query_group, tiles["BLOCK_M"])
    whole, splits = row_tiles * heads * batch, 1
    if k is None and not by_row:
        multiprocessors = multiprocessors_of(q) if multiprocessors is None else multiprocessors
        whole, splits = splits_config(whole, entries * block_size, tiles["BLOCK_M"], multiprocessors)
    arguments |= dict.fromkeys(("partial_out", "partial_lse", "whole_tiles", "tiles", "SPLITS"))
    if splits == 1:
        return [*launches, Launch(attend_kernel, (row_tiles, heads, batch), arguments, options)], out, lse
    merge = plan_merge_splits(out, lse, whole, row_tiles, splits, query_group, tiles)
    arguments |= {name: value for name, value in merge.arguments.items() if name in arguments}
    programs = whole + merge.arguments["partial_lse"].shape[0]
    return [*launches, Launch(attend_kernel, (programs, 1, 1), arguments, options), merge], out, lse


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
    launches, out, lse = plan_attend(
        q, k, v, memory_k, memory_v, None if indices is None else Chosen(indices), block_size=block_size,
        frame_tokens=frame_tokens, query_group=query_group, softmax_scale=softmax_scale, memory_slots=memory_slots,
        resume_out=resume_out, resume_lse=resume_lse,
    )  # fmt: skip
    for launch in launches:
        launch.run()
    return out, lse


def plan_select_and_attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor,
    memory_v: torch.Tensor,
    descriptors: torch.Tensor,
    *,
    top_k: int,
    memory_frames: torch.Tensor | None = None,
    memory_slots: torch.Tensor | None = None,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    resume_out: torch.Tensor | None = None,
    resume_lse: torch.Tensor | None = None,
    launches: int | None = None,
    capability: int | None = None,
    multiprocessors: int | None = None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The launches that fill out, lse and indices, in order, and these tensors. See `select_and_attend`.

    launches: 1 to select where it is attended to, 2 to select (but for the last round) before; None: by the rule.
    """
    batch, queries, heads, head_dim = q.shape
    blocks_per_frame = triton.cdiv(frame_tokens, block_size)
    frames = memory_k.shape[1] // frame_tokens if memory_slots is None else memory_slots.shape[1]
    blocks, groups = frames * blocks_per_frame, triton.cdiv(queries, query_group)
    selection = (q, descriptors, top_k, query_group, memory_frames, memory_slots, blocks_per_frame)
    capability = capability or capability_of(q)
    tiles, _, by_row = attend_config(capability, q.dtype, head_dim, query_group, queries)
    possible = not by_row and query_group <= tiles["BLOCK_M"] and merge_config(blocks) is not None
    if launches is None:
        read = batch * heads * groups * blocks * head_dim * descriptors.element_size()
        launches = 1 if possible and read <= ONE_LAUNCH_BYTES else 2
    elif launches == 1 and not possible:
        raise ValueError(f"groups of {query_group} queries over {blocks} blocks cannot be selected where they attend")
    before: list[Launch] = []
    if launches == 2 and by_row:
        before, indices = plan_select(*selection)
        chosen = Chosen(indices)
    elif launches == 2:
        first = plan_shortlist(*selection)
        before, chosen = first.launches, Chosen(first.indices)
        if not first.final:
            indices = torch.empty((*first.indices.shape[:3], min(top_k, blocks)), dtype=torch.int32, device=q.device)
            chosen = Chosen(indices, descriptors, first.indices, first.means)
    else:
        indices = torch.empty((batch, heads, groups, min(top_k, blocks)), dtype=torch.int32, device=q.device)
        chosen = Chosen(indices, descriptors, memory_frames=memory_frames)
    attending, out, lse = plan_attend(
        q, k, v, memory_k, memory_v, chosen, block_size=block_size, frame_tokens=frame_tokens,
        query_group=query_group, softmax_scale=softmax_scale, memory_slots=memory_slots, resume_out=resume_out,
        resume_lse=resume_lse, capability=capability, multiprocessors=multiprocessors,
    )  # fmt: skip
    return [*before, *attending], out, lse, chosen.indices


def select_and_attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor,
    memory_v: torch.Tensor,
    descriptors: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`select_blocks`, then `attend` over its blocks; in one launch where that is possible and the bank small.

    The arguments are theirs. -> out, lse, indices.
    """
    launches, *results = plan_select_and_attend(q, k, v, memory_k, memory_v, descriptors, **options)
    for launch in launches:
        launch.run()
    return results[0], results[1], results[2]
