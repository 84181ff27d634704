"""Small device functions and argument tuples that the kernels share."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Triton's interpreter multiplies the raw bits of bfloat16, truncates when it casts to it, and makes an integer of a
# condition that it spreads over a block. `matmul`, `cast` and `mask_if` below correct this.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A tensor as a kernel's argument: the tensor, which is a pointer in the kernel, and its first three strides.

    Strides are in elements. The last dimension of a tensor (B, L, H, D) or (B, H, G, K) is contiguous. Strides of None
    are those of another tensor that the kernel names: one offset for both saves registers.
    """

    pointer: Any
    strides: Any


def strided(tensor: torch.Tensor, like: torch.Tensor | None = None) -> Strided:
    """The tensor with its strides, or with None if they are those of `like`."""
    shared = like is not None and tensor.stride() == like.stride()
    return Strided(tensor, None if shared else tensor.stride()[:3])


@triton.jit
def strides_like(tensor, other):
    """The tensor with the strides of `other`, if it has none of its own."""
    if tensor.strides is None:
        tensor = Strided(tensor.pointer, other.strides)
    return tensor


@triton.jit
def row_pointers(tensor, batch, rows, head):
    """Pointers to rows [ROWS] int64 of one batch element and head of a tensor (B, L, H, D)."""
    # What all rows share is added first: it needs no registers per lane.
    return tensor.pointer + batch * tensor.strides[0] + head * tensor.strides[2] + rows * tensor.strides[1]


@triton.jit
def lse_pointers(lse, batch, head, rows):
    """Pointers to rows [ROWS] int64 of one batch element and head of a tensor (B, H, L)."""
    return lse.pointer + batch * lse.strides[0] + head * lse.strides[1] + rows * lse.strides[2]


@triton.jit
def load_rows(rows, row_mask, columns, HEAD_DIM: tl.constexpr):
    """The tile [ROWS, COLUMNS] of the rows at the pointers `rows`; masked or past HEAD_DIM it is 0 and not read."""
    return tl.load(rows[:, None] + columns[None, :], mask=row_mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def mask_if(condition, mask):
    """The mask where the scalar condition holds, and otherwise none of it."""
    mask = mask & condition
    if INTERPRETED:
        mask = mask != 0
    return mask


@triton.jit
def cast(x, dtype: tl.constexpr):
    """The float32 tile x rounded to the nearest of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def limited(variance, LARGEST: tl.constexpr):
    """The variance, at most LARGEST, so that half precisions can hold it; NaN stays."""
    return tl.where(variance > LARGEST, LARGEST, variance)


@triton.jit
def matmul(a, b, accumulator):
    """accumulator + a @ b in float32: half precisions on the tensor cores, float32 as IEEE products (no TF32)."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


class SoftmaxState(NamedTuple):
    """An attention under way: what its rows have accumulated over the keys so far."""

    row_max: Any
    """[BLOCK_M] float32: the largest scaled score in base 2, -inf before the first key."""
    row_sum: Any
    """[BLOCK_M] float32: the sum of the weights relative to row_max, 0 before the first key."""
    accumulator: Any
    """[BLOCK_M, DIM] float32: the sum of the weighted values."""


@triton.jit
def initial_state(
    resume,  # (out, lse) of the attention to continue, Strided (B, Lq, H, D) and (B, H, Lq); or None: start afresh
    batch,
    rows,  # [BLOCK_M] int64
    head,
    row_mask,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
):
    """The softmax state before the first key, or that of the attention to continue: an output is a sum of weight 1."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, DIM], tl.float32)
    if resume is not None:
        lse_rows = lse_pointers(resume[1], batch, head, rows)
        out_rows = row_pointers(resume[0], batch, rows, head)
        row_max = tl.load(lse_rows, mask=row_mask, other=float("-inf")) * LOG2_E
        started = row_max != float("-inf")
        row_sum = tl.where(started, 1.0, 0.0)
        accumulator = load_rows(out_rows, row_mask & started, tl.arange(0, DIM), HEAD_DIM).to(tl.float32)
    return SoftmaxState(row_max, row_sum, accumulator)


@triton.jit
def online_softmax_update(scores, scale_log2, wanted, row_max, row_sum):
    """One step of the softmax over a row whose scores arrive in tiles, in base 2.

    scores [ROWS, COLUMNS], -inf where there is no key; scale_log2: their scale times log2 e, above 0; wanted [ROWS]:
    rows that take part, or None: all; row_max, row_sum [ROWS] of scaled scores, -inf and 0 before the first key.
    Returns the tile's weights, the factor for what was accumulated before, and the new row_max and row_sum. The scale
    comes last so that a score costs one multiplication with addition.
    """
    tile_max = tl.max(scores, 1) * scale_log2
    if wanted is not None:
        tile_max = tl.where(wanted, tile_max, float("-inf"))
    new_max = tl.maximum(row_max, tile_max)
    # While a row has no key its maximum is -inf, and -inf - -inf is NaN.
    reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    correction = tl.math.exp2(row_max - reference)
    if wanted is not None:
        reference = tl.where(wanted, reference, float("inf"))
    weights = tl.math.exp2(scores * scale_log2 - reference[:, None])
    return weights, correction, new_max, row_sum * correction + tl.sum(weights, 1)


# triton 3.6.0 compiles no function that returns None, or a tuple that holds None. One that may have nothing to return
# returns an empty tuple, and else a tuple of one.


@triton.jit
def slots_of_batch(slots, batch, stride):
    """The pointer to the slot table of a batch element in a tuple, which is empty where there is no table (None)."""
    table = ()
    if slots is not None:
        table = (slots + batch * stride,)
    return table


@triton.jit
def stored_frame(table, frame, mask, stored_frames):
    """The number of each bank frame among the stored frames: by the slot table of this batch element, clamped.

    table: of slots_of_batch. Without one the stored frames are the bank, in order.
    """
    if len(table) == 0:
        slot = frame
    else:
        slot = tl.minimum(tl.maximum(tl.load(table[0] + frame, mask=mask, other=0), 0), stored_frames - 1)
    return slot
