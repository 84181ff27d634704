"""A kernel with everything that its launch needs, so that what runs and what is compiled ahead of time are the same."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch

STATED_OPTIONS = {"enable_fp_fusion": True}
"""What every kernel asks of the compiler, whose defaults change: triton 3.9 fuses a multiplication with the addition
that follows it, and warns that 3.10 will not."""


@dataclass(frozen=True)
class Launch:
    """A jit kernel, its grid (programs per axis), all of its arguments by name, and num_warps and num_stages.

    An argument may be a tuple, a named one too, of tensors, numbers, None and tuples, or a tensor descriptor of Gluon.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    @property
    def compiler_options(self) -> dict[str, Any]:
        """All options that the compiler gets, from whoever compiles."""
        return {**STATED_OPTIONS, **self.options}

    def run(self) -> None:
        """Launch on the device of the tensors, without waiting. An empty grid has nothing to write."""
        if prod(self.grid) == 0:
            return
        with torch.cuda.device_of(next(tensors_in(self.arguments.values()))):
            self.kernel[self.grid](**self.arguments, **self.compiler_options)


class Step(Protocol):
    """What a plan consists of: launches, and what runs between them."""

    def run(self) -> None: ...


def run_all(steps: Iterable[Step]) -> None:
    """Run the steps of a plan in order."""
    for step in steps:
        step.run()


def tensors_in(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among values, in tuples among them and behind tensor descriptors, in order."""
    for value in values:
        value = getattr(value, "base", value) if hasattr(value, "block_shape") else value
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from tensors_in(value)
