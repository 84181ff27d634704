"""How relevant every past frame is to a prompt, and which to take: retrieval (NAM in MemFlow, arXiv 2512.14699)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memflow_ops.ops import checks, registration
from memflow_ops.ops.registration import dispatch

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
    """Score the frames of a history against a prompt; differentiable.

    `linear`: the mean over text tokens and heads of q . (mean key of the frame), as the authors released it.
    `softmax`: their equation S_i = mean(softmax(Q K^T / sqrt(d))), normalised over the blocks of all frames jointly
    (inside one frame it would be constant), a block counting as many times as it has tokens.

    Args:
        text_q: the prompt's queries (B, Lt, H, D).
        frame_keys: (B, F, n, Hkv, D), n block means per frame (1: frame means); H is a multiple of Hkv. Give keys
            from before RoPE: rotated means move with the frame index.
        text_lengths: (B,) int32, valid text tokens (None: all); padding takes no part.
        block_lengths: tokens of each of the n blocks (None: equal).
        softmax_scale: factor of the scores (None: 1/sqrt(D)).

    Returns:
        (B, F) float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument is wrong; says what was got and what is expected.
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
    weights = _block_weights(block_lengths, blocks, text_q)
    return registration.frame_relevance(
        text_q, frame_keys, text_lengths, weights, score, checks.scale_of(softmax_scale, text_q)
    )


def retrieve_frames(
    text_keys: Tensor,
    means: Tensor,
    count: int,
    *,
    score: str = "linear",
    rows: Tensor | None = None,
    text_lengths: Tensor | None = None,
    block_lengths: Sequence[int] | None = None,
    redundancy: float | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose the memory bank: up to `count` frames for each story, one choice for all layers.

    `linear`, `softmax`: the frames of the highest `frame_relevance`, averaged over layers, best first. A frame whose
    mean key (all layers and heads) has a larger cosine than `redundancy` with one already taken waits until there are
    no others. `coverage`: a word's relevance is shared out over the frames by a softmax over all candidates of its text
    key . frame mean (mean over heads, sum over layers); each time the frame is taken that adds most to the sum over
    words of sqrt(share gathered so far), so that every word is answered. Equal numbers go to the lower index; NaN ranks
    last. Not differentiable. A handful of launches however many layers there are; waits for nothing.

    Args:
        text_keys: the coming prompts' keys of the text cross-attention (layers, B, Lt, H, D).
        means: (layers, B, R, n, Hkv, D), n block means per stored frame (1: frame means), before RoPE; H is a multiple
            of Hkv.
        count: frames to take; all if there are fewer.
        score: "linear", "softmax" or "coverage".
        rows: (B, F) int32, which of the R stored frames are candidates (None: all, F = R). Clamped, never read back.
        text_lengths: (B,) int32, valid text tokens (None: all); padding takes no part. Clamped, never read back.
        block_lengths: tokens of each of the n blocks (None: equal).
        redundancy: a cosine, -1 to 1 (None: take the best whatever they look like); not with "coverage". The kernels
            hold a few times B * F^2 float32 for it.
        softmax_scale: factor of the products (None: 1/sqrt(D)).
        impl: `auto` (by device), `reference`, `torch` or `triton`.

    Returns:
        indices (B, K) int32 into the candidates, in the order of taking, K = min(count, F), and the scores of these
        (B, K) float32 (float64 for float64 inputs): relevance, for coverage the mean share over the words.

    Raises:
        ValueError, TypeError: an argument is wrong; says what was got and what is expected.
    """
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
    batch, candidates = text_keys.shape[1], means.shape[2]
    if rows is not None:
        checks.check_integers("rows", rows, (batch, -1), text_keys)
        candidates = rows.shape[1]
        if not candidates:
            raise ValueError("rows must name a candidate at least, got none")
    if text_lengths is not None:
        checks.check_integers("text_lengths", text_lengths, (batch,), text_keys)
    check_redundancy(redundancy, score)
    checks.check_impl(impl)
    weights = _block_weights(block_lengths, means.shape[3], text_keys)
    return registration.retrieve_frames(
        text_keys, means, rows, text_lengths, weights, min(checks.check_positive("count", count), candidates), score,
        redundancy, checks.scale_of(softmax_scale, text_keys), dispatch.resolve(impl, text_keys),
    )  # fmt: skip


def check_redundancy(redundancy: float | None, score: str) -> None:
    if redundancy is None:
        return
    if score == "coverage":
        raise ValueError("coverage has no redundancy limit: another frame for a word already answered adds little")
    if not -1 <= redundancy <= 1:
        raise ValueError(f"redundancy is a cosine, -1 to 1, or None, got {redundancy}")


def _block_weights(block_lengths: Sequence[int] | None, blocks: int, like: Tensor) -> Tensor:
    """(n,) float64, the share of each block in its frame."""
    lengths = (
        [1] * blocks if block_lengths is None else [checks.check_positive("block_lengths", n) for n in block_lengths]
    )
    if len(lengths) != blocks:
        raise ValueError(f"block_lengths must name the {blocks} blocks of a frame, got {len(lengths)}")
    # Filled, not copied from the host: that could not be part of a CUDA graph.
    weights = torch.full((blocks,), lengths[0] / sum(lengths), dtype=torch.float64, device=like.device)
    for block, length in enumerate(lengths):
        if length != lengths[0]:  # as a rule the last alone
            weights[block] = length / sum(lengths)
    return weights
