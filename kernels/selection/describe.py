"""Block descriptors: the mean of each block's keys. The same kernel makes the means of query groups."""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.integers import cdiv, next_power_of_2
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import cast, load_rows


# FLOPs: one addition per element. Bytes: every token once, every mean once; bound by memory.
@triton.jit
def block_means_kernel(
    tokens,  # (B, L, H, D)
    means,  # (B, N, H, D)
    token_strides,  # (B, L, H), in elements
    mean_strides,  # (B, N, H)
    block_size,
    frame_tokens,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
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
    for start in range(0, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = load_rows(base + rows.to(tl.int64) * token_strides[1], rows < length, columns, HEAD_DIM)
        total += tl.sum(tile.to(tl.float32), 0)
    # The division is correctly rounded, so that equal sums give equal means on every device.
    mean = tl.div_rn(total, tl.zeros([COLUMNS], tl.float32) + length.to(tl.float32))
    target = means + batch * mean_strides[0] + index.to(tl.int64) * mean_strides[1] + head * mean_strides[2]
    tl.store(target + columns, cast(mean, means.dtype.element_ty), mask=columns < HEAD_DIM)


def plan_block_means(
    tokens: torch.Tensor, block_size: int, frame_tokens: int, dtype: torch.dtype
) -> tuple[Launch, torch.Tensor]:
    """The launch that fills the means (B, N, H, D) of `dtype`, and the means. See `describe_blocks`."""
    batch, length, heads, head_dim = tokens.shape
    blocks = length // frame_tokens * cdiv(frame_tokens, block_size) if frame_tokens else 0
    means = torch.empty((batch, blocks, heads, head_dim), dtype=dtype, device=tokens.device)
    columns = next_power_of_2(head_dim)
    arguments = dict(
        tokens=tokens,
        means=means,
        token_strides=tokens.stride()[:3],
        mean_strides=means.stride()[:3],
        block_size=block_size,
        frame_tokens=frame_tokens,
        HEAD_DIM=head_dim,
        ROWS=min(next_power_of_2(block_size), 8192 // columns),
        COLUMNS=columns,
    )
    return Launch(block_means_kernel, (blocks, heads, batch), arguments, dict(num_warps=4, num_stages=2)), means


def describe_blocks(k: torch.Tensor, block_size: int, frame_tokens: int) -> torch.Tensor:
    """The descriptors of the blocks of k: float32 means over the tokens of a block, rounded once to k's dtype.

    k (B, L, H, D), L a multiple of frame_tokens, last dimension contiguous -> (B, N, H, D) with
    N = L / frame_tokens * ceil(frame_tokens / block_size): blocks never cross a frame, the last may be short.
    """
    launch, means = plan_block_means(k, block_size, frame_tokens, k.dtype)
    launch.run()
    return means
