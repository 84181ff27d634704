"""The figures by which the evaluation compares kinds of memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Proportion:
    """A share of cases with its 95 % Wilson interval (Wilson 1927); NaN without cases.

    The share is rounded to six digits, so that whole percent come out of it as they are, and the ends to four.
    """

    value: float
    low: float
    high: float
    count: int
    """of all cases"""

    @classmethod
    def of(cls, hits: Sequence[bool]) -> "Proportion":
        """The share of the cases that are true."""
        n, z = len(hits), 1.96
        if not n:
            return cls(math.nan, math.nan, math.nan, 0)
        p = sum(hits) / n
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        # Rounding errors can leave the ends just outside of 0 and 1.
        return cls(round(p, 6), max(0.0, round(low, 4)), min(1.0, round(high, 4)), n)


@dataclass(frozen=True)
class KindFigures:
    """How returns went under one kind of memory. Hues are in degrees."""

    memory: str
    """the name of the kind"""
    hue: Proportion
    """of returns: the character has the hue of its first appearance, within 30 degrees"""
    median_error: float
    """median hue difference, over returns with the character present both times"""
    pattern: Proportion
    """of returns: the character has the pattern of its first appearance"""
    chance_hue: float
    """share of equal hues with identities shuffled: each return against the first appearances in all other stories"""
    chance_pattern: float
    """share of equal patterns, likewise"""
    others_hue: float
    """share of equal hues between returns and the first appearances of the other characters in the same story: what a
    memory would reach that brings back the wrong one of its frames"""
    shape: Proportion
    """of all appearances: the shape is that of the named character"""
    pairs: Proportion
    """of prompts that bring back two characters: both have their hue"""
    gaps: dict[str, Proportion]
    """`hue`, by frames of absence"""
    precision: float | None
    """share of the retrieved frames, at returns, that show somebody whom the prompt names; None without retrieval"""
    activated: float | None
    """share of the bank's blocks that a query group selects, at returns; None where no blocks are selected"""
    copies: float
    """share of first appearances with the hue of the character before (by chance one in six); NaN without cases"""
    drift: float
    """median hue change over a prompt, from its first to its last chunk"""
    hues: list[int]
    """first appearances per sixth of the colour circle, from 0, 60, ... 300 degrees on"""
    each_hue: str
    """`hue`, return by return: "1" where it is that of the first appearance, else "0". Kinds that stream the same
    stories have the same returns, in the same order."""
    each_pattern: str
    """`pattern`, likewise"""


@dataclass(frozen=True)
class KindTiming:
    """What a chunk of four stories takes under one kind of memory, while all kinds are streamed in turn."""

    seconds: float
    """median"""
    ratio: float | None
    """median of the ratios to the same chunk under "none"; None where that was not timed"""
    ratio_p20: float | None
    ratio_p80: float | None


def median(values: Sequence[float]) -> float:
    """The lower median, rounded to four digits; NaN of nothing."""
    return round(torch.tensor(values, dtype=torch.float64, device="cpu").median().item(), 4) if values else math.nan


def mean(values: Sequence[float]) -> float | None:
    """The mean, rounded to four digits; None of nothing."""
    return round(sum(values) / len(values), 4) if values else None
