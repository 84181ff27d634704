"""Attention states (out and LSE) over disjoint sets of keys: their merging, and the gradient of a resumed one."""

from __future__ import annotations

import torch
from torch import Tensor


def resumed_gradients(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, resume_out: Tensor, resume_lse: Tensor
) -> list[Tensor]:
    """The gradients of the state (resume_out, resume_lse) that attention with the result (out, lse) continued.

    The state took part in the softmax as one more key, whose score is its LSE and whose value is its out.
    """
    wide = lse.dtype
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    weight = _state_weight(resume_lse, lse)
    slope = (grad_out.to(wide) * (resume_out.to(wide) - out.to(wide))).sum(-1).transpose(1, 2)
    if grad_lse is not None:
        slope = slope + grad_lse
    # A state without weight is ignored, NaN included.
    grad_resume_lse = torch.where(weight == 0, 0.0, weight * slope)
    return [(grad_out * weight.transpose(1, 2).unsqueeze(-1)).to(out.dtype), grad_resume_lse]


def _state_weight(lse: Tensor, total: Tensor) -> Tensor:
    """The share exp(lse - total) that a state has in the whole softmax; 0 where the whole has no key."""
    return torch.where(total == -torch.inf, 0.0, torch.exp(lse - total))


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    # The gradient of logaddexp is NaN where both are -inf. A query without keys must get none.
    empty = (lse_a == -torch.inf) & (lse_b == -torch.inf)
    lse = torch.logaddexp(lse_a.masked_fill(empty, 0.0), lse_b.masked_fill(empty, 0.0)).masked_fill(empty, -torch.inf)
    wide = lse_a.dtype
    parts = []
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        gone = part == -torch.inf
        weight = torch.exp(part.masked_fill(gone, 0.0) - lse.masked_fill(gone, 0.0)).masked_fill(gone, 0.0)
        weight = weight.transpose(1, 2).unsqueeze(-1)
        parts.append(torch.where(weight > 0, out.to(wide), 0.0) * weight)
    return (parts[0] + parts[1]).to(out_a.dtype), lse
