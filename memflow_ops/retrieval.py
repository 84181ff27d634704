"""Retrieval: which frames of the past become the memory bank of the coming chunk.

A policy has one method, `choose`. It sees the means of every remembered frame's keys (before RoPE, so that a frame's
score does not move with its index) and the coming prompt's text keys, and names up to `bank_frames` frames per story.
One choice serves all layers. It comes back to the host, because it decides which keys are copied out of host memory and
because the user is told: one small read per chunk.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from memflow_ops.cache import Candidates
from memflow_ops.relevance import frame_relevance


class Retrieved(NamedTuple):
    """A policy's choice, in its order of preference."""

    frames: list[list[int]]  # per story absolute frame indices
    scores: list[list[float]]  # per story the relevance of each


class Policy(Protocol):
    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        """candidates: at least one · text_keys: per layer (B, Lt, H, D), those of the coming prompts ·
        text_lengths (B,) int32: leading text tokens that are no padding."""


class Relevance:
    """The frames most relevant to the prompt, without near-copies of one another.

    bank_frames: how many to choose at most, per story.
    score: "linear" (mean over text tokens and heads of text key . frame mean, as in the released MemFlow) or "softmax"
        (the paper's equation, normalised over all candidates jointly); see `frame_relevance`. Layers are averaged.
    redundancy: a candidate whose mean key has a larger cosine than this with one already taken is passed over while
        there are others; None takes the best whatever they look like.
    """

    def __init__(
        self, bank_frames: int, score: Literal["linear", "softmax"] = "linear", redundancy: float | None = None
    ):
        if bank_frames < 1:
            raise ValueError(f"bank_frames must be positive, got {bank_frames}")
        if score not in ("linear", "softmax"):
            raise ValueError(f"score must be 'linear' or 'softmax', got {score!r}")
        if redundancy is not None and not -1 <= redundancy <= 1:
            raise ValueError(f"redundancy is a cosine, -1 to 1, or None, got {redundancy}")
        self.bank_frames = bank_frames
        self.score: Literal["linear", "softmax"] = score
        self.redundancy = redundancy

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        # A NaN ranks last, as in selection; it must not be confused with "taken", which is -inf.
        scores = self._scores(candidates, text_keys, text_lengths).nan_to_num(nan=torch.finfo(torch.float32).min)
        order = self._greedy(scores, mean_keys(candidates))
        # The one place where the host waits for the device.
        numbers = torch.stack([order.double(), scores.gather(1, order).double()]).tolist()
        frames = [[of[int(i)] for i in row] for of, row in zip(candidates.frames, numbers[0], strict=True)]
        return Retrieved(frames, numbers[1])

    def _scores(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Tensor:
        """(B, F) float32. Layer by layer: the softmax score makes text tokens x blocks numbers of each."""
        total = torch.zeros(candidates.means.shape[1:3], dtype=torch.float32, device=candidates.means.device)
        for keys, means in zip(text_keys, candidates.means, strict=True):
            total += frame_relevance(
                keys, means, score=self.score, text_lengths=text_lengths, block_lengths=candidates.lengths
            )
        return total / len(text_keys)

    def _greedy(self, scores: Tensor, directions: Tensor) -> Tensor:
        """scores (B, F), directions (B, F, E) of unit length -> the taken indices (B, K), in the order of taking.

        Best first; while there is a candidate unlike all that were taken, those alike wait.
        """
        stories, frames = scores.shape
        each = torch.arange(stories, device=scores.device)
        left, alike = scores.clone(), torch.zeros_like(scores, dtype=torch.bool)
        order = []
        for _ in range(min(self.bank_frames, frames)):
            unlike = left.masked_fill(alike, -torch.inf)
            best_unlike, index = unlike.max(1)
            index = torch.where(best_unlike > -torch.inf, index, left.argmax(1))
            order.append(index)
            left[each, index] = -torch.inf
            if self.redundancy is not None:
                cosines = torch.einsum("bfe,be->bf", directions, directions[each, index])
                alike |= cosines > self.redundancy
        return torch.stack(order, dim=1)


class Coverage:
    """The frames that together answer every word of the prompt.

    A word's relevance is shared out over the frames by a softmax over all candidates, as in the paper's equation, of
    text key . frame mean (mean over heads, sum over layers). Frames are taken one by one, each time the one that adds
    most to the sum over words of sqrt(relevance gathered so far): another frame for a word already answered adds
    little, so that "the ball and the star" retrieves both. A word that prefers no frame takes hardly any part.

    bank_frames: how many to choose at most, per story.
    """

    def __init__(self, bank_frames: int):
        if bank_frames < 1:
            raise ValueError(f"bank_frames must be positive, got {bank_frames}")
        self.bank_frames = bank_frames

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        shares = self._shares(candidates, text_keys, text_lengths)
        stories, words, count = shares.shape
        each = torch.arange(stories, device=shares.device)
        gathered = torch.zeros(stories, words, 1, device=shares.device)
        taken = torch.zeros(stories, count, dtype=torch.bool, device=shares.device)
        order = []
        for _ in range(min(self.bank_frames, count)):
            gain = ((gathered + shares).sqrt() - gathered.sqrt()).sum(1)
            index = gain.masked_fill(taken, -1).argmax(1)
            order.append(index)
            taken[each, index] = True
            gathered = gathered + shares[each, :, index][..., None]
        chosen = torch.stack(order, dim=1)
        scores = (shares.sum(1) / text_lengths.clamp(min=1)[:, None]).gather(1, chosen)
        # The one place where the host waits for the device.
        numbers = torch.stack([chosen.double(), scores.double()]).tolist()
        frames = [[of[int(i)] for i in row] for of, row in zip(candidates.frames, numbers[0], strict=True)]
        return Retrieved(frames, numbers[1])

    def _shares(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Tensor:
        """(B, Lt, F) float32, of each word one in all; nothing for padding."""
        means = candidates.means.float()  # (layers, B, F, n, Hkv, D)
        weights = torch.tensor(candidates.lengths, dtype=torch.float32, device=means.device) / sum(candidates.lengths)
        frame_means = torch.einsum("lbfnhd,n->lbfhd", means, weights)
        total = torch.zeros(())
        for keys, of_layer in zip(text_keys, frame_means, strict=True):
            grouped = keys.float().unflatten(2, (of_layer.shape[2], -1)).mean(3)  # queries that share a key head
            total = total.to(means) + torch.einsum("bwhd,bfhd->bwf", grouped, of_layer) / (
                grouped.shape[2] * grouped.shape[3] ** 0.5
            )
        shares = total.nan_to_num(nan=torch.finfo(torch.float32).min).softmax(-1)
        words = torch.arange(total.shape[1], device=total.device)
        return shares * (words < text_lengths[:, None])[..., None]


class Random:
    """A control: frames at random, whatever the prompt. The same seed and candidates give the same choice.

    seeds: one per story, so that a story chooses alike alone and in a batch.
    """

    def __init__(self, bank_frames: int, seeds: Sequence[int]):
        self.bank_frames, self.seeds = bank_frames, list(seeds)

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        chosen = []
        for seed, frames in zip(self.seeds, candidates.frames, strict=True):
            generator = np.random.default_rng([seed, frames[-1]])
            chosen.append(generator.permutation(frames)[: self.bank_frames].tolist())
        return Retrieved(chosen, [[0.0] * len(frames) for frames in chosen])


def mean_keys(candidates: Candidates) -> Tensor:
    """Each frame's mean key over all layers and heads, scaled to unit length: (B, F, layers * Hkv * D) float32."""
    means = candidates.means.float()  # (layers, B, F, n, Hkv, D)
    weights = torch.tensor(candidates.lengths, dtype=torch.float32, device=means.device) / sum(candidates.lengths)
    frame_means = torch.einsum("lbfnhd,n->bflhd", means, weights).flatten(2)
    return torch.nn.functional.normalize(frame_means, dim=-1)
