"""Medians, paired ratios, and whether they decide anything."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The order of the names in a round of that number.

    In as many rounds as there are names (twice as many for an odd count), each is in every place, and next after every
    other, equally often. These are the Latin squares of Williams (1949).
    """
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2, ...
    order = [names[(step + number) % count] for step in zigzag]
    return order[::-1] if count % 2 and number // count % 2 else order


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile."""
    ordered = sorted(values)
    pick = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return {"p20": pick(0.2), "p50": statistics.median(ordered), "p80": pick(0.8)}


def paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, float]:
    """Quantiles of the ratios of the rounds in which both ran."""
    return quantiles([a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None])


def decided(ratio: Mapping[str, float], rounds: int) -> bool:
    """Whether the spread of a ratio leaves no doubt which of the two is faster. A single round has no spread."""
    return rounds > 1 and (ratio["p20"] > 1 or ratio["p80"] < 1)
