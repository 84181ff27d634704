"""How an operator is called, which implementation `auto` stands for, and empty results of operators' shapes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from memflow_ops.impl.precision import wide_dtype


def resolve(impl: str, x: Tensor) -> str:
    """The name of an implementation: `auto` is `triton` for x on CUDA and not in float64, else `torch`."""
    if impl != "auto":
        return impl
    return "triton" if x.is_cuda and x.dtype != torch.float64 else "torch"


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def directly(operator: CustomOpDef) -> Callable[..., Any]:
    """The operator, which writes into none of its arguments, as a function that spares the host torch's dispatcher.

    The way through it takes 30 us with twenty arguments. Where it would only lead to the implementation, a call without
    named arguments runs that, in the state in which the dispatcher would.
    """
    implementation = operator._init_fn

    @functools.wraps(implementation)
    def call(*arguments: Any, **named: Any) -> Any:
        if named or torch.compiler.is_compiling() or _is_seen(arguments):
            return operator(*arguments, **named)
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*arguments)

    return call


def _is_seen(arguments: tuple[Any, ...]) -> bool:
    """Whether anything between a call with these arguments and its implementation has something to do.

    That is autograd, a transformation of torch.func, a mode, a tracer or a profiler, the class of a tensor, and a
    device or a view that has no numbers of its own.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return True
    needs_grad = torch.is_grad_enabled()
    for x in arguments:
        if isinstance(x, Tensor):
            if type(x) is not Tensor or not (x.is_cuda or x.is_cpu) or (needs_grad and x.requires_grad):
                return True
            if x.is_neg() or x._is_zerotensor():
                return True
    return False


def empty_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """An empty out (B, Lq, H, D) and LSE (B, H, Lq)."""
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=wide_dtype(q.dtype))


def empty_indices(q: Tensor, groups: int, entries: int) -> Tensor:
    """Empty indices (B, H, G, K) of `groups` query groups and `entries` blocks for each."""
    return q.new_empty((q.shape[0], q.shape[2], groups, entries), dtype=torch.int32)
