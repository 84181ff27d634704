"""The precision in which the implementations in plain torch compute."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves products alone on the device of x: inputs decide the precision."""
    return torch.autocast(x.device.type, enabled=False)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where one of the dtypes is float64."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def widened(x: Tensor) -> Tensor:
    """x in the dtype to compute in."""
    return x.to(wide_dtype(x.dtype))
