"""Selection: for every query group the top-k blocks of the bank, exactly, without a score ever reaching memory.

One way for every k: find the k-th highest score of a row, then emit the blocks that beat it, in order. Scores become
unsigned integers of the same order (`sortable_key`); a radix search settles three bits of the k-th highest key per pass
over the descriptors, from the highest; a last pass emits the blocks above it, and of those equal to it the first ones.
Each pass computes the scores anew. That is exact because a score is one chain of float32 fused multiply-adds in a
fixed order, hence the same bits every time. The cost is 12 passes whatever k is, and no state that grows with k or N.
"""

import torch
import triton
import triton.language as tl

from .describe import plan_block_means
from .launch import Launch
from .primitives import load_rows, physical_frame, sortable_key

DIGIT_BITS = tl.constexpr(3)
DIGITS = tl.constexpr(8)
PASSES = tl.constexpr(11)  # of 3 bits: the first sees the upper 2 of 32


@triton.jit
def score_keys(
    query_rows,  # [ROWS] pointers
    row_mask,
    descriptors,  # pointer to this batch and head
    descriptor_stride,
    memory_slots,  # pointer to this batch, or None
    blocks,  # [COLUMNS] indices in bank order
    valid_blocks,
    blocks_per_frame,
    physical_frames,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """The sortable keys [ROWS, COLUMNS] of the scores of query rows against blocks; 0 where a block is not valid."""
    valid = blocks < valid_blocks
    frames = blocks // blocks_per_frame
    slots = physical_frame(memory_slots, frames, valid, physical_frames)
    positions = slots.to(tl.int64) * blocks_per_frame + (blocks - frames * blocks_per_frame)
    descriptor_rows = descriptors + positions * descriptor_stride
    scores = tl.zeros([query_rows.shape[0], blocks.shape[0]], tl.float32)
    for first in range(0, HEAD_DIM, DIM_TILE):
        columns = first + tl.arange(0, DIM_TILE)
        query = load_rows(query_rows, row_mask, columns, HEAD_DIM).to(tl.float32)  # [ROWS, DIM_TILE]
        descriptor = load_rows(descriptor_rows, valid, columns, HEAD_DIM).to(tl.float32)  # [COLUMNS, DIM_TILE]
        scores = tl.dot(query, tl.trans(descriptor), scores, input_precision="ieee")
    return tl.where(valid[None, :], sortable_key(scores), 0).to(tl.uint32)


@triton.jit
def digit_counts(keys, prefix, settled, shift):
    """How often each digit occurs [ROWS, DIGITS] among the keys that agree with `prefix` in the `settled` bits."""
    digits = (keys >> shift[:, None]) & (DIGITS - 1)
    in_race = ((keys ^ prefix[:, None]) & settled[:, None]) == 0
    # Eight 8-bit counters in one word: a single reduction counts all digits of up to 255 keys.
    one = tl.where(in_race, 1, 0).to(tl.int64)
    packed = tl.sum(one << (digits * 8).to(tl.int64), 1)  # [ROWS]
    counters = tl.arange(0, DIGITS).to(tl.int64) * 8
    return ((packed[:, None] >> counters[None, :]) & 0xFF).to(tl.int32)


# FLOPs: 24 * rows * N * D (12 passes of a multiply-add per row, block and dimension); 0 when k >= N. Bytes: the rows
# and the descriptors, which stay in L2, and k indices per row. Bound by float32 instructions.
@triton.jit
def select_kernel(
    queries,  # (B, G, H, D)
    descriptors,  # (B, physical blocks, Hkv, D)
    memory_frames,  # (B,) int32 or None: all
    memory_slots,  # (B, F) int32 or None: identity
    indices,  # (B, H, G, K) int32, contiguous
    query_strides,  # (B, G, H), in elements
    descriptor_strides,  # (B, block, Hkv)
    frame_stride,  # of memory_frames
    slot_stride,  # of memory_slots, between batches
    groups,
    frames,
    blocks_per_frame,
    physical_frames,
    top_k,
    HEADS_PER_KV_HEAD: tl.constexpr,
    RANK: tl.constexpr,  # false: all valid blocks fit, there is nothing to compare
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # at most 128: the digit counters have 8 bits
    DIM_TILE: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < groups
    query_rows = queries + batch * query_strides[0] + head * query_strides[2] + rows.to(tl.int64) * query_strides[1]
    descriptors += batch * descriptor_strides[0] + head // HEADS_PER_KV_HEAD * descriptor_strides[2]
    if memory_slots is not None:
        memory_slots += batch * slot_stride
    valid_frames = frames
    if memory_frames is not None:
        valid_frames = tl.minimum(tl.maximum(tl.load(memory_frames + batch * frame_stride), 0), frames)
    valid_blocks = valid_frames * blocks_per_frame

    kth_key = tl.zeros([ROWS], tl.uint32)
    ties_wanted = tl.zeros([ROWS], tl.int32) + top_k  # becomes: how many keys equal to kth_key are selected
    if RANK:
        digits = tl.arange(0, DIGITS)[None, :]
        settled = tl.zeros([ROWS], tl.uint32)
        # With at most k valid blocks the k-th key stays 0, below every valid one, and no pass is needed.
        for step in range(tl.where(valid_blocks > top_k, PASSES, 0)):
            shift = tl.zeros([ROWS], tl.uint32) + (PASSES - 1 - step) * DIGIT_BITS
            counts = tl.zeros([ROWS, DIGITS], tl.int32)
            for first in range(0, valid_blocks, COLUMNS):
                candidates = first + tl.arange(0, COLUMNS)
                keys = score_keys(
                    query_rows, row_mask, descriptors, descriptor_strides[1], memory_slots, candidates,
                    valid_blocks, blocks_per_frame, physical_frames, HEAD_DIM, DIM_TILE,
                )  # fmt: skip
                counts += digit_counts(keys, kth_key, settled, shift)
            at_least = tl.sum(counts, 1)[:, None] - tl.cumsum(counts, 1) + counts  # keys whose digit is this or higher
            digit = tl.sum((at_least >= ties_wanted[:, None]).to(tl.int32), 1) - 1
            ties_wanted -= tl.sum(tl.where(digits > digit[:, None], counts, 0), 1)
            kth_key |= digit.to(tl.uint32) << shift
            settled |= (tl.zeros([ROWS], tl.uint32) + (DIGITS - 1)) << shift

    output_rows = indices + ((batch * tl.num_programs(1) + head) * groups + rows) * top_k
    taken = tl.zeros([ROWS], tl.int32)
    for first in range(0, valid_blocks, COLUMNS):
        candidates = first + tl.arange(0, COLUMNS)
        chosen = row_mask[:, None] & (candidates < valid_blocks)[None, :]
        if RANK:
            keys = score_keys(
                query_rows, row_mask, descriptors, descriptor_strides[1], memory_slots, candidates,
                valid_blocks, blocks_per_frame, physical_frames, HEAD_DIM, DIM_TILE,
            )  # fmt: skip
            ties = (keys == kth_key[:, None]).to(tl.int32)
            among_first = tl.cumsum(ties, 1) <= ties_wanted[:, None]
            ties_wanted -= tl.sum(ties, 1)
            chosen = chosen & ((keys > kth_key[:, None]) | ((ties > 0) & among_first))
        count = chosen.to(tl.int32)
        places = taken[:, None] + tl.cumsum(count, 1) - 1
        tl.store(output_rows[:, None] + places, tl.zeros_like(places) + candidates[None, :], mask=chosen)
        taken += tl.sum(count, 1)
    for first in range(0, top_k, COLUMNS):
        places = first + tl.arange(0, COLUMNS)[None, :]
        unused = row_mask[:, None] & (places >= taken[:, None]) & (places < top_k)
        tl.store(output_rows[:, None] + places, tl.full([ROWS, COLUMNS], -1, tl.int32), mask=unused)


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
    batch, length, heads, head_dim = q.shape
    launches = []
    if query_group > 1:
        means, q = plan_block_means(q, query_group, frame_tokens=length, dtype=torch.float32)
        launches.append(means)
    groups = q.shape[1]
    physical_frames = descriptors.shape[1] // blocks_per_frame
    frames = physical_frames if memory_slots is None else memory_slots.shape[1]
    top_k = min(top_k, frames * blocks_per_frame)
    indices = torch.empty((batch, heads, groups, top_k), dtype=torch.int32, device=q.device)
    # 64 rows of half precision would become TF32 tensor-core products on sm_100, whatever the precision asked for.
    rows, warps = (32, 8) if groups >= 1024 else (16, 4)
    arguments = dict(
        queries=q,
        descriptors=descriptors,
        memory_frames=memory_frames,
        memory_slots=memory_slots,
        indices=indices,
        query_strides=q.stride()[:3],
        descriptor_strides=descriptors.stride()[:3],
        frame_stride=0 if memory_frames is None else memory_frames.stride(0),
        slot_stride=0 if memory_slots is None else memory_slots.stride(0),
        groups=groups,
        frames=frames,
        blocks_per_frame=blocks_per_frame,
        physical_frames=physical_frames,
        top_k=top_k,
        HEADS_PER_KV_HEAD=heads // descriptors.shape[2],
        RANK=top_k < frames * blocks_per_frame,
        HEAD_DIM=head_dim,
        ROWS=rows,
        COLUMNS=64,
        DIM_TILE=16,
    )
    grid = (triton.cdiv(groups, rows) if top_k else 0, heads, batch)
    launches.append(Launch(select_kernel, grid, arguments, dict(num_warps=warps, num_stages=2)))
    return launches, indices


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
