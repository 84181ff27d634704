"""Cases with a second query for the bank, `memory_q`, and plain attention to compare with.

It is plain attention with heads of twice the size: queries [q, memory_q] over keys [k, 0] of the window and
[0, memory_k] of the bank.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from attention_cases import Case, dense_attention
from torch import Tensor


def with_second_query(case: Case) -> Case:
    """The case with a memory_q, where it has a bank."""
    if case.memory_k is None:
        return case
    return replace(case, options={**case.options, "memory_q": torch.randn_like(case.q)})


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    options = dict(case.options)
    if "memory_q" in options:
        options["memory_q"] = options["memory_q"].to(dtype)
    return replace(case.to(dtype), options=options)


def chosen(case: Case, impl: str) -> Tensor | None:
    """What the second query selects."""
    return replace(case, q=case.options.get("memory_q", case.q)).indices(impl)


def dense(case: Case, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """Out and LSE of plain attention over the window and these blocks."""
    size = case.q.shape[-1]
    scale = case.options["softmax_scale"] or size**-0.5
    second = case.options.get("memory_q")
    if second is None:
        return dense_attention(case, indices)
    wide = Case(
        torch.cat([case.q, second], -1),
        *(F.pad(x, (0, size)) for x in (case.k, case.v)),
        F.pad(case.memory_k, (size, 0)),
        F.pad(case.memory_v, (0, size)),
        {**case.options, "softmax_scale": scale},
    )
    out, lse = dense_attention(wide, indices)
    return out[..., :size], lse
