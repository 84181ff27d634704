"""Selection for many rows: each query (or query group) of a tile finds its own top-k blocks, exactly.

The scores of a tile of rows against the whole bank do not fit in registers and must not reach memory, so they are
computed anew in each of a few passes: on the tensor cores that costs less than to keep a sorted list. What is sought
is the k-th highest score of each row. A pass counts the scores that reach a bound, and keeps for each column of the
tile the best of those that do not: the blocks of a column (j, j + COLUMNS, j + 2 * COLUMNS, ...) form a class. The k
best class maxima are k blocks, so the k-th of them is a lower bound, and a close one: among 1600 unrelated blocks in 64
classes 30 reach it for k = 24. From there passes alternate, up by class minima and down by class maxima, until the
count says that the bound is the k-th score; where a class hides what is sought, the bracket is halved. A last pass
writes the blocks above it, and of those equal to it the first ones. Three to five passes are the rule.

It is exact because a score is computed by the same instructions in every pass, hence has the same bits.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.configs import select_rows_config
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import load_rows
from memflow_ops.kernels.selection.ranking import fill_unused, kth_key, score_of_key, sortable_key, write_chosen
from memflow_ops.kernels.selection.scores import count_valid_blocks, descriptor_pointers, score_tile


@triton.jit
def bank_pass(
    query, query_rows, row_mask, descriptors, descriptor_stride, memory_slots, valid_blocks, blocks_per_frame,
    physical_frames, bound, sign, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr,
):  # fmt: skip
    """One pass over the scores times `sign`: the best of each class below `bound` [ROWS, COLUMNS], -inf where there is
    none, and how many lie below it [ROWS]. To the first pass all numbers lie below."""
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for first in range(0, valid_blocks, COLUMNS):
        blocks = first + tl.arange(0, COLUMNS)
        valid = blocks < valid_blocks
        rows = descriptor_pointers(
            descriptors, descriptor_stride, memory_slots, blocks, valid, blocks_per_frame, physical_frames
        )
        scores = sign * score_tile(query, query_rows, row_mask, rows, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
        below = scores == scores if FIRST else scores < bound[:, None]
        best = tl.maximum(best, tl.where(below, scores, float("-inf")))
        count += tl.sum(below.to(tl.int32), 1)
    return best, count


@triton.jit
def kth_or_infinity(best, k):
    """The k-th largest of each row of `best` [ROWS, COLUMNS], -inf where there are fewer numbers."""
    kth = score_of_key(kth_key(sortable_key(best), tl.maximum(k, 1)))  # NaN if k is more than the classes
    return tl.where(kth == kth, kth, float("-inf"))


# FLOPs: 2 * rows * N * D per pass, 4 or 5 passes as a rule; one where k >= N. Bytes: the rows and the descriptors,
# which stay in L2, and k indices per row. Bound by instructions: some ten per score and pass.
@triton.jit
def select_rows_kernel(
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
    TENSOR_CORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM_TILE: tl.constexpr,  # on tensor cores HEAD_DIM rounded up to a power of two
):
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < groups
    query_rows = queries + batch * query_strides[0] + head * query_strides[2] + rows.to(tl.int64) * query_strides[1]
    descriptors += batch * descriptor_strides[0] + head // HEADS_PER_KV_HEAD * descriptor_strides[2]
    if memory_slots is not None:
        memory_slots += batch * slot_stride
    valid_blocks = count_valid_blocks(memory_frames, batch * frame_stride, frames, blocks_per_frame)
    query = load_rows(query_rows, row_mask, tl.arange(0, DIM_TILE), HEAD_DIM) if TENSOR_CORES else None

    # With at most k valid blocks there is nothing to compare: a k-th key of 0 lies below every valid one.
    ranked = valid_blocks > top_k
    kth = tl.zeros([ROWS], tl.uint32)
    ties_wanted = tl.zeros([ROWS], tl.int32) + top_k
    if ranked:
        kth, ties_wanted = kth_of_bank(
            query, query_rows, row_mask, descriptors, descriptor_strides[1], memory_slots, valid_blocks,
            blocks_per_frame, physical_frames, top_k, ROWS, COLUMNS, HEAD_DIM, DIM_TILE,
        )  # fmt: skip

    output_rows = indices + ((batch * tl.num_programs(1) + head) * groups + rows) * top_k
    taken = tl.zeros([ROWS], tl.int32)
    for first in range(0, valid_blocks, COLUMNS):
        blocks = first + tl.arange(0, COLUMNS)
        valid = blocks < valid_blocks
        if ranked:
            pointers = descriptor_pointers(
                descriptors, descriptor_strides[1], memory_slots, blocks, valid, blocks_per_frame, physical_frames
            )
            scores = score_tile(query, query_rows, row_mask, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
        else:
            scores = tl.zeros([ROWS, COLUMNS], tl.float32)
        keys = tl.where(valid[None, :], sortable_key(scores), 0).to(tl.uint32)
        ties_wanted, taken = write_chosen(output_rows, row_mask, first, keys, kth, ties_wanted, taken, None)
    fill_unused(output_rows, row_mask, taken, top_k)


@triton.jit
def kth_of_bank(
    query, query_rows, row_mask, descriptors, descriptor_stride, memory_slots, valid_blocks, blocks_per_frame,
    physical_frames, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr,
):  # fmt: skip
    """The sortable key of each row's k-th highest score, and how many scores equal to it are among the k best.

    For a row that is not done at least k scores reach `low`, and fewer than k reach `high` unless it is infinite.
    """
    best, numbers = bank_pass(
        query, query_rows, row_mask, descriptors, descriptor_stride, memory_slots, valid_blocks, blocks_per_frame,
        physical_frames, None, 1.0, True, ROWS, COLUMNS, HEAD_DIM, DIM_TILE,
    )  # fmt: skip
    # Where at most k scores are numbers, NaN is the k-th.
    kth = tl.full([ROWS], float("nan"), tl.float32)
    ties_wanted = k - numbers
    done = (numbers <= k) | (row_mask == 0)
    low = kth_or_infinity(best, tl.zeros_like(numbers) + k)
    high = tl.full([ROWS], float("inf"), tl.float32)
    # A bracket of two floats is halved 32 times at most; the limit only keeps a broken machine from hanging.
    rounds = 0
    while (tl.min(done.to(tl.int32), 0) == 0) & (rounds < 100):
        rounds += 1
        # Up from low: it is the k-th if fewer than k lie above it. If not, a new high from the lowest above it.
        best, above = bank_pass(
            query, query_rows, row_mask, descriptors, descriptor_stride, memory_slots, valid_blocks, blocks_per_frame,
            physical_frames, -low, -1.0, False, ROWS, COLUMNS, HEAD_DIM, DIM_TILE,
        )  # fmt: skip
        found = (done == 0) & (above < k)
        kth = tl.where(found, low, kth)
        ties_wanted = tl.where(found, k - above, ties_wanted)
        done = done | found
        next_high = -kth_or_infinity(best, above - k + 1)
        middle = score_of_key((sortable_key(low) >> 1) + (sortable_key(high) >> 1) + 1)
        bound = tl.where(next_high < high, next_high, middle)
        # Down from there: the k-th if just k reach it. If more do it is the new low, else that is the highest below it.
        best, below = bank_pass(
            query, query_rows, row_mask, descriptors, descriptor_stride, memory_slots, valid_blocks, blocks_per_frame,
            physical_frames, bound, 1.0, False, ROWS, COLUMNS, HEAD_DIM, DIM_TILE,
        )  # fmt: skip
        reach = numbers - below
        found = (done == 0) & (reach == k)
        kth = tl.where(found, bound, kth)
        ties_wanted = tl.where(found, k, ties_wanted)
        done = done | found
        low = tl.where(reach >= k, bound, tl.maximum(low, kth_or_infinity(best, k - reach)))
        high = tl.where(reach >= k, high, bound)
    return sortable_key(kth), ties_wanted


def plan_select_rows(
    queries: torch.Tensor,
    descriptors: torch.Tensor,
    top_k: int,
    memory_frames: torch.Tensor | None,
    memory_slots: torch.Tensor | None,
    blocks_per_frame: int,
) -> tuple[Launch, torch.Tensor]:
    """The launch that fills the indices of the rows `queries` (B, G, H, D), and that tensor. See `select_blocks`."""
    batch, groups, heads, head_dim = queries.shape
    physical_frames = descriptors.shape[1] // blocks_per_frame
    frames = physical_frames if memory_slots is None else memory_slots.shape[1]
    top_k = min(top_k, frames * blocks_per_frame)
    indices = torch.empty((batch, heads, groups, top_k), dtype=torch.int32, device=queries.device)
    tiles, options = select_rows_config(queries.dtype, head_dim, groups, top_k)
    arguments = dict(
        queries=queries,
        descriptors=descriptors,
        memory_frames=memory_frames,
        memory_slots=memory_slots,
        indices=indices,
        query_strides=queries.stride()[:3],
        descriptor_strides=descriptors.stride()[:3],
        frame_stride=0 if memory_frames is None else memory_frames.stride(0),
        slot_stride=0 if memory_slots is None else memory_slots.stride(0),
        groups=groups,
        frames=frames,
        blocks_per_frame=blocks_per_frame,
        physical_frames=physical_frames,
        top_k=top_k,
        HEADS_PER_KV_HEAD=heads // descriptors.shape[2],
        HEAD_DIM=head_dim,
        **tiles,
    )
    grid = (triton.cdiv(groups, tiles["ROWS"]) if top_k else 0, heads, batch)
    return Launch(select_rows_kernel, grid, arguments, options), indices
