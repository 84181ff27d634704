"""Which implementation `auto` stands for, and empty results of the shapes that operators return."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.impl.precision import wide_dtype


def resolve(impl: str, x: Tensor) -> str:
    """The name of an implementation: `auto` is `triton` for x on CUDA and not in float64, else `torch`."""
    if impl != "auto":
        return impl
    return "triton" if x.device.type == "cuda" and x.dtype != torch.float64 else "torch"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def empty_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """An empty out (B, Lq, H, D) and LSE (B, H, Lq)."""
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=wide_dtype(q.dtype))


def empty_indices(q: Tensor, groups: int, entries: int) -> Tensor:
    """Empty indices (B, H, G, K) of `groups` query groups and `entries` blocks for each."""
    return q.new_empty((q.shape[0], q.shape[2], groups, entries), dtype=torch.int32)
