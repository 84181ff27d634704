"""A kernel with everything that its launch needs, so that what runs and what is compiled ahead of time are the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """A jit kernel, its grid (programs per axis), all of its arguments by name, and num_warps and num_stages."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    options: Mapping[str, int]

    def run(self) -> None:
        """Launch on the device of the tensors, without waiting. An empty grid has nothing to write."""
        if prod(self.grid) == 0:
            return
        tensor = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(tensor):
            self.kernel[self.grid](**self.arguments, **self.options)
