"""Which implementation runs an operator, and empty results of the shapes that operators return."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor


def resolve(impl: str, x: Tensor) -> str:
    """What `auto` stands for: `triton` on CUDA and not in float64, else `torch`."""
    if impl != "auto":
        return impl
    return "triton" if x.device.type == "cuda" and x.dtype != torch.float64 else "torch"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def implementation_of(impl: str) -> ModuleType:
    """The module `memflow_ops.impl.<impl>`, imported on first use, so that only Triton's users need Triton."""
    return importlib.import_module(f"memflow_ops.impl.{impl}")


def empty_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Empty out (B, Lq, H, D) and LSE (B, H, Lq)."""
    batch, queries, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=wide)


def empty_indices(q: Tensor, blocks: int, top_k: int, query_group: int) -> Tensor:
    batch, queries, heads, _ = q.shape
    return q.new_empty((batch, heads, -(-queries // query_group), min(top_k, blocks)), dtype=torch.int32)
