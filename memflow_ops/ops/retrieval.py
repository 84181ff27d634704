"""The relevance of past frames to a prompt, and the choice of the memory bank.

This is narrative adaptive memory (NAM) of MemFlow, arXiv 2512.14699.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memflow_ops.ops import checks, registration
from memflow_ops.ops.registration import dispatch
from memflow_ops.ops.transforms import refuse_transforms

SCORES = ("linear", "softmax")
RETRIEVAL_SCORES = (*SCORES, "coverage")


def frame_relevance(
    text_q: Tensor,
    frame_keys: Tensor,
    *,
    score: str = "linear",
    text_lengths: Tensor | None = None,
    block_lengths: Sequence[int] | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Score the frames of a history against a prompt. Differentiable.

    `linear` is the score of the code that the authors of MemFlow released: the mean of q . (mean key of the frame) over
    text tokens and heads. `softmax` is the equation of their paper, S_i = mean(softmax(Q K^T / sqrt(d))), with one
    softmax over the blocks of all frames, because a softmax over one frame would be constant. A block counts as often
    as it has tokens.

    Args:
        text_q: queries of the prompt, (B, Lt, H, D).
        frame_keys: the means of the n blocks of every frame, (B, F, n, Hkv, D); n = 1: means of whole frames. H is a
            multiple of Hkv. The keys should be from before RoPE, because rotated means change with the frame index.
        score: `linear` or `softmax`.
        text_lengths: the number of valid text tokens, (B,) int32; the rest is padding and takes no part. None: all.
        block_lengths: the number of tokens of each of the n blocks. None: all blocks have equally many.
        softmax_scale: the factor of the products. None: 1/sqrt(D).

    Returns:
        The scores (B, F) in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument is wrong. The message says what was given and what is expected.
    """
    checks.check_tensor("text_q", text_q, "B Lt H D")
    checks.check_tensor("frame_keys", frame_keys, "B F n Hkv D")
    if 0 in text_q.shape:
        raise ValueError(f"text_q must not be empty, got shape {tuple(text_q.shape)}")
    checks.check_device("frame_keys", frame_keys, text_q)
    checks.check_heads(text_q, frame_keys, "frame_keys")
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    if text_lengths is not None:
        checks.check_integers("text_lengths", text_lengths, (text_q.shape[0],), text_q)
    blocks = checks.check_positive("blocks of frame_keys", frame_keys.shape[2])
    weights = block_weights(block_lengths, blocks, text_q)
    return registration.frame_relevance(
        text_q, frame_keys, text_lengths, weights, score, checks.scale_of(softmax_scale, text_q)
    )


def retrieve_frames(
    text_keys: Tensor,
    means: Tensor,
    count: int,
    *,
    score: str = "linear",
    candidates: Tensor | None = None,
    text_lengths: Tensor | None = None,
    block_lengths: Sequence[int] | None = None,
    redundancy: float | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose the memory bank: up to `count` frames for each batch element, one choice for all layers.

    `linear` and `softmax` take the frames of the highest `frame_relevance`, averaged over the layers, best first. A
    frame is put behind all others while the cosine of its mean key (over all layers and heads) and that of a frame
    already taken is larger than `redundancy`.

    `coverage` answers every word of the prompt. The relevance of frames to a word is text key . mean key of the frame,
    averaged over heads and summed over layers; a softmax over all candidates makes shares of it. Each time that frame
    is taken which adds most to the sum over words of sqrt(share gathered so far).

    Equal numbers go to the lower index, and NaN ranks last. The number of launches does not depend on the number of
    layers, and the host waits for nothing. Not differentiable.

    Args:
        text_keys: the keys that text cross-attention has for the coming prompts, (layers, B, Lt, H, D).
        means: the means of the n blocks of every stored frame before RoPE, (layers, B, R, n, Hkv, D); n = 1: means of
            whole frames. H is a multiple of Hkv.
        count: the number of frames to take. All are taken if there are fewer.
        score: `linear`, `softmax` or `coverage`.
        candidates: which of the R stored frames can be chosen, (B, F) int32. None: all, F = R. Values are clamped to
            their range on the device; the host never reads them.
        text_lengths: the number of valid text tokens, (B,) int32; the rest is padding and takes no part. None: all.
            Values are clamped to their range on the device; the host never reads them.
        block_lengths: the number of tokens of each of the n blocks. None: all blocks have equally many.
        redundancy: a cosine from -1 to 1, not with `coverage`. None: frames may be alike. The kernels hold a few times
            B * F^2 float32 numbers for it.
        softmax_scale: the factor of the products. None: 1/sqrt(D).
        impl: `reference`, `torch`, `triton` or `auto`, as in `memory_attention`.

    Returns:
        Indices (B, K) int32 into the candidates in the order of taking, K = min(count, F), and the scores of these
        frames, (B, K) in float32 (float64 for float64 inputs): the relevance, or for `coverage` the mean share over the
        words.

    Raises:
        ValueError, TypeError: an argument is wrong. The message says what was given and what is expected.
        NotImplementedError: an input has a tangent, for a derivative in forward mode.
    """
    refuse_transforms("retrieve_frames", text_keys, means)
    checks.check_tensor("text_keys", text_keys, "layers B Lt H D")
    checks.check_tensor("means", means, "layers B R n Hkv D")
    if 0 in text_keys.shape or 0 in means.shape:
        raise ValueError(f"nothing must be empty, got text_keys {tuple(text_keys.shape)}, means {tuple(means.shape)}")
    if text_keys.shape[0] != means.shape[0]:
        raise ValueError(f"means must have the {text_keys.shape[0]} layers of text_keys, got {means.shape[0]}")
    checks.check_heads(text_keys[0], means[0], "means")
    checks.check_device("means", means, text_keys)
    if score not in RETRIEVAL_SCORES:
        raise ValueError(f"score must be one of {', '.join(RETRIEVAL_SCORES)}, got {score!r}")
    batch, frames = text_keys.shape[1], means.shape[2]
    if candidates is not None:
        checks.check_integers("candidates", candidates, (batch, -1), text_keys)
        frames = candidates.shape[1]
        if not frames:
            raise ValueError("candidates must name a frame at least, got none")
    if text_lengths is not None:
        checks.check_integers("text_lengths", text_lengths, (batch,), text_keys)
    check_redundancy(redundancy, score)
    checks.check_impl(impl)
    weights = block_weights(block_lengths, means.shape[3], text_keys)
    count = min(checks.check_positive("count", count), frames)
    scale = checks.scale_of(softmax_scale, text_keys)
    redundancy = None if redundancy is None else float(redundancy)
    tensors = (text_keys, means, candidates, text_lengths, weights)
    return registration.retrieve_frames(*tensors, count, score, redundancy, scale, dispatch.resolve(impl, text_keys))


def check_redundancy(redundancy: float | None, score: str) -> None:
    """`redundancy` is None, or a cosine and the score one that has such a limit."""
    if redundancy is None:
        return
    if score == "coverage":
        raise ValueError("coverage has no redundancy limit: another frame for a word already answered adds little")
    if not -1 <= redundancy <= 1:
        raise ValueError(f"redundancy is a cosine, -1 to 1, or None, got {redundancy}")


def block_weights(block_lengths: Sequence[int] | None, blocks: int, like: Tensor) -> Tensor:
    """The share of each block in its frame, (n,) float64."""
    lengths = [1] * blocks
    if block_lengths is not None:
        lengths = [checks.check_positive("block_lengths", n) for n in block_lengths]
    if len(lengths) != blocks:
        raise ValueError(f"block_lengths must name the {blocks} blocks of a frame, got {len(lengths)}")
    # The tensor is filled, because a copy from the host could not be part of a CUDA graph.
    weights = torch.full((blocks,), lengths[0] / sum(lengths), dtype=torch.float64, device=like.device)
    for block, length in enumerate(lengths):
        if length != lengths[0]:  # Usually this is the last block alone.
            weights[block] = length / sum(lengths)
    return weights
