"""Selections by mean and variance, normalised or not, against float64, for the tests of every implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import memflow_ops


@dataclass
class MomentCase:
    """Queries (B, Lq, H, D), bank keys (B, F * T, Hkv, D), and how they are divided and scaled."""

    q: Tensor
    keys: Tensor
    top_k: int
    block_size: int
    frame_tokens: int
    query_group: int | None
    softmax_scale: float | None
    memory_frames: Tensor | None = None
    memory_slots: Tensor | None = None
    score: str = "moments"

    def to(self, dtype: torch.dtype) -> MomentCase:
        return MomentCase(self.q.to(dtype), self.keys.to(dtype), *list(vars(self).values())[2:])

    def descriptors(self, impl: str) -> Tensor:
        return memflow_ops.describe_blocks(self.keys, self.block_size, self.frame_tokens, moments=2, impl=impl)

    def select(self, descriptors: Tensor, impl: str) -> Tensor:
        options = list(vars(self).items())[2:]
        return memflow_ops.select_blocks(self.q, descriptors, impl=impl, **dict(options))

    def scores(self, descriptors: Tensor) -> tuple[Tensor, Tensor]:
        """The score of every block of the bank for every group, (B, H, G, N) float64, -inf where it is not valid, and
        what rounding errors are relative to: the sum of the absolute values of all that is added up in it, or of
        normalised scores twice the largest such sum and 1. Written once more, without our code."""
        q, table = self.q.double(), descriptors.double()
        queries, size = q.shape[1], q.shape[3]
        group = min(self.query_group or queries, queries)
        scale = size**-0.5 if self.softmax_scale is None else self.softmax_scale
        starts = range(0, self.frame_tokens, self.block_size)
        lengths = torch.tensor([min(self.block_size, self.frame_tokens - n) for n in starts]).double()
        frames = table.unflatten(1, (-1, len(lengths)))
        if self.memory_slots is not None:
            slots = self.memory_slots.clamp(0, frames.shape[1] - 1).long()
            frames = frames[torch.arange(len(q))[:, None], slots]
        keys = frames.flatten(1, 2).repeat_interleave(q.shape[2] // table.shape[2], 2)
        share = (lengths / lengths[0]).log().repeat(frames.shape[1])
        invalid = torch.zeros(len(q), 1, len(share), dtype=torch.bool)
        if self.memory_frames is not None:
            valid = self.memory_frames.clamp(0, frames.shape[1]) * len(lengths)
            invalid = torch.arange(len(share)) >= valid.view(-1, 1, 1)

        def of_part(x: Tensor) -> tuple[Tensor, Tensor]:
            feature = torch.cat([scale * x.mean(1), scale**2 / 2 * x.square().mean(1)], -1)  # [B, H, 2 D]
            scores = torch.einsum("bhd,bnhd->bhn", feature, keys) + share
            added = torch.einsum("bhd,bnhd->bhn", feature.abs(), keys.abs()) + share.abs()
            return scores.masked_fill(invalid, -torch.inf), added

        def of_group(x: Tensor) -> tuple[Tensor, Tensor]:
            if self.score == "moments" or x.shape[1] <= 32:
                return of_part(x)
            parts = x.split(32, 1)
            scores, added = zip(*map(of_part, parts), strict=True)
            shares = [len_part * s.softmax(-1) for len_part, s in zip([p.shape[1] for p in parts], scores, strict=True)]
            mass = torch.stack(shares).sum(0).log().masked_fill(invalid, -torch.inf)
            return mass, 2 * (torch.stack(added).amax((0, 3), keepdim=True)[0] + 1).expand_as(mass)

        groups = [of_group(x) for x in q.split(group, 1)]
        return torch.stack([scores for scores, _ in groups], 2), torch.stack([added for _, added in groups], 2)


@st.composite
def moment_cases(draw, head_dims: tuple[int, ...] = (4, 5, 16, 24)) -> MomentCase:
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(number(0, 2**31))
    batch, kv_heads, size, frames = number(1, 2), number(1, 2), draw(st.sampled_from(head_dims)), number(1, 4)
    frame_tokens = number(1, 20)
    case = MomentCase(
        torch.randn(batch, number(1, 40), kv_heads * number(1, 3), size, dtype=torch.float64),
        torch.randn(batch, frames * frame_tokens, kv_heads, size, dtype=torch.float64),
        number(1, 12),
        number(1, 9),
        frame_tokens,
        draw(st.sampled_from([None, 1, 2, 7, 16, 100])),
        draw(st.sampled_from([None, 0.3, -0.5, 0.0])),
    )
    if draw(st.booleans()):
        case.memory_slots = torch.randint(-1, frames + 1, (batch, number(1, 4)), dtype=torch.int32)
    if draw(st.booleans()):
        case.memory_frames = torch.randint(-1, frames + 2, (batch,), dtype=torch.int32)
    return case


@st.composite
def normalised_cases(draw, head_dims: tuple[int, ...] = (4, 5, 16)) -> MomentCase:
    """Groups of several parts, the last group and its last part short or not."""
    case = draw(moment_cases(head_dims))
    batch, _, heads, size = case.q.shape
    queries = draw(st.integers(33, 110))
    case.q = draw(st.sampled_from([1.0, 6.0])) * torch.randn(batch, queries, heads, size, dtype=torch.float64)
    case.query_group = draw(st.sampled_from([None, 33, 50, 64, 96]))
    case.score = "normalised"
    return case


def assert_selected(case: MomentCase, descriptors: Tensor, chosen: Tensor) -> int:
    """Where the margin is clear, exactly the best blocks are chosen; returns how many groups have a clear margin."""
    scores, added = case.scores(descriptors)
    count = chosen.shape[-1]
    assert count == min(case.top_k, scores.shape[-1])
    order = scores.sort(-1, descending=True)
    values = torch.cat([order.values, torch.full_like(order.values[..., :1], -torch.inf)], -1)
    clear = values[..., count - 1] - values[..., count] > 2.0**-18 * added.amax(-1)
    short = (scores > -torch.inf).sum(-1) <= count  # all valid blocks are chosen
    best = order.indices[..., :count].masked_fill(values[..., :count] == -torch.inf, scores.shape[-1]).sort(-1).values
    best = best.masked_fill(best == scores.shape[-1], -1).int()
    assert torch.equal(chosen[clear | short], best[clear | short])
    return int((clear & ~short).sum())
