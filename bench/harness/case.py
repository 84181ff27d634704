"""What a benchmark case is made of: contenders, their inputs, and the checks of their results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from memflow_ops.bench.sizes import Size

OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """One way to compute what a case asks for."""

    call: Callable[[], Any]
    """Computes it once."""
    check: Callable[[], None]
    """Raises an AssertionError where the result is wrong. It runs before anything is timed."""
    flops: int = 0
    """Floating-point operations of one call; 0 where nobody has counted them."""
    bytes: int = 0
    """What one call must read and write at least; 0 where nobody has counted it."""
    every: int = 1
    """It is timed in every such round only; for what takes long."""
    graph: bool = True
    """Whether it can be captured in a CUDA graph."""
    video_frames: int = 0
    """Frames of video that one call makes."""
    notes: Callable[[], dict[str, object]] | None = None
    """Measures what else its row of results says, once, after the timing."""
    settings: dict[str, object] = field(default_factory=dict)
    """Its settings, where they are not those of the case."""


@dataclass
class Built:
    """A case's contenders over one set of inputs: ours first, then the baseline that ratios are over."""

    contenders: dict[str, Contender]
    left_out: dict[str, str] = field(default_factory=dict)
    """Contenders that cannot run here, and why."""


Build = Callable[[torch.device, int], Built]
"""build(device, seed) makes a case's inputs and its contenders over them."""


def build_of(make: Callable[..., Built], size: Size, dtype: str, **options: Any) -> Build:
    """A case's build. make: takes a size, a dtype, a device and a seed, and the options."""
    torch_dtype = getattr(torch, dtype)
    return lambda device, seed: make(size, torch_dtype, device, seed, **options)


@dataclass(frozen=True)
class Case:
    """Something that is measured."""

    name: str
    """`level/what/size/dtype`, then what is special about it."""
    level: str
    """What is measured at a time: `stream` (a chunk), `layer`, `op` or `kernel`."""
    group: str
    """The part of the registry that it belongs to and is asked for by."""
    size: Size
    dtype: str
    against: str
    """What its ratio is over, in words."""
    build: Build
    devices: tuple[str, ...]
    """The types of devices that it fits."""
    rounds: int = 15
    """Rounds of timing, unless others are asked for."""
    settings: dict[str, object] = field(default_factory=dict)
    """The settings of ours, where they are not those of the size."""
    needs_triton: bool = False
    """Whether it calls our Triton kernels by name."""

    def all_settings(self) -> dict[str, object]:
        """The settings as the row of ours states them."""
        return self.size.settings() | self.settings
