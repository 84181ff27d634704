"""The figures of a selection profile: what is sampled, what each choice gives at each budget, and the whole so far."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memflow_ops.model.selection_profile.quality import Choice, ChoiceSums, Ranking
from memflow_ops.model.selection_profile.timing import WINDOW_ALONE, TimedSetting


@dataclass(frozen=True)
class Sampling:
    """What is drawn of a stream, and how much of it."""

    chunks: int = 12
    """chunks measured, of those with a full bank"""
    calls: int = 12
    """calls of attention (a layer in a pass) measured in each of these chunks"""
    heads: int = 3
    """heads measured in each call, at most"""
    queries: int = 512
    """queries measured in each call, at most, in whole groups"""
    rounds: int = 9
    """how often every setting is timed; 0: not at all"""
    seed: int = 0
    """of the stream's noise and of all that is drawn"""

    def __post_init__(self) -> None:
        for name, least in (("chunks", 1), ("calls", 1), ("heads", 1), ("queries", 1), ("rounds", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class ChoiceFigures:
    """What one way to choose blocks gives at one budget."""

    blocks: Ranking
    block_size: int
    query_group: int | None
    top_k: int
    """blocks chosen; 0: the window alone"""
    keys: float
    """keys in the chosen blocks, on average"""
    share: float
    """of the bank's keys"""
    captured: float
    """share of the bank's dense attention mass that falls on the chosen blocks"""
    captured_p20: float
    """20th percentile of that share over calls and heads"""
    left_out: float
    """share of all dense attention mass, window included, that falls on the blocks not chosen"""
    error: float
    """root mean square of the difference to the dense output, over that of the dense output"""
    seconds: float | None = None
    """of one call of `memory_attention`, median; None: not timed"""
    ratio: float | None = None
    """to the window alone: median, 20th and 80th percentile of the pairs measured in the same round"""
    ratio_p20: float | None = None
    ratio_p80: float | None = None

    @property
    def choice(self) -> Choice:
        return Choice(self.blocks, self.block_size, self.query_group)


@dataclass
class SelectionProfile:
    """What has been measured so far."""

    frames: int
    """of the bank, sink included"""
    frame_tokens: int
    compared: list[Choice]
    calls: int = 0
    queries: int = 0
    """measured queries times heads"""
    chunks: list[int] = field(default_factory=list)
    """the chunks whose calls were measured"""
    sums: dict[Choice, ChoiceSums] = field(default_factory=dict)
    by_chunk: list[dict[Choice, ChoiceSums]] = field(default_factory=list)
    """the sums of every measured chunk"""
    shares: dict[Choice, list[Tensor]] = field(default_factory=dict)
    """for every call the share of the bank's mass that was captured, (budgets, heads)"""
    seconds: dict[TimedSetting, list[float]] = field(default_factory=dict)
    """seconds of every round"""
    strips: "SelectionProfile | None" = None
    """the same calls with the tokens of a frame in strips, `token_order="strips"`"""

    @property
    def bank_mass(self) -> float:
        """The share of all attention that falls on the bank."""
        some = next(iter(self.sums.values()))
        return (some.bank.sum() / self.queries).item()

    def add(self, chunk: int, found: Sequence[dict[Choice, ChoiceSums]]) -> None:
        """Adds the measured calls of one chunk."""
        self.chunks.append(chunk)
        of_chunk: dict[Choice, ChoiceSums] = {}
        for call in found:
            self.calls += 1
            some = next(iter(call.values()))
            self.queries += some.queries * len(some.bank)
            for choice, new in call.items():
                self.shares.setdefault(choice, []).append(_share(new.captured, new.bank))
                of_chunk[choice] = _added(of_chunk.get(choice), new)
                self.sums[choice] = _added(self.sums.get(choice), new)
        self.by_chunk.append(of_chunk)

    def figures(self) -> list[ChoiceFigures]:
        """The figures of every choice at every budget, choice by choice, from the smallest budget on."""
        return [figures for choice in self.sums for figures in self._figures_of(choice)]

    def _figures_of(self, choice: Choice) -> Iterator[ChoiceFigures]:
        total = self.sums[choice]
        low = torch.cat(self.shares[choice], 1).quantile(0.2, dim=1).tolist()
        for i, top_k in enumerate(total.budgets):
            captured, bank = total.captured[i].sum(), total.bank.sum()
            keys = (total.keys[i].sum() / self.queries).item()
            seconds, ratio, ratio_p20, ratio_p80 = self._times(choice, top_k)
            yield ChoiceFigures(
                *choice,
                top_k,
                keys=keys,
                share=keys / (self.frames * self.frame_tokens),
                captured=_share(captured, bank).item(),
                captured_p20=low[i],
                left_out=((bank - captured) / self.queries).item(),
                error=(total.error[i].sum() / total.dense.sum()).sqrt().nan_to_num(nan=0.0).item(),
                seconds=seconds,
                ratio=ratio,
                ratio_p20=ratio_p20,
                ratio_p80=ratio_p80,
            )

    def _times(self, choice: Choice, top_k: int) -> Sequence[float | None]:
        """Seconds and the three ratios to the window alone; four times None where this setting was not timed."""
        taken = self.seconds.get((choice, top_k), [])
        if not taken:
            return [None] * 4
        ratios = sorted(ours / alone for ours, alone in zip(taken, self.seconds[WINDOW_ALONE], strict=True))
        return [statistics.median(taken), *(ratios[round(q * (len(ratios) - 1))] for q in (0.5, 0.2, 0.8))]


def _share(captured: Tensor, bank: Tensor) -> Tensor:
    """captured / bank; where there is nothing to capture, all of it counts as captured."""
    return (captured / bank).nan_to_num(nan=1.0)


def _added(total: ChoiceSums | None, new: ChoiceSums) -> ChoiceSums:
    if total is None:
        return replace(new)
    return replace(
        new,
        **{name: getattr(total, name) + getattr(new, name) for name in ("captured", "bank", "error", "dense", "keys")},
        queries=total.queries + new.queries,
    )
