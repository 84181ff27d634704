"""`impl="torch"` of the cache write and of retrieval: vectorised; the default on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.ops import frame_relevance, write_frames
from memflow_ops.rotation import turn_pairs
from memflow_ops.torch_impl import describe_blocks


def write_projections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor,
    sines: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    places: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    descriptors: Tensor | None,
    means: Tensor | None,
    *,
    frame_tokens: int,
    block_size: int,
    mean_size: int,
    eps: float,
) -> Tensor:
    rotated_q = _rotated(_normalised(q, weight_q, eps), cosines, sines, q.dtype)
    plain_k = _normalised(k, weight_k, eps)
    rotated_k = _rotated(plain_k, cosines, sines, k.dtype)
    if means is not None:
        count = means.shape[1]
        tokens = plain_k[:, : count * frame_tokens]
        means.copy_(describe_blocks(tokens, mean_size, frame_tokens).unflatten(1, (count, -1)))
    pools = [(memory_k, rotated_k), (memory_v, v)]
    if descriptors is not None:
        pools.append((descriptors, describe_blocks(rotated_k, block_size, frame_tokens)))
    pool_frames = memory_k.shape[1] // frame_tokens
    for pool, new in pools:
        write_frames(pool.unflatten(1, (pool_frames, -1)), places, new.unflatten(1, (places.shape[1], -1)))
    return rotated_q


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (B, L, H, D) in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is None:
        return x
    flat = x.flatten(2)
    return F.rms_norm(flat, (flat.shape[-1],), eps=eps).mul_(weight.to(x.dtype)).view(x.shape)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, dtype: torch.dtype) -> Tensor:
    return turn_pairs(x, torch.complex(cosines.to(x.dtype), sines.to(x.dtype))[:, :, None]).to(dtype)


def retrieve_frames(
    text_keys: Tensor,
    means: Tensor,
    rows: Tensor | None,
    text_lengths: Tensor | None,
    weights: Tensor,
    *,
    count: int,
    score: str,
    redundancy: float | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    if rows is not None:
        stories = torch.arange(means.shape[1], device=means.device)[:, None]
        means = means[:, stories, rows.clamp(0, means.shape[2] - 1).long()]
    wide = torch.promote_types(torch.promote_types(text_keys.dtype, means.dtype), torch.float32)
    if score == "coverage":
        shares = _word_shares(text_keys, means, text_lengths, weights, softmax_scale, wide)
        indices = _cover(shares, count)
        lengths = shares.shape[1] if text_lengths is None else text_lengths.clamp(1, shares.shape[1])[:, None]
        scores = shares.sum(1) / lengths
    else:
        scores = torch.zeros(means.shape[1:3], dtype=wide, device=means.device)
        for text, of_layer in zip(text_keys, means, strict=True):  # softmax makes words x blocks numbers of each
            scores += frame_relevance(text.to(wide), of_layer.to(wide), text_lengths, weights, score, softmax_scale)
        scores = (scores / len(means)).nan_to_num(nan=torch.finfo(torch.float32).min)
        cosines = None
        if redundancy is not None:
            frame_means = torch.einsum("lbfnkd,n->bflkd", means.to(wide), weights.to(wide)).flatten(2)
            directions = F.normalize(frame_means, dim=-1)
            cosines = directions @ directions.mT
        indices = _take_unlike(scores, cosines, count, redundancy)
    return indices.int(), scores.gather(1, indices)


def _word_shares(
    text_keys: Tensor, means: Tensor, lengths: Tensor | None, weights: Tensor, scale: float, wide: torch.dtype
) -> Tensor:
    """(B, Lt, F), of each word one in all; nothing for padding."""
    logits = torch.zeros((), dtype=wide, device=means.device)
    for text, of_layer in zip(text_keys, means, strict=True):
        frame_means = torch.einsum("bfnkd,n->bfkd", of_layer.to(wide), weights.to(wide))
        grouped = text.to(wide).unflatten(2, (frame_means.shape[2], -1)).mean(3)  # heads that share a key head
        logits = logits + torch.einsum("bwkd,bfkd->bwf", grouped, frame_means) * (scale / grouped.shape[2])
    shares = logits.nan_to_num(nan=torch.finfo(torch.float32).min).softmax(-1)
    if lengths is None:
        return shares
    words = torch.arange(shares.shape[1], device=shares.device)
    return shares.masked_fill((words >= lengths[:, None])[..., None], 0.0)


def _take_unlike(scores: Tensor, cosines: Tensor | None, count: int, redundancy: float | None) -> Tensor:
    """(B, K) in the order of taking. Best first; while there is a candidate unlike all that were taken, those alike
    wait."""
    each = torch.arange(len(scores), device=scores.device)
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


def _cover(shares: Tensor, count: int) -> Tensor:
    """(B, K) in the order of taking: each time what adds most to the sum over words of sqrt(share gathered so far)."""
    stories, words, frames = shares.shape
    each = torch.arange(stories, device=shares.device)
    gathered = shares.new_zeros(stories, words, 1)
    taken = torch.zeros(stories, frames, dtype=torch.bool, device=shares.device)
    order = []
    for _ in range(count):
        gain = ((gathered + shares).sqrt() - gathered.sqrt()).sum(1)
        index = gain.masked_fill(taken, -1).argmax(1)
        order.append(index)
        taken[each, index] = True
        gathered = gathered + shares[each, :, index][..., None]
    return torch.stack(order, dim=1)
