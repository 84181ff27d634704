"""Descriptors of the blocks of a memory bank, and the selection of the blocks that queries attend to."""

from __future__ import annotations

from torch import Tensor

from memflow_ops.geometry import Score
from memflow_ops.impl.precision import as_autocast_does
from memflow_ops.ops import checks, registration
from memflow_ops.ops.registration import dispatch
from memflow_ops.ops.transforms import refuse_transforms


def describe_blocks(
    k: Tensor, block_size: int, frame_tokens: int | None = None, *, moments: int = 1, impl: str = "auto"
) -> Tensor:
    """Describe every block of a memory bank by the mean of its keys, and on request by their variance.

    Both are accumulated in float32 (float64 for float64 keys) and rounded once. A variance is the mean of the squared
    differences to the mean, and at most the largest finite number of the dtype. Differentiable in reverse mode.

    Args:
        k: keys (B, Lm, Hkv, D) in whole frames of `frame_tokens`. The last dimension is contiguous; the other strides
            are free.
        block_size: tokens per block. A block never crosses a frame, so the last block of a frame may be shorter.
        frame_tokens: tokens per frame. None: k is one frame.
        moments: 1 for means, which the score "mean" ranks by; 2 for means and variances, for the other scores.
        impl: `reference`, `torch`, `triton` or `auto`, as in `memory_attention`.

    Returns:
        The descriptors (B, N, Hkv, moments * D) in the dtype of k, where N = frames * ceil(frame_tokens / block_size).
        With two moments, D means are followed by D variances, so the first half is what one moment gives.

    Raises:
        ValueError, TypeError: an argument is wrong. The message says what was given and what is expected.
        NotImplementedError: k has a tangent, for a derivative in forward mode.
    """
    refuse_transforms("describe_blocks", k)
    checks.check_tensor("k", k, "B Lm Hkv D")
    block_size = checks.check_positive("block_size", block_size)
    frame = checks.frame_size(frame_tokens, k.shape[1], "k")
    moments = checks.check_moments(moments)
    checks.check_impl(impl)
    return registration.describe_blocks(k, min(block_size, frame), frame, moments, dispatch.resolve(impl, k))


def select_blocks(
    q: Tensor,
    descriptors: Tensor,
    top_k: int,
    *,
    query_group: int | None = 128,
    memory_frames: Tensor | None = None,
    memory_slots: Tensor | None = None,
    blocks_per_frame: int | None = None,
    score: Score = "mean",
    softmax_scale: float | None = None,
    block_size: int | None = None,
    frame_tokens: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Select the `top_k` most relevant blocks of a memory bank for every query group.

    This is the choice that sparse memory activation (SMA) of MemFlow, arXiv 2512.14699, makes, with blocks and query
    groups in the place of frames and chunks.

    With the score "mean" a group is described by the mean of its queries, and the score of a block is the dot product
    of the group's and the block's descriptor. With "moments" the score of a block of n keys is an estimate of the
    logarithm of all weight that its keys have in the softmax, log n + s q . mean + s^2 / 2 * sum(q^2 variance) with the
    scale s, averaged over the queries q of the group; whatever is the same for all blocks is left out. With
    "normalised" each 32 consecutive queries of a group, a part, have such scores x, and the score of a block is the
    logarithm of the sum over the parts of n exp(x) over the sum of exp(x) over all blocks, with the n queries of the
    part: no part outvotes another by the size of its scores. Groups of one part are ranked as by moments. Scores are at
    least as exact as IEEE float32 (float64 for float64 inputs), whatever precision torch is told to use for products.
    Equal scores go to the lower block, -0 equals +0, and NaN ranks last. Every batch element and every query head
    selects for itself. Not differentiable.

    Args:
        q: queries (B, Lq, H, D).
        descriptors: what `describe_blocks` gives, (B, N, Hkv, D), or but for the score "mean" (B, N, Hkv, 2 D)
            with variances. H is a multiple of Hkv.
        top_k: the number of blocks for each group. All blocks are selected if there are fewer.
        query_group: the number of consecutive queries that share a selection. 1: every query has its own. None: all
            queries share one.
        memory_frames: how many of the leading frames of the bank are valid, int32: (B,) for all query groups, or (B, G)
            for each of them, as a causal model needs it. None: all are. Values are clamped to their range on the
            device; the host never reads them.
        memory_slots: the slot table (B, F) int32: frame j of the bank is frame `memory_slots[b, j]` of `descriptors`.
            None: it is frame j. Values are clamped to their range on the device; the host never reads them.
        blocks_per_frame: the number of blocks of a frame. None: the bank is one frame, or what block_size and
            frame_tokens say.
        score: what blocks are ranked by, `mean`, `moments` or `normalised`.
        softmax_scale: the scale s. None: 1/sqrt(D). The order of "mean" does not depend on it.
        block_size, frame_tokens: tokens per block and per frame, both or neither. Other scores than "mean" need them
            where the last block of a frame is shorter than the others. None: all blocks have the same length.
        impl: `reference`, `torch`, `triton` or `auto`, as in `memory_attention`.

    Returns:
        Indices (B, H, G, K) int32, where G = ceil(Lq / query_group) and K = min(top_k, blocks of the bank). Block i of
        frame j of the bank has the index j * blocks_per_frame + i. Indices ascend; unused entries at the end are -1.

    Raises:
        ValueError, TypeError: an argument is wrong. The message says what was given and what is expected.
    """
    q, descriptors = as_autocast_does(q, descriptors)
    checks.check_query(q)
    checks.check_score(score)
    checks.check_tensor("descriptors", descriptors, "B N Hkv D", like=q)
    checks.check_descriptor_heads(q, descriptors, score)
    top_k = checks.check_positive("top_k", top_k)
    group = checks.group_size(query_group, q.shape[1])
    scale = checks.scale_of(softmax_scale, q)
    size, frame = checks.sizes_of_blocks(block_size, frame_tokens, blocks_per_frame, descriptors.shape[1])
    blocks = -(-frame // size)
    if descriptors.shape[1] % blocks:
        raise ValueError(f"descriptors must hold whole frames of {blocks} blocks, got {descriptors.shape[1]} blocks")
    checks.check_impl(impl)
    if memory_slots is not None:
        checks.check_slots(memory_slots, q, descriptors.shape[1] // blocks)
    if memory_frames is not None:
        checks.check_frame_counts(memory_frames, q, -(-q.shape[1] // group))
    sizes = (top_k, size, frame, group, scale, score)
    return registration.select_blocks(q, descriptors, memory_frames, memory_slots, *sizes, dispatch.resolve(impl, q))
