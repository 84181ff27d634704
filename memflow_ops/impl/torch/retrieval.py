"""The relevance of frames and the choice of the memory bank, vectorised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.impl.precision import wide_dtype, without_autocast


def retrieve_frames(
    text_keys: Tensor,
    means: Tensor,
    candidates: Tensor | None,
    text_lengths: Tensor | None,
    weights: Tensor,
    *,
    count: int,
    score: str,
    redundancy: float | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(text_keys.dtype, means.dtype)
    layers = means_by_layer(means, candidates)
    if score == "coverage":
        shares = word_shares(word_logits(text_keys, layers, weights, softmax_scale, wide), text_lengths)
        indices, scores = cover(shares, count), mean_share(shares, text_lengths)
    else:
        scores = finite(mean_relevance(text_keys, layers, text_lengths, weights, score, softmax_scale, wide))
        cosines = None
        if redundancy is not None:
            every = torch.stack(list(means_by_layer(means, candidates)))
            directions = F.normalize(frame_vectors(every, weights, wide), dim=-1)
            cosines = directions @ directions.mT
        indices = take_unlike(scores, cosines, count, redundancy)
    return indices.int(), scores.gather(1, indices)


def means_by_layer(means: Tensor, candidates: Tensor | None) -> Iterator[Tensor]:
    """The means (B, F, n, Hkv, D) of the candidates, layer by layer: a history may be long, and its means large."""
    if candidates is None:
        yield from means
        return
    each = torch.arange(means.shape[1], dtype=torch.int64, device=means.device)[:, None]
    rows = candidates.clamp(0, means.shape[2] - 1).long()
    for of_layer in means:
        yield of_layer[each, rows]


def mean_relevance(
    text_keys: Tensor,
    layers: Iterable[Tensor],
    text_lengths: Tensor | None,
    weights: Tensor,
    score: str,
    softmax_scale: float,
    wide: torch.dtype,
) -> Tensor:
    """`frame_relevance` (B, F) in `wide`, averaged over the layers."""
    scores = torch.zeros((), dtype=wide, device=text_keys.device)
    # One layer at a time, because softmax makes words x blocks numbers of it.
    for text, of_layer in zip(text_keys, layers, strict=True):
        scores = scores + frame_relevance(text.to(wide), of_layer.to(wide), text_lengths, weights, score, softmax_scale)
    return scores / len(text_keys)


def finite(scores: Tensor) -> Tensor:
    """The scores, with a NaN as a number that ranks last."""
    return scores.nan_to_num(nan=torch.finfo(torch.float32).min)


def frame_vectors(means: Tensor, weights: Tensor, wide: torch.dtype) -> Tensor:
    """The mean key of every frame over all layers and heads, (B, F, layers * Hkv * D)."""
    return torch.einsum("lbfnkd,n->bflkd", means.to(wide), weights.to(wide)).flatten(2)


def word_logits(
    text_keys: Tensor, layers: Iterable[Tensor], weights: Tensor, scale: float, wide: torch.dtype
) -> Tensor:
    """Text key . mean key of the frame, averaged over heads and summed over layers, (B, Lt, F)."""
    logits = torch.zeros((), dtype=wide, device=text_keys.device)
    for text, of_layer in zip(text_keys, layers, strict=True):
        frame_means = torch.einsum("bfnkd,n->bfkd", of_layer.to(wide), weights.to(wide))
        grouped = (
            text.to(wide).unflatten(2, (frame_means.shape[2], -1)).mean(3)
        )  # The mean over the heads that share a key head.
        logits = logits + torch.einsum("bwkd,bfkd->bwf", grouped, frame_means) * (scale / grouped.shape[2])
    return logits


def word_shares(logits: Tensor, lengths: Tensor | None) -> Tensor:
    """The shares (B, Lt, F) of the frames in every word: they add up to 1, and to 0 for padding."""
    shares = finite(logits).softmax(-1)
    if lengths is None:
        return shares
    words = torch.arange(shares.shape[1], dtype=torch.int64, device=shares.device)
    return shares.masked_fill((words >= lengths[:, None])[..., None], 0.0)


def mean_share(shares: Tensor, lengths: Tensor | None) -> Tensor:
    """The mean share (B, F) of each frame over the words that are no padding."""
    return shares.sum(1) / (shares.shape[1] if lengths is None else lengths.clamp(1, shares.shape[1])[:, None])


def take_unlike(scores: Tensor, cosines: Tensor | None, count: int, redundancy: float | None) -> Tensor:
    """Indices (B, K) in the order of taking, best first. A frame that is alike to one already taken comes behind all
    others."""
    each = torch.arange(len(scores), dtype=torch.int64, device=scores.device)
    left, alike = scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
    order = []
    for _ in range(count):
        best_unlike, index = left.masked_fill(alike, -torch.inf).max(1)
        index = torch.where(best_unlike > -torch.inf, index, left.argmax(1))
        order.append(index)
        left[each, index] = -torch.inf
        if cosines is not None and redundancy is not None:
            alike |= cosines[each, index] > redundancy
    return torch.stack(order, dim=1)


def cover(shares: Tensor, count: int) -> Tensor:
    """Indices (B, K) in the order of taking: each time what adds most to the sum over words of sqrt(share gathered)."""
    batch, words, frames = shares.shape
    each = torch.arange(batch, dtype=torch.int64, device=shares.device)
    gathered = shares.new_zeros(batch, words, 1)
    taken = torch.zeros(batch, frames, dtype=torch.bool, device=shares.device)
    order = []
    for _ in range(count):
        gain = ((gathered + shares).sqrt() - gathered.sqrt()).sum(1)
        index = gain.masked_fill(taken, -1).argmax(1)
        order.append(index)
        taken[each, index] = True
        gathered = gathered + shares[each, :, index][..., None]
    return torch.stack(order, dim=1)


def frame_relevance(
    text_q: Tensor,
    frame_keys: Tensor,
    text_lengths: Tensor | None,
    block_weights: Tensor,
    score: str,
    softmax_scale: float,
) -> Tensor:
    wide = wide_dtype(text_q.dtype)
    text_q, frame_keys = text_q.to(wide), frame_keys.to(wide)
    batch, tokens, heads, _ = text_q.shape
    positions = torch.arange(tokens, dtype=torch.int64, device=text_q.device)
    if text_lengths is None:
        share = text_q.new_full((batch, tokens), 1.0 / (tokens * heads))
    else:
        lengths = text_lengths.clamp(1, tokens).unsqueeze(1)
        share = (positions < lengths).to(wide) / (lengths * heads)  # Padding takes no part.
        text_q = torch.where((positions < lengths)[:, :, None, None], text_q, 0.0)
    text_q = text_q.unflatten(2, (frame_keys.shape[3], -1))  # [B, Lt, Hkv, heads per key head, D]
    with without_autocast(text_q):
        if score == "linear":
            # An inner product of means: nothing of the size of text x history is made.
            frame_means = torch.einsum("bfnkd,n->bfkd", frame_keys, block_weights.to(wide))
            text_sum = torch.einsum("btkgd,bt->bkd", text_q, share)
            return torch.einsum("bkd,bfkd->bf", text_sum, frame_means) * softmax_scale
        scores = torch.einsum("btkgd,bfnkd->btkgfn", text_q, frame_keys) * softmax_scale + block_weights.to(wide).log()
        mass = scores.flatten(4).softmax(-1).unflatten(4, frame_keys.shape[1:3]).sum(-1)
        return torch.einsum("btkgf,bt->bf", mass, share)
