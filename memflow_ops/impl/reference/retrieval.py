"""The choice of the memory bank, story by story."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.impl.precision import widened


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
    """
    for every batch element:
        s[l, h, w, f, j] = scale * text key (word w, head h of layer l) . mean j of frame f
        linear:   score of f = mean over l, h, w of sum_j weight_j s
        softmax:  score of f = mean over l, h, w of sum_j softmax_(f, j)(s + log weight_j)
        coverage: share[w, f] = softmax_f(sum_l mean_h sum_j weight_j s), score of f = mean over w of share
    then, `count` times, the best of the frames that are left:
        linear, softmax: by score; a frame that is alike to one already taken comes behind all others
        coverage:        by what the frame adds to sum_w sqrt(share of word w that is gathered)
    """
    batch, words, heads = text_keys.shape[1:4]
    text, means = widened(text_keys), widened(means)
    weights = weights.to(text.dtype)
    indices, scores = [], []
    for b in range(batch):
        lowest = 0 if score == "coverage" else 1
        length = words if text_lengths is None else min(max(int(text_lengths[b]), lowest), words)
        frames = list(range(means.shape[2]))
        if candidates is not None:
            frames = [min(max(int(f), 0), len(frames) - 1) for f in candidates[b]]
        stored = means[:, b, frames].repeat_interleave(heads // means.shape[4], 3)  # (layers, F, n, H, D)
        s = softmax_scale * torch.einsum("lwhd,lfjhd->lhwfj", text[:, b, :length], stored)
        if score == "linear":
            relevance = _finite((s * weights).sum(4).mean((0, 1, 2)))
        elif score == "softmax":
            mass = (s + weights.log()).flatten(3).softmax(3).view(s.shape).sum(4)
            relevance = _finite(mass.mean((0, 1, 2)))
        else:
            shares = _finite((s * weights).sum(4).mean(1).sum(0)).softmax(1)
            relevance = shares.sum(0) / max(length, 1)
        if score == "coverage":
            taken = _cover(shares, count)
        else:
            direction = torch.einsum("lfjhd,j->flhd", means[:, b, frames], weights).flatten(1)
            unit = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-12)
            taken = _take_unlike(relevance, unit @ unit.T, count, redundancy)
        indices.append(taken)
        scores.append(relevance[taken])
    return torch.tensor(indices, dtype=torch.int32, device=means.device), torch.stack(scores)


def _finite(x: Tensor) -> Tensor:
    return x.nan_to_num(nan=torch.finfo(torch.float32).min)


def _take_unlike(scores: Tensor, cosines: Tensor, count: int, redundancy: float | None) -> list[int]:
    taken: list[int] = []
    for _ in range(count):
        left = [f for f in range(len(scores)) if f not in taken]
        unlike = [f for f in left if redundancy is None or not any(cosines[f, t] > redundancy for t in taken)]
        taken.append(max(unlike or left, key=lambda f: (scores[f].item(), -f)))
    return taken


def _cover(shares: Tensor, count: int) -> list[int]:
    taken: list[int] = []
    for _ in range(count):
        gathered = shares[:, taken].sum(1, keepdim=True)
        gain = ((gathered + shares).sqrt() - gathered.sqrt()).sum(0)
        left = [f for f in range(shares.shape[1]) if f not in taken]
        taken.append(max(left, key=lambda f: (gain[f].item(), -f)))
    return taken
