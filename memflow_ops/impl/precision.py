"""In which precision the implementations compute."""

from __future__ import annotations

import torch
from torch import Tensor


def as_given(x: Tensor) -> torch.autocast:
    """Precision is the inputs': autocast would otherwise reach into the implementations' own products."""
    return torch.autocast(x.device.type, enabled=False)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
