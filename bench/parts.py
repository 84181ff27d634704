"""`make gpu-bench` in parts: which cases each has, the most telling ones first, so that each ends within its minutes.

A rented GPU may give ten minutes at a time. A part that runs out of its time says which of its cases it has not
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memflow_ops.bench.harness.case import Case

MINUTES = 8.0
"""What a part may take, unless another limit is asked for."""


@dataclass(frozen=True)
class Part:
    """Some of the cases, by the starts of their names, in the order in which they are measured."""

    says: str
    starts: tuple[str, ...]


PARTS = {
    "first": Part(
        "window and bank kernels, memory_attention over window, and sink and window, both backwards, selection, host",
        (
            "kernel/window/",
            "kernel/attend/",
            "kernel/memory_attention/wan-1.3b/bfloat16/bank-64/correlated",
            "kernel/backward/wan-1.3b/bfloat16/bank/",
            "kernel/backward/wan-1.3b/bfloat16/window/",
            "kernel/select/",
            "kernel/host/",
        ),
    ),
    "streams": Part("a stream's chunk and a layer, under every kind of memory", ("stream/", "layer/")),
    "kernels": Part(
        "the other kernels: the cache write, retrieval, the largest bank, unrelated tokens, the whole backward",
        ("kernel/write_", "kernel/retrieve/", "kernel/memory_attention/", "kernel/backward/"),
    ),
    "crossovers": Part("up to which window our own launch beats a backend's", ("kernel/short_window/",)),
    "tiles": Part("the attention kernel under other configurations", ("kernel/tiles/",)),
    "ops": Part("every op beside what one would otherwise use", ("op/memory_attention/wan-1.3b/bfloat16", "op/")),
    "long": Part("banks of 4 to 1000 frames", ("op/memory_attention/wan-1.3b/bfloat16/bank-",)),
}
"""By name, in the order in which they are worth a GPU's time."""


def cases_of(part: str, cases: Sequence[Case]) -> list[Case]:
    """The cases of a part, in its order. A case that several parts name is of the one that names it most fully."""
    starts = PARTS[part].starts
    mine = [case for case in cases if _home(case.name) == part]
    return sorted(mine, key=lambda case: starts.index(_longest(starts, case.name)))


def _longest(starts: Sequence[str], name: str) -> str:
    """The longest of the starts that a name has; an empty string if it has none."""
    return max((start for start in starts if name.startswith(start)), key=len, default="")


def _home(name: str) -> str:
    """The part of a case's name. ValueError: it has none."""
    home = max(PARTS, key=lambda part: len(_longest(PARTS[part].starts, name)))
    if not _longest(PARTS[home].starts, name):
        raise ValueError(f"no part of the benchmarks on a GPU has the case {name}: see bench/parts.py")
    return home
