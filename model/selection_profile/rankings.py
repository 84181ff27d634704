"""Rankings of blocks beside one another at the same budgets: by means, by moments, normalised, oracle, random.

The intervals are of 95 % and come from leaving out the measured chunks one by one (the jackknife), because calls of one
chunk are not independent. Differences are of the same calls, so their intervals are far narrower than those of their
parts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memflow_ops.model.selection_profile.figures import SelectionProfile
from memflow_ops.model.selection_profile.quality import Choice, ChoiceSums

SHARES = (0.01, 0.04, 0.16)
"""Of the bank's blocks that the table compares rankings at; the nearest measured budgets are taken."""


@dataclass(frozen=True)
class Interval:
    """A number and half the width of its 95 % interval; None with fewer than three measured chunks."""

    value: float
    half: float | None

    def __str__(self) -> str:
        return f"{100 * self.value:.1f}" + ("" if self.half is None else f" +- {100 * self.half:.1f}")


@dataclass(frozen=True)
class Ranked:
    """What the rankings give with blocks of one size, for one query group and budget."""

    block_size: int
    query_group: int | None
    top_k: int
    share: float
    """top_k as a share of all blocks"""
    captured: dict[str, Interval]
    """ranking -> share of the bank's dense attention mass in the chosen blocks"""
    error: dict[str, Interval]
    """ranking -> root mean square of the difference to the dense output, over that of the dense output"""
    more_captured: Interval
    """by moments less by means"""
    less_error: Interval
    """by means less by moments"""
    more_normalised: Interval | None
    """captured with the scores by moments normalised, less without; None where a group is normalised as one"""


def compare_rankings(measured: SelectionProfile, block_size: int, query_group: int | None) -> list[Ranked]:
    """The rankings at every budget of SHARES, for a block size and query group that were measured."""
    rankings = {name: Choice(name, block_size, query_group) for name in ("top", "moments", "oracle")}
    rankings["random"] = Choice("random", block_size, 1)
    normalised = Choice("normalised", block_size, query_group)
    if normalised in measured.sums:  # where a group has several parts
        rankings["normalised"] = normalised
    budgets = measured.sums[rankings["top"]].budgets
    rows: list[Ranked] = []
    for wanted in SHARES:
        i = min(range(1, len(budgets)), key=lambda i: abs(math.log(budgets[i] / (wanted * budgets[-1]))))
        if rows and rows[-1].top_k == budgets[i]:
            continue
        captured = {name: _interval(measured, [choice], _captured, i) for name, choice in rankings.items()}
        error = {name: _interval(measured, [choice], _error, i) for name, choice in rankings.items()}
        top, moments = rankings["top"], rankings["moments"]
        more = _interval(measured, [moments, top], _captured, i)
        less = _interval(measured, [top, moments], _error, i)
        both = [normalised, moments]
        normal = _interval(measured, both, _captured, i) if "normalised" in rankings else None
        share = budgets[i] / budgets[-1]
        rows.append(Ranked(block_size, query_group, budgets[i], share, captured, error, more, less, normal))
    return rows


def ranking_table(rows: Sequence[Ranked]) -> str:
    """The rankings as fixed-width text, in percent with 95 % intervals."""
    names = ("top", "moments", "oracle", "random")
    titles = ("by means", "by moments", "oracle", "at random")
    lines = [["blocks of the bank", *titles, "moments less means", "error by means", "by moments", "less error"]]
    normalised = rows[0].more_normalised is not None
    if normalised:
        lines[0] += ["normalised less moments", "its error"]
    for row in rows:
        line = [f"{row.top_k} ({100 * row.share:.1f} %)", *(str(row.captured[name]) for name in names)]
        errors = [str(row.error[name]) for name in names[:2]]
        line += [str(row.more_captured), *errors, str(row.less_error)]
        if normalised:
            line += [str(row.more_normalised), str(row.error["normalised"])]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _captured(sums: ChoiceSums, i: int) -> Tensor:
    """The two sums whose ratio is the captured share at budget number i."""
    return torch.stack([sums.captured[i].sum(), sums.bank.sum()])


def _error(sums: ChoiceSums, i: int) -> Tensor:
    """The two sums whose ratio is the squared error at budget number i."""
    return torch.stack([sums.error[i].sum(), sums.dense.sum()])


def _interval(
    measured: SelectionProfile, choices: Sequence[Choice], sums: Callable[[ChoiceSums, int], Tensor], i: int
) -> Interval:
    """A figure of one choice, or of the first less that of the second."""
    by_chunk = [torch.stack([sums(chunk[choice], i) for chunk in measured.by_chunk]) for choice in choices]

    def figure(left_out: int | None) -> float:
        values = []
        for parts in by_chunk:
            total = parts.sum(0) - (0 if left_out is None else parts[left_out])
            value = (total[0] / total[1]).nan_to_num(nan=0.0)
            values.append(value.clamp(min=0).sqrt() if sums is _error else value)
        return float(values[0] - values[1] if len(values) == 2 else values[0])

    count = len(measured.by_chunk)
    if count < 3:
        return Interval(figure(None), None)
    without = torch.tensor([figure(chunk) for chunk in range(count)], dtype=torch.float64, device="cpu")
    deviation = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return Interval(figure(None), 1.96 * float(deviation))
