"""What the kernels share: tile loads, products, rounding, the online softmax, the slot table."""

import triton
import triton.language as tl

# Triton's interpreter multiplies the raw bits of bfloat16 and truncates when it casts to it: both are put right below.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(rows, row_mask, columns, HEAD_DIM: tl.constexpr):
    """The tile [ROWS, COLUMNS] of the rows at the pointers `rows`; masked or past HEAD_DIM it is 0 and not read."""
    return tl.load(rows[:, None] + columns[None, :], mask=row_mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """The float32 tile x rounded to the nearest of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def matmul(a, b, accumulator):
    """accumulator + a @ b in float32: half precisions on the tensor cores, float32 as IEEE products (no TF32)."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def initial_state(
    resume_rows,  # [BLOCK_M] pointers to the rows of an output, or None: start afresh
    resume_lse_rows,  # [BLOCK_M] pointers, natural logarithm
    row_mask,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
):
    """The softmax state before the first key, or that of the attention to continue: an output is a sum of weight 1."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, DIM], tl.float32)
    if resume_rows is not None:
        row_max = tl.load(resume_lse_rows, mask=row_mask, other=float("-inf")) * LOG2_E
        started = row_max != float("-inf")
        row_sum = tl.where(started, 1.0, 0.0)
        accumulator = load_rows(resume_rows, row_mask & started, tl.arange(0, DIM), HEAD_DIM).to(tl.float32)
    return row_max, row_sum, accumulator


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


@triton.jit
def physical_frame(memory_slots, frame, mask, physical_frames):
    """Where in memory the bank's frames lie: by the slot table of this batch (clamped), or in order without one."""
    if memory_slots is None:
        slot = frame
    else:
        slot = tl.minimum(tl.maximum(tl.load(memory_slots + frame, mask=mask, other=0), 0), physical_frames - 1)
    return slot
