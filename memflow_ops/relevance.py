"""How relevant every past frame is to a text prompt: the score behind retrieval (NAM in MemFlow, arXiv 2512.14699)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memflow_ops import checks, ops

SCORES = ("linear", "softmax")


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
    lengths = (
        [1] * blocks if block_lengths is None else [checks.check_positive("block_lengths", n) for n in block_lengths]
    )
    if len(lengths) != blocks:
        raise ValueError(f"block_lengths must name the {blocks} blocks of a frame, got {len(lengths)}")
    weights = torch.tensor(lengths, dtype=torch.float64, device=text_q.device) / sum(lengths)
    return ops.frame_relevance(text_q, frame_keys, text_lengths, weights, score, checks.scale_of(softmax_scale, text_q))
