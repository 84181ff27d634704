"""Forward-mode derivatives: an operator that has none refuses tangents, which torch would take for zero in silence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(operator: str, *tensors: object) -> None:
    """Raise a NotImplementedError if one of the tensors has a tangent, at any level of `torch.func` or of dual tensors.

    This costs nothing outside of forward-mode differentiation.
    """
    if forward_ad._current_level < 0:
        return
    for x in tensors:
        if isinstance(x, Tensor) and x.is_floating_point():
            _WithoutTangent.apply(x, operator)


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
