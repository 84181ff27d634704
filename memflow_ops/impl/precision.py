"""The precision in which the implementations in plain torch compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast leaves products alone on the device of x: inputs decide the precision."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return _NOTHING  # The other takes 6 us of the host, and tensors without values have none.
    return torch.autocast(kind, enabled=False)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where one of the dtypes is float64."""
    return reduce(torch.promote_types, dtypes, torch.float32)


def widened(x: Tensor) -> Tensor:
    """x in the dtype to compute in."""
    return x.to(wide_dtype(x.dtype))


def as_autocast_does(*tensors: Any, to: torch.dtype | None = None) -> tuple[Any, ...]:
    """Tensors whose dtypes differ, in one dtype, where autocast is on: so it treats the inputs of torch's attention.

    to: that dtype, which also tensors that agree are cast to; None: the dtype of autocast. As with autocast, float64
    stays as it is. So does what is no tensor or holds integers, and everything where autocast is off.
    """
    dtypes = {x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()}
    if not dtypes or (len(dtypes) == 1 and (to is None or to in dtypes)):
        return tensors
    kind = next(x.device.type for x in tensors if isinstance(x, Tensor))
    if kind not in _HAVE_AUTOCAST or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = to or torch.get_autocast_dtype(kind)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in _CAST_BY_AUTOCAST else x for x in tensors)


# Asked here, because torch.compile of torch 2.11 cannot trace the question.
_HAVE_AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))

_CAST_BY_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)
