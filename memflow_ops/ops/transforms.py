"""Derivatives that an operator does not have are refused before anything runs.

Torch would take a tangent for zero in silence, and names neither operator nor input where `torch.func` asks for a
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad


def refuse_transforms(operator: str, *tensors: object) -> None:
    """Raise a NotImplementedError if a derivative is asked for that `operator`, a custom operator, does not have.

    That is if one of the tensors has a tangent, at any level of `torch.func` or of dual tensors, or needs a gradient
    under a transformation of `torch.func`. This costs nothing where there is neither.
    """
    if forward_ad._current_level >= 0:
        for x in tensors:
            if isinstance(x, Tensor) and x.is_floating_point():
                _WithoutTangent.apply(x, operator)
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and _needs_gradient(x) for x in tensors):
        raise NotImplementedError(
            f"{operator} has no gradient under torch.func (grad, vjp, jacrev, vmap), and an input needs one: use "
            f"backward or torch.autograd.grad, or detach the input"
        )


def _needs_gradient(x: Tensor) -> bool:
    """Whether x needs a gradient at any level of transformations, each of which wraps it once more."""
    while not x.requires_grad:
        if not functorch.is_functorch_wrapped_tensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


class _WithoutTangent(torch.autograd.Function):
    """A function whose forward-mode derivative is an error.

    Torch asks for it exactly where an input has a tangent, however transformations are nested.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, operator: str) -> Tensor:
        return x.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.operator = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        raise NotImplementedError(
            f"{ctx.operator} has no forward-mode derivative (torch.func.jvp, jacfwd, dual tensors), and an input has a "
            f"tangent: use reverse mode (backward, torch.autograd.grad), or detach the input"
        )
