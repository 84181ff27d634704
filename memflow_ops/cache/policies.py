"""Retrieval policies: which frames of the past become the memory bank of the coming chunk.

A policy has one method, `choose`. It sees the means of every remembered frame's keys (before RoPE, so that a frame's
score does not move with its index) and the text keys of the coming prompt, and names up to `bank_frames` frames per
story. One choice serves all layers. `choose` reads the choice back to the host. A policy that also has
`choose_on_device` can leave it on the device, where it becomes a slot table while the host goes on.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from memflow_ops.cache.views import Candidates
from memflow_ops.ops.retrieval import check_redundancy, retrieve_frames


class BankChoice(Protocol):
    """The frames that were chosen for a chunk's bank, known to the host or only to the device."""

    def read(self) -> "Retrieved":
        """The choice as the host knows it; waits for the device where it has to."""


class Retrieved(NamedTuple):
    """A choice that the host knows, the most relevant frame first."""

    frames: list[list[int]]  # per story absolute frame indices
    scores: list[list[float]]  # per story the relevance of each

    def read(self) -> "Retrieved":
        return self

    @classmethod
    def nothing(cls, stories: int) -> "Retrieved":
        """No frame for any of so many stories."""
        return cls([[] for _ in range(stories)], [[] for _ in range(stories)])


class DeviceChoice(NamedTuple):
    """A choice that is still on the device, the most relevant frame first."""

    candidates: list[list[int]]  # per story absolute frame indices
    indices: Tensor  # (B, K) int32 into these
    scores: Tensor  # (B, K)

    def read(self) -> Retrieved:
        indices, scores = torch.stack([self.indices.double(), self.scores.double()]).tolist()
        return Retrieved([[of[int(i)] for i in row] for of, row in zip(self.candidates, indices, strict=True)], scores)


class Policy(Protocol):
    """What chooses the bank of a chunk."""

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        """Chooses frames of each story for the coming chunk.

        candidates: at least one per story. text_keys: per layer the keys (B, Lt, H, D) of the text cross-attention for
        the coming prompts. text_lengths (B,) int32: how many leading text tokens of a story are no padding.
        """


@runtime_checkable
class DevicePolicy(Policy, Protocol):
    """A policy whose choice can stay on the device."""

    def choose_on_device(
        self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor
    ) -> DeviceChoice:
        """As `choose`, without waiting for the device."""


class _OnDevice:
    """The part that the policies on `retrieve_frames` share."""

    bank_frames: int
    impl: str
    score: Literal["linear", "softmax", "coverage"]
    redundancy: float | None = None

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        return self.choose_on_device(candidates, text_keys, text_lengths).read()

    def choose_on_device(
        self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor
    ) -> DeviceChoice:
        chosen = retrieve_frames(
            torch.stack(list(text_keys)),
            candidates.stored,
            self.bank_frames,
            score=self.score,
            candidates=candidates.rows,
            text_lengths=text_lengths,
            block_lengths=candidates.lengths,
            redundancy=self.redundancy,
            impl=self.impl,
        )
        return DeviceChoice(candidates.frames, *chosen)


class Relevance(_OnDevice):
    """The frames most relevant to the prompt, without near-copies of one another.

    bank_frames: how many frames to choose per story, at most.
    score: "linear" (mean over text tokens and heads of text key . frame mean, as in the released MemFlow) or "softmax"
        (the paper's equation, normalised over all candidates jointly); see `frame_relevance`. Layers are averaged.
    redundancy: a candidate whose mean key has a larger cosine than this with that of a frame already taken is passed
        over while there are others; None: the best frames are taken, however alike.
    impl: of `retrieve_frames`.
    """

    def __init__(
        self,
        bank_frames: int,
        score: Literal["linear", "softmax"] = "linear",
        redundancy: float | None = None,
        impl: str = "auto",
    ):
        if bank_frames < 1:
            raise ValueError(f"bank_frames must be positive, got {bank_frames}")
        if score not in ("linear", "softmax"):
            raise ValueError(f"score must be 'linear' or 'softmax', got {score!r}")
        check_redundancy(redundancy, score)
        self.bank_frames, self.score, self.redundancy, self.impl = bank_frames, score, redundancy, impl


class Coverage(_OnDevice):
    """The frames that together answer every word of the prompt.

    The relevance of a word is shared out over the frames by a softmax over all candidates, as in the paper's equation,
    of text key . frame mean (mean over heads, sum over layers). Frames are taken one by one, each time the one that
    adds most to the sum over words of sqrt(relevance gathered so far). Another frame for a word that is answered
    already adds little, so that "the ball and the star" retrieves both. A word that prefers no frame has hardly any
    influence.

    bank_frames: how many frames to choose per story, at most. impl: of `retrieve_frames`.
    """

    score: Literal["coverage"] = "coverage"

    def __init__(self, bank_frames: int, impl: str = "auto"):
        if bank_frames < 1:
            raise ValueError(f"bank_frames must be positive, got {bank_frames}")
        self.bank_frames, self.impl = bank_frames, impl


class Random:
    """A control that takes frames at random, whatever the prompt. The same seed and candidates give the same choice.

    bank_frames: how many frames to choose per story, at most.
    seeds: one per story, so that the choice for a story is the same alone and in a batch.
    """

    def __init__(self, bank_frames: int, seeds: Sequence[int]):
        self.bank_frames, self.seeds = bank_frames, list(seeds)

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        chosen = []
        for seed, frames in zip(self.seeds, candidates.frames, strict=True):
            generator = np.random.default_rng([seed, frames[-1]])
            chosen.append(generator.permutation(frames)[: self.bank_frames].tolist())
        return Retrieved(chosen, [[0.0] * len(frames) for frames in chosen])
