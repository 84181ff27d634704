"""Block descriptors: the mean of each block's keys, and their variance. The same kernel describes query groups."""

from typing import Literal

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.integers import cdiv, next_power_of_2
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import cast, limited, load_rows

Second = Literal["none", "variance", "square"]
"""What stands behind the means: nothing; the variances; or the means of the squares, with factors for both."""


# FLOPs: one addition per element, 3 for variances, 2 for squares. Bytes: every token once (for variances once more,
# mostly from L2), every mean once; bound by memory.
@triton.jit
def block_means_kernel(
    tokens,  # (B, L, H, D)
    means,  # (B, N, H, D), or (B, N, H, 2 D) with a second part
    token_strides,  # (B, L, H), in elements
    mean_strides,  # (B, N, H)
    block_size,
    frame_tokens,
    factors,  # of the means and of the means of squares; or None
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SECOND: tl.constexpr,
    LARGEST: tl.constexpr,  # of the dtype of the means: no variance is larger
):
    index = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    blocks_per_frame = tl.cdiv(frame_tokens, block_size)
    offset = (index % blocks_per_frame) * block_size
    length = tl.minimum(block_size, frame_tokens - offset)
    first = (index // blocks_per_frame).to(tl.int64) * frame_tokens + offset

    columns = tl.arange(0, COLUMNS)
    base = tokens + batch * token_strides[0] + first * token_strides[1] + head * token_strides[2]
    total = tl.zeros([COLUMNS], tl.float32)
    squares = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = load_rows(base + rows.to(tl.int64) * token_strides[1], rows < length, columns, HEAD_DIM).to(tl.float32)
        total += tl.sum(tile, 0)
        if SECOND == "square":
            squares += tl.sum(tile * tile, 0)
    # The division is correctly rounded, so that equal sums give equal means on every device.
    count = tl.zeros([COLUMNS], tl.float32) + length.to(tl.float32)
    mean = tl.div_rn(total, count)
    target = means + batch * mean_strides[0] + index.to(tl.int64) * mean_strides[1] + head * mean_strides[2] + columns
    if SECOND == "square":
        mean = mean * factors[0]
        tl.store(target + HEAD_DIM, tl.div_rn(squares, count) * factors[1], mask=columns < HEAD_DIM)
    tl.store(target, cast(mean, means.dtype.element_ty), mask=columns < HEAD_DIM)
    if SECOND == "variance":
        # A second pass, because the mean of squares less the square of the mean cancels where keys lie far from 0.
        for start in range(0, length, ROWS):
            rows = start + tl.arange(0, ROWS)
            tile = load_rows(base + rows.to(tl.int64) * token_strides[1], rows < length, columns, HEAD_DIM)
            distance = tl.where((rows < length)[:, None], tile.to(tl.float32) - mean[None, :], 0.0)
            squares += tl.sum(distance * distance, 0)
        variance = limited(tl.div_rn(squares, count), LARGEST)
        tl.store(target + HEAD_DIM, cast(variance, means.dtype.element_ty), mask=columns < HEAD_DIM)


def plan_block_means(
    tokens: torch.Tensor,
    block_size: int,
    frame_tokens: int,
    dtype: torch.dtype,
    second: Second = "none",
    factors: tuple[float, float] | None = None,
    means: torch.Tensor | None = None,
) -> tuple[Launch, torch.Tensor]:
    """The launch that fills the means (B, N, H, D) of `dtype`, or with a second part (B, N, H, 2 D), and these.

    See `describe_blocks`. factors: of the means and of the means of squares, for "square". means: is filled, and
    contiguous in its last dimension; None: a new tensor.
    """
    batch, length, heads, head_dim = tokens.shape
    blocks = length // frame_tokens * cdiv(frame_tokens, block_size) if frame_tokens else 0
    width = head_dim if second == "none" else 2 * head_dim
    if means is None:
        means = torch.empty((batch, blocks, heads, width), dtype=dtype, device=tokens.device)
    columns = next_power_of_2(head_dim)
    arguments = dict(
        tokens=tokens,
        means=means,
        token_strides=tokens.stride()[:3],
        mean_strides=means.stride()[:3],
        block_size=block_size,
        frame_tokens=frame_tokens,
        factors=factors,
        HEAD_DIM=head_dim,
        ROWS=min(next_power_of_2(block_size), 8192 // columns),
        COLUMNS=columns,
        SECOND=second,
        LARGEST=torch.finfo(dtype).max,
    )
    return Launch(block_means_kernel, (blocks, heads, batch), arguments, dict(num_warps=4, num_stages=2)), means


def describe_blocks(k: torch.Tensor, block_size: int, frame_tokens: int, moments: int = 1) -> torch.Tensor:
    """The descriptors of the blocks of k: float32 means over the tokens of a block, rounded once to k's dtype.

    k (B, L, H, D), L a multiple of frame_tokens, last dimension contiguous -> (B, N, H, moments * D) with
    N = L / frame_tokens * ceil(frame_tokens / block_size): blocks never cross a frame, the last may be short.
    With two moments variances stand behind the means, limited to the largest number of k's dtype.
    """
    launch, means = plan_block_means(k, block_size, frame_tokens, k.dtype, "variance" if moments == 2 else "none")
    launch.run()
    return means
