"""What a benchmark case is made of: contenders, inputs and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from memflow_ops.bench.sizes import Size

Call = Callable[[], Any]

OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """One way to compute what a case asks for.

    call: runs it once. check: raises an AssertionError where its result is wrong; run before anything is timed.
    flops, bytes: what one call computes and must read and write at least; 0 where nobody has counted.
    every: timed in every such round only (what takes long). graph: whether it can be captured in a CUDA graph.
    video_frames: that one call makes. notes: measured once, after the timing. settings: where they are not the case's.
    """

    call: Call
    check: Callable[[], None]
    flops: int = 0
    bytes: int = 0
    every: int = 1
    graph: bool = True
    video_frames: int = 0
    notes: Callable[[], dict[str, object]] | None = None
    settings: dict[str, object] = field(default_factory=dict)


@dataclass
class Built:
    """A case's contenders over one set of inputs: ours first, then the one that ratios are over."""

    contenders: dict[str, Contender]
    left_out: dict[str, str] = field(default_factory=dict)
    """Those that cannot run here, and why."""


Build = Callable[[torch.device, int], Built]


@dataclass(frozen=True)
class Case:
    """Something that is measured.

    against: what its ratio is over, in words. group: the part of the registry that is asked for by name: tiny, wan-1.3b
    or long. devices: where it fits. rounds: of timing, by default. settings: of ours, where they are not the size's.
    """

    name: str
    level: str
    group: str
    size: Size
    dtype: str
    against: str
    build: Build
    devices: tuple[str, ...]
    rounds: int = 15
    settings: dict[str, object] = field(default_factory=dict)

    def all_settings(self) -> dict[str, object]:
        """As the row of ours states them."""
        return self.size.settings() | self.settings
