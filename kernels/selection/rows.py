"""Selection for many rows: each query (or query group) of a tile finds its own top-k blocks, exactly.

The scores of a tile of rows against the whole bank do not fit in registers and must not reach memory, so each of a few
passes computes them again: on the tensor cores that costs less than keeping a sorted list. The passes look for the k-th
highest score of each row. A pass counts the scores that reach a bound, and keeps for each column of the tile the best
score that does not reach it: the blocks of a column (j, j + COLUMNS, j + 2 * COLUMNS, ...) form a class. The k best
class maxima belong to k blocks, so the k-th of them is a lower bound, and a close one: among 1600 unrelated blocks in
64 classes 30 reach it for k = 24. From there passes alternate, up by class minima and down by class maxima, until the
count says that the bound is the k-th score. Where a class hides the next score, the bracket is halved. A last pass
writes the blocks above the k-th score, and the first ones of those equal to it. Three to five passes are usual.

The result is exact because every pass computes a score by the same instructions, so that it has the same bits.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.configs import select_rows_config
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import load_rows, row_pointers, strided
from memflow_ops.kernels.selection.ranking import fill_unused, kth_key, score_of_key, sortable_key, write_chosen
from memflow_ops.kernels.selection.scores import (
    DescribedBank,
    add_length,
    choosable,
    descriptor_pointers,
    descriptors_of_head,
    score_tile,
    valid_blocks_of_rows,
)


@triton.jit
def bank_pass(
    query, query_rows, row_mask, descriptors, valid_blocks, each, bound, sign,
    FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr,
    BY_GROUP: tl.constexpr,
):  # fmt: skip
    """One pass over the scores times `sign`: the best score of each class below `bound` [ROWS], and how many lie below.

    Returns the best [ROWS, COLUMNS], -inf where a class has none below the bound, and the counts [ROWS]. The first
    pass has no bound: all numbers count.
    """
    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for first in range(0, valid_blocks, COLUMNS):
        blocks = first + tl.arange(0, COLUMNS)
        valid = blocks < valid_blocks
        rows = descriptor_pointers(descriptors, blocks, valid)
        scores = score_tile(query, query_rows, row_mask, rows, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
        scores = sign * add_length(scores, descriptors, blocks[None, :])
        if BY_GROUP:
            scores = tl.where(choosable(blocks, each, BY_GROUP), scores, float("nan"))
        below = scores == scores if FIRST else scores < bound[:, None]
        best = tl.maximum(best, tl.where(below, scores, float("-inf")))
        count += tl.sum(below.to(tl.int32), 1)
    return best, count


@triton.jit
def kth_or_infinity(best, k):
    """The k-th largest of each row of `best` [ROWS, COLUMNS], -inf where there are fewer numbers."""
    kth = score_of_key(kth_key(sortable_key(best), tl.maximum(k, 1)))  # NaN if k is more than the classes
    return tl.where(kth == kth, kth, float("-inf"))


# FLOPs: 2 * rows * N * D per pass, usually 4 or 5 passes; one where k >= N. Bytes: the rows and the descriptors, which
# stay in L2, and k indices per row. Bound by instructions: some ten per score and pass.
@triton.jit
def select_rows_kernel(
    queries,  # Strided (B, G, H, D)
    bank,  # DescribedBank
    indices,  # (B, H, G, K) int32, contiguous
    groups,
    top_k,
    HEADS_PER_KV_HEAD: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM_TILE: tl.constexpr,  # on tensor cores HEAD_DIM rounded up to a power of two
    BY_GROUP: tl.constexpr,  # groups differ in how many frames are valid
):
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < groups
    query_rows = row_pointers(queries, batch, rows.to(tl.int64), head)
    descriptors = descriptors_of_head(bank, batch, head // HEADS_PER_KV_HEAD)
    valid_blocks, each = valid_blocks_of_rows(bank, batch, rows, row_mask, BY_GROUP)
    query = load_rows(query_rows, row_mask, tl.arange(0, DIM_TILE), HEAD_DIM) if TENSOR_CORES else None

    # With at most k valid blocks all are chosen, and no score is computed: a k-th key of 0 lies below every valid one.
    ranked = valid_blocks > top_k
    kth = tl.zeros([ROWS], tl.uint32)
    ties_wanted = tl.zeros([ROWS], tl.int32) + top_k
    if ranked:
        kth, ties_wanted = kth_of_bank(
            query, query_rows, row_mask, descriptors, valid_blocks, each, top_k, ROWS, COLUMNS, HEAD_DIM, DIM_TILE,
            BY_GROUP,
        )  # fmt: skip

    output_rows = indices + ((batch * tl.num_programs(1) + head) * groups + rows) * top_k
    taken = tl.zeros([ROWS], tl.int32)
    for first in range(0, valid_blocks, COLUMNS):
        blocks = first + tl.arange(0, COLUMNS)
        valid = blocks < valid_blocks
        if ranked:
            pointers = descriptor_pointers(descriptors, blocks, valid)
            scores = score_tile(query, query_rows, row_mask, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
            scores = add_length(scores, descriptors, blocks[None, :])
        else:
            scores = tl.zeros([ROWS, COLUMNS], tl.float32)
        keys = tl.where(choosable(blocks, each, BY_GROUP), sortable_key(scores), 0).to(tl.uint32)
        ties_wanted, taken = write_chosen(output_rows, row_mask, first, keys, kth, ties_wanted, taken)
    fill_unused(output_rows, row_mask, taken, top_k, -1)


@triton.jit
def kth_of_bank(
    query, query_rows, row_mask, descriptors, valid_blocks, each, k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, BY_GROUP: tl.constexpr,
):  # fmt: skip
    """The sortable key of each row's k-th highest score, and how many of the scores equal to it are among the k best.

    For a row that is not done, at least k scores reach `low`, and fewer than k reach `high` unless it is infinite.
    """
    best, numbers = bank_pass(
        query, query_rows, row_mask, descriptors, valid_blocks, each, None, 1.0, True, ROWS, COLUMNS, HEAD_DIM,
        DIM_TILE, BY_GROUP,
    )  # fmt: skip
    # Where at most k scores are numbers, NaN is the k-th.
    kth = tl.full([ROWS], float("nan"), tl.float32)
    ties_wanted = k - numbers
    done = (numbers <= k) | (row_mask == 0)
    low = kth_or_infinity(best, tl.zeros_like(numbers) + k)
    high = tl.full([ROWS], float("inf"), tl.float32)
    # A bracket of two floats can be halved 32 times; the limit only keeps a faulty device from hanging.
    rounds = 0
    while (tl.min(done.to(tl.int32), 0) == 0) & (rounds < 100):
        rounds += 1
        # Up from low, which is the k-th score if fewer than k lie above it. If not, those above give a new high.
        best, above = bank_pass(
            query, query_rows, row_mask, descriptors, valid_blocks, each, -low, -1.0, False, ROWS, COLUMNS, HEAD_DIM,
            DIM_TILE, BY_GROUP,
        )  # fmt: skip
        found = (done == 0) & (above < k)
        kth = tl.where(found, low, kth)
        ties_wanted = tl.where(found, k - above, ties_wanted)
        done = done | found
        next_high = -kth_or_infinity(best, above - k + 1)
        middle = score_of_key((sortable_key(low) >> 1) + (sortable_key(high) >> 1) + 1)
        bound = tl.where(next_high < high, next_high, middle)
        # Down from the bound, which is the k-th score if exactly k reach it. If more do, it is the new low.
        # If fewer do, those below it give the new low.
        best, below = bank_pass(
            query, query_rows, row_mask, descriptors, valid_blocks, each, bound, 1.0, False, ROWS, COLUMNS, HEAD_DIM,
            DIM_TILE, BY_GROUP,
        )  # fmt: skip
        reach = numbers - below
        found = (done == 0) & (reach == k)
        kth = tl.where(found, bound, kth)
        ties_wanted = tl.where(found, k, ties_wanted)
        done = done | found
        low = tl.where(reach >= k, bound, tl.maximum(low, kth_or_infinity(best, k - reach)))
        high = tl.where(reach >= k, high, bound)
    return sortable_key(kth), ties_wanted


def plan_select_rows(queries: torch.Tensor, bank: DescribedBank, top_k: int) -> tuple[Launch, torch.Tensor]:
    """The launch that fills the indices of the rows `queries` (B, G, H, D), and the indices. See `select_blocks`."""
    batch, groups, heads, head_dim = queries.shape
    top_k = min(top_k, bank.frames * bank.blocks_per_frame)
    indices = torch.empty((batch, heads, groups, top_k), dtype=torch.int32, device=queries.device)
    tiles, options = select_rows_config(queries.dtype, head_dim, groups, top_k)
    arguments = dict(
        queries=strided(queries),
        bank=bank,
        indices=indices,
        groups=groups,
        top_k=top_k,
        HEADS_PER_KV_HEAD=heads // bank.descriptors.pointer.shape[2],
        HEAD_DIM=head_dim,
        BY_GROUP=bank.valid_strides is not None and bank.valid_strides[1] is not None,
        **tiles,
    )
    grid = (cdiv(groups, tiles["ROWS"]) if top_k else 0, heads, batch)
    return Launch(select_rows_kernel, grid, arguments, options), indices
