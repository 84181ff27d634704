"""Selection for query groups: the top-k blocks of the bank for each group, exactly, no score ever in memory.

There are few groups, so the keys of a whole span of the bank fit in registers, and one reading of the descriptors is
enough: the k-th highest key is found bit by bit, then the blocks above it and the first ones equal to it are written
down. A large bank is a tournament: each span writes down its own k best blocks, and of these candidates, which are in
the order of the bank, the k best are the selection. `attend_kernel` plays the last round itself.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.configs import SPAN_BLOCKS, merge_config, span_config
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import load_rows
from memflow_ops.kernels.selection.describe import plan_block_means
from memflow_ops.kernels.selection.ranking import sortable_key, write_top_k
from memflow_ops.kernels.selection.rows import plan_select_rows
from memflow_ops.kernels.selection.scores import count_valid_blocks, descriptor_pointers, score_tile


@triton.jit
def select_one(
    mean,  # [DIM] float32, the group's descriptor
    descriptors,  # pointer to this batch and head
    descriptor_stride,
    memory_slots,  # pointer to this batch, or None
    candidates,  # pointer to the group's list, -1 where unused; or None: all blocks
    count,  # of the candidates or blocks
    output,  # pointer to the group's indices
    top_k,
    blocks_per_frame,
    physical_frames,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the top_k of up to CHUNKS * COLUMNS blocks for one group; its keys stay in registers."""
    keys = tl.zeros([CHUNKS, COLUMNS], tl.uint32)
    for chunk in range(tl.cdiv(count, COLUMNS)):
        places = chunk * COLUMNS + tl.arange(0, COLUMNS)
        valid = places < count
        blocks = places
        if candidates is not None:
            blocks = tl.load(candidates + places, mask=valid, other=-1)
            valid = blocks >= 0
        rows = descriptor_pointers(
            descriptors, descriptor_stride, memory_slots, blocks, valid, blocks_per_frame, physical_frames
        )
        descriptor = load_rows(rows, valid, tl.arange(0, DIM), HEAD_DIM).to(tl.float32)  # [COLUMNS, DIM]
        scores = tl.sum(descriptor * mean[None, :], 1)
        chunk_keys = tl.where(valid, sortable_key(scores), 0).to(tl.uint32)
        keys = tl.where((tl.arange(0, CHUNKS) == chunk)[:, None], chunk_keys[None, :], keys)
    row = tl.arange(0, 1)
    write_top_k(output + row, row == 0, 0, tl.reshape(keys, [1, CHUNKS * COLUMNS]), top_k, candidates)


# FLOPs: 2 * G * N * D. Bytes: the group means, the descriptors once per 16 groups (from L2), k indices per span.
@triton.jit
def span_kernel(
    means,  # (B, G, H, D) float32
    descriptors,  # (B, physical blocks, Hkv, D)
    memory_frames,  # (B,) int32 or None: all
    memory_slots,  # (B, F) int32 or None: identity
    indices,  # (B, H, G, spans * K) int32, contiguous
    mean_strides,  # (B, G, H), in elements
    descriptor_strides,  # (B, block, Hkv)
    frame_stride,  # of memory_frames
    slot_stride,  # of memory_slots, between batches
    groups,
    frames,
    blocks_per_frame,
    physical_frames,
    top_k,
    spans,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # blocks of a span
    DIM_TILE: tl.constexpr,
):
    span = tl.program_id(0) % spans
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) // spans * ROWS + tl.arange(0, ROWS)
    row_mask = rows < groups
    mean_rows = means + batch * mean_strides[0] + head * mean_strides[2] + rows.to(tl.int64) * mean_strides[1]
    descriptors += batch * descriptor_strides[0] + head // HEADS_PER_KV_HEAD * descriptor_strides[2]
    if memory_slots is not None:
        memory_slots += batch * slot_stride
    blocks = span * COLUMNS + tl.arange(0, COLUMNS)
    valid = blocks < count_valid_blocks(memory_frames, batch * frame_stride, frames, blocks_per_frame)
    pointers = descriptor_pointers(
        descriptors, descriptor_strides[1], memory_slots, blocks, valid, blocks_per_frame, physical_frames
    )
    scores = score_tile(None, mean_rows, row_mask, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
    keys = tl.where(valid[None, :], sortable_key(scores), 0).to(tl.uint32)
    output_rows = indices + (((batch * tl.num_programs(1) + head) * groups + rows) * spans + span) * top_k
    write_top_k(output_rows, row_mask, span * COLUMNS, keys, top_k, None)


# FLOPs: 2 * D per candidate. Bytes: their descriptors, gathered from L2.
@triton.jit
def merge_kernel(
    means,  # (B, G, H, D) float32
    descriptors,  # (B, physical blocks, Hkv, D)
    memory_slots,  # (B, F) int32 or None: identity
    candidates,  # (B, H, G, C) int32, contiguous
    indices,  # (B, H, G, K) int32, contiguous
    mean_strides,  # (B, G, H), in elements
    descriptor_strides,  # (B, block, Hkv)
    slot_stride,  # of memory_slots, between batches
    groups,
    blocks_per_frame,
    physical_frames,
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
    mean = means + batch * mean_strides[0] + group.to(tl.int64) * mean_strides[1] + head * mean_strides[2]
    mean = tl.load(mean + columns, mask=columns < HEAD_DIM, other=0.0)
    descriptors += batch * descriptor_strides[0] + head // HEADS_PER_KV_HEAD * descriptor_strides[2]
    if memory_slots is not None:
        memory_slots += batch * slot_stride
    row = (batch * tl.num_programs(1) + head) * groups + group
    select_one(
        mean, descriptors, descriptor_strides[1], memory_slots, candidates + row * candidate_count, candidate_count,
        indices + row * top_k, top_k, blocks_per_frame, physical_frames, HEAD_DIM, DIM, CHUNKS, COLUMNS,
    )  # fmt: skip


@dataclass(frozen=True)
class Shortlist:
    """The launches of a selection's first rounds, and the indices (B, H, G, C) that they fill.

    final: these are the selection itself. If not, they are candidates in bank order, -1 where unused, and the last
    round scores them against the group means (B, G, H, D).
    """

    launches: list[Launch]
    indices: torch.Tensor
    final: bool
    means: torch.Tensor | None = None


def plan_shortlist(
    q: torch.Tensor,
    descriptors: torch.Tensor,
    top_k: int,
    query_group: int,
    memory_frames: torch.Tensor | None,
    memory_slots: torch.Tensor | None,
    blocks_per_frame: int,
) -> Shortlist:
    """All rounds of a selection that are played before the last one. See `select_blocks`."""
    batch, length, heads, head_dim = q.shape
    arguments = dict(
        descriptors=descriptors,
        memory_frames=memory_frames,
        memory_slots=memory_slots,
        blocks_per_frame=blocks_per_frame,
    )
    if query_group == 1:
        launch, indices = plan_select_rows(q, top_k=top_k, **arguments)
        return Shortlist([launch], indices, final=True)
    mean_launch, means = plan_block_means(q, query_group, frame_tokens=length, dtype=torch.float32)
    groups = means.shape[1]
    physical_frames = descriptors.shape[1] // blocks_per_frame
    frames = physical_frames if memory_slots is None else memory_slots.shape[1]
    blocks = frames * blocks_per_frame
    top_k = min(top_k, blocks)
    spans = triton.cdiv(blocks, SPAN_BLOCKS)
    if spans > 1 and (2 * top_k > SPAN_BLOCKS or merge_config(spans * top_k) is None):
        launch, indices = plan_select_rows(means, top_k=top_k, **arguments)  # so many that registers do not hold them
        return Shortlist([mean_launch, launch], indices, final=True)
    indices = torch.empty((batch, heads, groups, spans * top_k), dtype=torch.int32, device=q.device)
    tiles, options = span_config()
    arguments |= dict(
        means=means,
        indices=indices,
        mean_strides=means.stride()[:3],
        descriptor_strides=descriptors.stride()[:3],
        frame_stride=0 if memory_frames is None else memory_frames.stride(0),
        slot_stride=0 if memory_slots is None else memory_slots.stride(0),
        groups=groups,
        frames=frames,
        physical_frames=physical_frames,
        top_k=top_k,
        spans=spans,
        HEADS_PER_KV_HEAD=heads // descriptors.shape[2],
        HEAD_DIM=head_dim,
        **tiles,
    )
    grid = (triton.cdiv(groups, tiles["ROWS"]) * spans if top_k else 0, heads, batch)
    return Shortlist([mean_launch, Launch(span_kernel, grid, arguments, options)], indices, spans <= 1, means)


def plan_select(
    q: torch.Tensor,
    descriptors: torch.Tensor,
    top_k: int,
    query_group: int,
    memory_frames: torch.Tensor | None,
    memory_slots: torch.Tensor | None,
    blocks_per_frame: int,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that fill the indices, in order, and that tensor. See `select_blocks`."""
    first = plan_shortlist(q, descriptors, top_k, query_group, memory_frames, memory_slots, blocks_per_frame)
    if first.final or first.means is None:
        return first.launches, first.indices
    batch, heads, groups, candidates = first.indices.shape
    physical_frames = descriptors.shape[1] // blocks_per_frame
    frames = physical_frames if memory_slots is None else memory_slots.shape[1]
    top_k = min(top_k, frames * blocks_per_frame)
    indices = torch.empty((batch, heads, groups, top_k), dtype=torch.int32, device=q.device)
    head_dim = q.shape[-1]
    tiles, options = merge_config(candidates) or ({}, {})
    arguments = dict(
        means=first.means,
        descriptors=descriptors,
        memory_slots=memory_slots,
        candidates=first.indices,
        indices=indices,
        mean_strides=first.means.stride()[:3],
        descriptor_strides=descriptors.stride()[:3],
        slot_stride=0 if memory_slots is None else memory_slots.stride(0),
        groups=groups,
        blocks_per_frame=blocks_per_frame,
        physical_frames=physical_frames,
        top_k=top_k,
        candidate_count=candidates,
        HEADS_PER_KV_HEAD=heads // descriptors.shape[2],
        HEAD_DIM=head_dim,
        DIM=triton.next_power_of_2(head_dim),
        **tiles,
    )
    return [*first.launches, Launch(merge_kernel, (groups, heads, batch), arguments, options)], indices


def select_blocks(
    q: torch.Tensor,
    descriptors: torch.Tensor,
    top_k: int,
    query_group: int,
    memory_frames: torch.Tensor | None,
    memory_slots: torch.Tensor | None,
    blocks_per_frame: int,
) -> torch.Tensor:
    """The `top_k` blocks of the bank with the highest scores, for every batch, query head and query group.

    q (B, Lq, H, D); descriptors (B, physical frames * blocks_per_frame, Hkv, D); last dimensions contiguous.
    memory_frames (B,) int32: leading bank frames that are valid, clamped to 0..F (None: all). memory_slots (B, F)
    int32: the physical frame of each bank frame, clamped (None: they lie in order and F is the physical number).
    -> (B, H, G, K) int32, G = ceil(Lq / query_group), K = min(top_k, F * blocks_per_frame): indices in bank order,
    ascending, then -1. Score: the float32 mean of the group's queries times the descriptor, accumulated in float32.
    Equal scores go to the lower index, -0 equals +0, NaN ranks below -inf. Nothing is read back by the host.
    """
    launches, indices = plan_select(q, descriptors, top_k, query_group, memory_frames, memory_slots, blocks_per_frame)
    for launch in launches:
        launch.run()
    return indices
