"""The figures of one kind of memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

GAPS = ((24, 48), (49, 120), (121, 240))


@dataclass(frozen=True)
class Proportion:
    """A share of cases with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    count: int
    """of cases in all"""

    @classmethod
    def of(cls, hits: Sequence[bool]) -> "Proportion":
        n, z = len(hits), 1.96
        if not n:
            return cls(math.nan, math.nan, math.nan, 0)
        p = sum(hits) / n
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        return cls(round(p, 4), round(low, 4), round(high, 4), n)


@dataclass(frozen=True)
class KindFigures:
    """How returns went under one kind of memory. Hues in degrees."""

    memory: str
    hue: Proportion
    """of returns: the hue of the first appearance, within 30 degrees"""
    median_error: float
    """median hue difference, over returns with the character present both times"""
    pattern: Proportion
    """of returns: the pattern of the first appearance"""
    chance_hue: float
    """the same with identities shuffled: of returns held against first appearances in all other stories"""
    chance_pattern: float
    others_hue: float
    """of returns held against the first appearances of the others in the same story: what a memory that brings back
    the wrong one of its frames would reach"""
    shape: Proportion
    """of all appearances: looks like the character that was named"""
    pairs: Proportion
    """of prompts that bring back two: both have their hue"""
    gaps: dict[str, Proportion]
    """hue, by frames of absence"""
    precision: float | None
    """share of the retrieved frames, at returns, that show somebody the prompt names; None without retrieval"""
    activated: float | None
    """share of the bank's blocks that a query group selects, at returns; None where nothing is selected"""
    copies: float
    """share of first appearances with the hue of the character before (chance 1/6)"""
    drift: float
    """median hue change over a prompt, first to last chunk"""
    hues: list[int]
    """first appearances per sixth of the colour circle"""


@dataclass(frozen=True)
class KindTiming:
    """What a chunk of four stories takes under one kind of memory, all kinds in turn, chunk by chunk."""

    seconds: float
    """median"""
    ratio: float | None
    """median of the ratios to the same chunk under "none"; None without such"""
    ratio_p20: float | None
    ratio_p80: float | None


# -------------------------------------------------------------------------------------------------------------- looking


Story = list[str]
