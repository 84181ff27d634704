"""The relevance of frames and the choice of the memory bank, vectorised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.impl.precision import wide_dtype, without_autocast

PIECE = 1 << 15
"""Numbers of a layer's means that are gathered and averaged at a time on a CPU."""


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
    if score == "coverage":
        shares = word_shares(word_logits(text_keys, means, candidates, weights, softmax_scale, wide), text_lengths)
        indices, scores = cover(shares, count), mean_share(shares, text_lengths)
    else:
        relevance = mean_relevance(text_keys, means, candidates, text_lengths, weights, score, softmax_scale, wide)
        scores, cosines = finite(relevance), None
        if redundancy is not None:
            every = torch.stack([of_frames(of_layer, candidates) for of_layer in means])
            directions = F.normalize(frame_vectors(every, weights, wide), dim=-1)
            cosines = directions @ directions.mT
        indices = take_unlike(scores, cosines, count, redundancy)
    return indices.int(), scores.gather(1, indices)


def of_frames(of_layer: Tensor, candidates: Tensor | None) -> Tensor:
    """The means (B, F, n, Hkv, D) of the candidates (B, F), of those (B, R, n, Hkv, D) that a layer stores."""
    if candidates is None:
        return of_layer
    each = torch.arange(len(of_layer), dtype=torch.int64, device=of_layer.device)[:, None]
    return of_layer[each, candidates.clamp(0, of_layer.shape[1] - 1).long()]


def room_for_keys(means: Tensor, count: int, wide: torch.dtype) -> Tensor:
    """Room for the mean keys of a layer, of all frames that are stored and of at least `count`."""
    return means.new_empty(max(count, means.shape[2]) * means[0, :, 0, 0].numel(), dtype=wide)


def mean_keys(of_layer: Tensor, candidates: Tensor | None, weights: Tensor, wide: torch.dtype, room: Tensor) -> Tensor:
    """The mean key of every candidate, (B, D * Hkv, F) in `wide`, of a layer's means.

    room: of `room_for_keys`; it is overwritten and returned. That, and pieces of one size, are taken from the heap
    again and again. What grew with every chunk would leave it full of holes that nothing later fits into.
    """
    count = of_layer.shape[1] if candidates is None else candidates.shape[1]
    size = max(1, PIECE // of_layer[:, 0].numel()) if of_layer.device.type == "cpu" else count
    keys = room[: count * of_layer[:, 0, 0].numel()].view(len(of_layer), -1, count)
    for start in range(0, count, size):
        end = min(start + size, count)
        of_piece = of_layer[:, start:end] if candidates is None else of_frames(of_layer, candidates[:, start:end])
        keys[..., start:end] = torch.einsum("bfnkd,n->bdkf", of_piece.to(wide), weights.to(wide)).flatten(1, 2)
    return keys


def mean_relevance(
    text_keys: Tensor,
    means: Tensor,
    candidates: Tensor | None,
    text_lengths: Tensor | None,
    weights: Tensor,
    score: str,
    softmax_scale: float,
    wide: torch.dtype,
) -> Tensor:
    """`frame_relevance` (B, F) in `wide`, averaged over the layers."""
    count = means.shape[2] if candidates is None else candidates.shape[1]
    scores = torch.zeros(means.shape[1], count, dtype=wide, device=text_keys.device)
    room = room_for_keys(means, count, wide)
    # One layer at a time, because softmax makes words x blocks numbers of it, and of all frames at once.
    for text, of_layer in zip(text_keys, means, strict=True):
        text = text.to(wide)
        if score == "softmax":
            every = of_frames(of_layer, candidates).to(wide)
            scores += frame_relevance(text, every, text_lengths, weights, score, softmax_scale)
            continue
        with without_autocast(text):
            text_sum = _text_sum(*_without_padding(text, text_lengths), of_layer.shape[3])
            of_frame = mean_keys(of_layer, candidates, weights, wide, room)
            # An inner product of means: nothing of the size of text x history is made.
            scores += torch.bmm(text_sum.mT.flatten(1)[:, None], of_frame)[:, 0] * softmax_scale
    return scores / len(text_keys)


def finite(scores: Tensor) -> Tensor:
    """The scores, with a NaN as a number that ranks last."""
    return scores.nan_to_num(nan=torch.finfo(torch.float32).min)


def frame_vectors(means: Tensor, weights: Tensor, wide: torch.dtype) -> Tensor:
    """The mean key of every frame over all layers and heads, (B, F, layers * Hkv * D)."""
    return torch.einsum("lbfnkd,n->bflkd", means.to(wide), weights.to(wide)).flatten(2)


def word_logits(
    text_keys: Tensor, means: Tensor, candidates: Tensor | None, weights: Tensor, scale: float, wide: torch.dtype
) -> Tensor:
    """Text key . mean key of the frame, averaged over heads and summed over layers, (B, Lt, F)."""
    count = means.shape[2] if candidates is None else candidates.shape[1]
    logits = torch.zeros(*text_keys.shape[1:3], count, dtype=wide, device=text_keys.device)
    room = room_for_keys(means, count, wide)
    for text, of_layer in zip(text_keys, means, strict=True):
        # The mean over the heads that share a key head.
        grouped = text.to(wide).unflatten(2, (of_layer.shape[3], -1)).mean(3)
        of_frame = mean_keys(of_layer, candidates, weights, wide, room)
        logits += torch.bmm(grouped.mT.flatten(2), of_frame) * (scale / grouped.shape[2])
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
    text_q, share = _without_padding(text_q.to(wide), text_lengths)
    frame_keys = frame_keys.to(wide)
    with without_autocast(text_q):
        if score == "linear":
            # An inner product of means: nothing of the size of text x history is made.
            frame_means = torch.einsum("bfnkd,n->bfkd", frame_keys, block_weights.to(wide))
            text_sum = _text_sum(text_q, share, frame_keys.shape[3])
            return torch.einsum("bkd,bfkd->bf", text_sum, frame_means) * softmax_scale
        text_q = text_q.unflatten(2, (frame_keys.shape[3], -1))  # [B, Lt, Hkv, heads per key head, D]
        scores = torch.einsum("btkgd,bfnkd->btkgfn", text_q, frame_keys) * softmax_scale + block_weights.to(wide).log()
        mass = scores.flatten(4).softmax(-1).unflatten(4, frame_keys.shape[1:3]).sum(-1)
        return torch.einsum("btkgf,bt->bf", mass, share)


def _without_padding(text_q: Tensor, text_lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The text (B, Lt, H, D) with zeros for padding, and the share of each word in a mean over all of its heads, (B,
    Lt)."""
    batch, tokens, heads, _ = text_q.shape
    if text_lengths is None:
        return text_q, text_q.new_full((batch, tokens), 1.0 / (tokens * heads))
    positions = torch.arange(tokens, dtype=torch.int64, device=text_q.device)
    lengths = text_lengths.clamp(1, tokens).unsqueeze(1)
    share = (positions < lengths).to(text_q.dtype) / (lengths * heads)  # Padding takes no part.
    return torch.where((positions < lengths)[:, :, None, None], text_q, 0.0), share


def _text_sum(text_q: Tensor, share: Tensor, kv_heads: int) -> Tensor:
    """The words' mean (B, Hkv, D) over the heads that share a key head, each with its share."""
    return torch.einsum("btkgd,bt->bkd", text_q.unflatten(2, (kv_heads, -1)), share)
