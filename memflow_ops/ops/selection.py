"""Which blocks of the memory bank a query group attends to."""

from __future__ import annotations

from torch import Tensor

from memflow_ops.ops import checks, registration
from memflow_ops.ops.checks import check_slots
from memflow_ops.ops.registration import dispatch


def describe_blocks(k: Tensor, block_size: int, frame_tokens: int | None = None, *, impl: str = "auto") -> Tensor:
    """The descriptor of every block: the mean of its keys, accumulated in float32 and rounded once.

    Args:
        k: keys (B, Lm, Hkv, D) of whole frames; any strides with a contiguous last dimension.
        block_size: tokens per block. A block never crosses a frame, so the last block of a frame may be shorter.
        frame_tokens: tokens per frame (None: one frame of Lm tokens).
        impl: `auto` (by device), `reference`, `torch` or `triton`.

    Returns:
        (B, N, Hkv, D) in k's dtype, N = frames * ceil(frame_tokens / block_size).

    Raises:
        ValueError, TypeError: an argument is wrong; says what was got and what is expected.
    """
    checks.check_tensor("k", k, "B Lm Hkv D")
    block_size = checks.check_positive("block_size", block_size)
    frame = checks.frame_size(frame_tokens, k.shape[1], "k")
    checks.check_impl(impl)
    return registration.describe_blocks(k, min(block_size, frame), frame, dispatch.resolve(impl, k))


def select_blocks(
    q: Tensor,
    descriptors: Tensor,
    top_k: int,
    *,
    query_group: int | None = 128,
    memory_frames: Tensor | None = None,
    memory_slots: Tensor | None = None,
    blocks_per_frame: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """The `top_k` most relevant blocks of the bank for every query group.

    This is activation, SMA in MemFlow (arXiv 2512.14699), at the granularity of blocks and query groups.

    A group's descriptor is the float32 mean of its queries; a block's score is the dot product of the two
    descriptors, accumulated in float32. Equal scores go to the lower block, -0 equals +0, NaN ranks last.
    Not differentiable.

    Args:
        q: queries (B, Lq, H, D).
        descriptors: (B, N, Hkv, D) of `describe_blocks`; H is a multiple of Hkv.
        top_k: blocks per group; all of them if there are fewer.
        query_group: consecutive queries that share a selection (1: each its own; None: all of them).
        memory_frames: (B,) int32, how many leading frames of the bank are valid (None: all). Clamped, never read back.
        memory_slots: (B, F) int32, the slot table: frame j of the bank is frame `memory_slots[b, j]` of `descriptors`
            (None: frame j). Clamped, never read back.
        blocks_per_frame: blocks of a frame (None: the bank is one frame).
        impl: `auto` (by device), `reference`, `torch` or `triton`.

    Returns:
        (B, H, G, K) int32, G = ceil(Lq / query_group), K = min(top_k, blocks of the bank): block indices in bank order
        (frame of the bank * blocks_per_frame + block), ascending; unused entries at the end are -1.

    Raises:
        ValueError, TypeError: an argument is wrong; says what was got and what is expected.
    """
    checks.check_query(q)
    checks.check_tensor("descriptors", descriptors, "B N Hkv D", like=q)
    checks.check_heads(q, descriptors, "descriptors")
    top_k = checks.check_positive("top_k", top_k)
    group = checks.group_size(query_group, q.shape[1])
    blocks = (
        descriptors.shape[1]
        if blocks_per_frame is None
        else checks.check_positive("blocks_per_frame", blocks_per_frame)
    )
    blocks = max(blocks, 1)
    if descriptors.shape[1] % blocks:
        raise ValueError(f"descriptors must hold whole frames of {blocks} blocks, got {descriptors.shape[1]} blocks")
    checks.check_impl(impl)
    if memory_slots is not None:
        check_slots(memory_slots, q, descriptors.shape[1] // blocks)
    if memory_frames is not None:
        checks.check_integers("memory_frames", memory_frames, (q.shape[0],), q)
    return registration.select_blocks(
        q, descriptors, memory_frames, memory_slots, top_k, group, blocks, dispatch.resolve(impl, q)
    )
