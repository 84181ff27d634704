"""The backward pass of the attention over a dense segment and selected blocks: what is launched for which gradient.

With P = exp(scores - LSE) under the final LSE, dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q, where
delta = rowsum(dO * O) - dLSE (FlashAttention-2, arXiv 2307.08691, algorithm 2). Queries and keys are walked over in
kernels of their own, which recompute P: nothing is added to from two programs, so that runs are equal bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton

from memflow_ops.kernels.attention.backward_keys import plan_backward_keys
from memflow_ops.kernels.attention.backward_queries import plan_backward_queries, plan_row_terms
from memflow_ops.kernels.attention.inverse import Sort, plan_inverse
from memflow_ops.kernels.launch import Launch


def plan_attend_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor | None,
    memory_v: torch.Tensor | None,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    wanted: Sequence[bool],
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    memory_slots: torch.Tensor | None = None,
    capability: int | None = None,
) -> tuple[list[Launch | Sort], list[torch.Tensor | None]]:
    """The steps that fill the gradients of q, k, v, memory_k and memory_v, in order, and these. See `attend_backward`.

    capability: of the device, 90 for sm_90 (None: that of q's).
    """
    grad_out, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, indices))
    launch, terms = plan_row_terms(grad_out, out, lse, grad_lse)
    steps: list[Launch | Sort] = [launch]
    sizes = dict(
        block_size=block_size, frame_tokens=frame_tokens, query_group=query_group, softmax_scale=softmax_scale,
        capability=capability,
    )  # fmt: skip
    window, bank = (
        None if x is None or y is None or not x.shape[1] else (x, y) for x, y in ((k, v), (memory_k, memory_v))
    )
    if not indices.shape[-1]:
        bank = None
    gradients = [
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if want and x is not None and segment is None else None
        for x, want, segment in zip(
            (None, k, v, memory_k, memory_v), wanted, (None, window, window, bank, bank), strict=True
        )
    ]
    if wanted[0]:
        launches, gradients[0] = plan_backward_queries(
            grad_out, terms, q, *(window or (None, None)), *(bank or (None, None)), None if bank is None else indices,
            memory_slots=None if bank is None else memory_slots, **sizes,
        )  # fmt: skip
        steps += launches
    if window is not None and (wanted[1] or wanted[2]):
        launch, *gradients[1:3] = plan_backward_keys(
            grad_out, terms, q, *window, None, wanted=(wanted[1], wanted[2]), **sizes
        )
        steps.append(launch)
    if bank is not None and (wanted[3] or wanted[4]):
        inverting, inverse = plan_inverse(
            indices, memory_slots, kv_heads=bank[0].shape[2], query_group=query_group,
            physical_frames=bank[0].shape[1] // frame_tokens, blocks_per_frame=triton.cdiv(frame_tokens, block_size),
        )  # fmt: skip
        launch, *gradients[3:5] = plan_backward_keys(
            grad_out, terms, q, *bank, inverse, wanted=(wanted[3], wanted[4]), **sizes
        )
        steps += [*inverting, launch]
    return steps, gradients


def attend_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor | None,
    memory_v: torch.Tensor | None,
    indices: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    **options: Any,
) -> list[torch.Tensor | None]:
    """The gradients of q, k, v, memory_k and memory_v where `wanted` (five bools) says so, else None.

    The arguments are those of `attend`; grad_out (B, Lq, H, D) and grad_lse (B, H, Lq) float32 (None: 0) are what
    arrives from above. out and lse are those of the whole softmax, whoever else took part in it. Contiguous, of the
    inputs' dtype, accumulated in float32; zero for keys that nobody attended to, which are not read.
    """
    steps, gradients = plan_attend_backward(
        grad_out, grad_lse, q, k, v, memory_k, memory_v, indices, out, lse, **options
    )
    for step in steps:
        step.run()
    return gradients
