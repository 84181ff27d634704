"""The figures of a selection profile."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memflow_ops.model.selection_profile.quality import Choice, ChoiceSums


@dataclass(frozen=True)
class Sampling:
    """What is drawn of a stream, and how."""

    chunks: int = 12
    """chunks measured, of those with a full bank"""
    calls: int = 12
    """calls of attention, a layer in a pass, measured in each of these chunks"""
    heads: int = 3
    """heads measured in each call, at most"""
    queries: int = 512
    """queries measured in each call, at most; in whole groups"""
    rounds: int = 9
    """how often every setting is timed; 0: not at all"""
    seed: int = 0
    """of all that is drawn"""

    def __post_init__(self) -> None:
        for name, least in (("chunks", 1), ("calls", 1), ("heads", 1), ("queries", 1), ("rounds", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class ChoiceFigures:
    """One way to choose at one budget."""

    blocks: str
    block_size: int
    query_group: int | None
    top_k: int
    """blocks chosen; 0: the window alone"""
    keys: float
    """keys that they hold, on average"""
    share: float
    """of the bank's keys"""
    captured: float
    """share of the dense attention mass on the bank that falls on the chosen blocks"""
    captured_p20: float
    """by calls and heads, each with its own share: the 20th percentile"""
    left_out: float
    """share of all dense attention mass, window included, that falls on the others"""
    error: float
    """root mean square of the difference to the dense output over that of the dense output"""
    seconds: float | None = None
    """of `memory_attention`, median; None: not timed"""
    ratio: float | None = None
    """to the window alone, median of the pairs measured in turn, with its spread"""
    ratio_p20: float | None = None
    ratio_p80: float | None = None


@dataclass
class SelectionProfile:
    """What has been measured so far."""

    frames: int
    """of the bank, sink included"""
    frame_tokens: int
    compared: list[Choice]
    calls: int = 0
    queries: int = 0
    """times heads"""
    chunks: list[int] = field(default_factory=list)
    """whose calls were measured"""
    sums: dict[Choice, ChoiceSums] = field(default_factory=dict)
    shares: dict[Choice, list[Tensor]] = field(default_factory=dict)
    """captured of every call and head, (K, H)"""
    seconds: dict[tuple[int, int | None, int], list[float]] = field(default_factory=dict)
    """by block size, query group and top-k; (0, None, 0): the window alone"""

    @property
    def bank_mass(self) -> float:
        """The share of all attention that the bank gets."""
        some = next(iter(self.sums.values()))
        return (some.bank.sum() / self.queries).item()

    def add(self, chunk: int, found: Sequence[dict[Choice, ChoiceSums]]) -> None:
        self.chunks.append(chunk)
        for call in found:
            self.calls += 1
            some = next(iter(call.values()))
            self.queries += some.queries * len(some.bank)
            for choice, new in call.items():
                self.shares.setdefault(choice, []).append(_share(new.captured, new.bank))
                self.sums[choice] = _added(self.sums.get(choice), new)

    def figures(self) -> list[ChoiceFigures]:
        rows = []
        window = self.seconds.get((0, None, 0), [])
        for choice, total in self.sums.items():
            shares = torch.cat(self.shares[choice], 1)
            low = shares.quantile(0.2, dim=1).tolist()
            for i, top_k in enumerate(total.budgets):
                taken = self.seconds.get((*choice[1:], top_k), []) if choice.blocks == "top" else []
                ratios = sorted(ours / alone for ours, alone in zip(taken, window, strict=True)) if taken else []
                spread = [ratios[round(q * (len(ratios) - 1))] for q in (0.5, 0.2, 0.8)] if ratios else [None] * 3
                captured, bank = total.captured[i].sum(), total.bank.sum()
                keys = (total.keys[i].sum() / self.queries).item()
                rows.append(
                    ChoiceFigures(
                        *choice,
                        top_k,
                        keys=keys,
                        share=keys / (self.frames * self.frame_tokens),
                        captured=_share(captured, bank).item(),
                        captured_p20=low[i],
                        left_out=((bank - captured) / self.queries).item(),
                        error=(total.error[i].sum() / total.dense.sum()).sqrt().nan_to_num(nan=0.0).item(),
                        seconds=statistics.median(taken) if taken else None,
                        ratio=spread[0],
                        ratio_p20=spread[1],
                        ratio_p80=spread[2],
                    )
                )
        return rows


def _share(captured: Tensor, bank: Tensor) -> Tensor:
    """Where there is nothing to capture, all of it is captured."""
    return (captured / bank).nan_to_num(nan=1.0)


def _added(total: ChoiceSums | None, new: ChoiceSums) -> ChoiceSums:
    if total is None:
        return replace(new)
    return replace(
        new,
        **{name: getattr(total, name) + getattr(new, name) for name in ("captured", "bank", "error", "dense", "keys")},
        queries=total.queries + new.queries,
    )
