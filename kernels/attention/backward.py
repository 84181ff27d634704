"""The backward pass of the attention to a dense segment and selected blocks: what is launched for which gradient.

With P = exp(scores - LSE) under the final LSE, dV = P^T dO, dS = P * (dO V^T - delta), dQ = dS K, dK = dS^T Q, where
delta = rowsum(dO * O) - dLSE (FlashAttention-2, arXiv 2307.08691, algorithm 2). Kernels of their own walk over queries
and over keys, and each computes P again. No two programs add to the same number, so runs are equal bit for bit.
"""

from collections.abc import Sequence

import torch

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.backward_keys import plan_backward_keys
from memflow_ops.kernels.attention.backward_queries import plan_backward_queries, plan_row_terms
from memflow_ops.kernels.attention.blocks import Segment, segment_of, window_of
from memflow_ops.kernels.attention.inverse import Sort, plan_inverse
from memflow_ops.kernels.attention.stored_gradient import plan_stored_gradient
from memflow_ops.kernels.launch import Launch, run_all


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
    geometry: Geometry,
    wanted: Sequence[bool],
    *,
    capability: int | None = None,
) -> tuple[list[Launch | Sort], list[torch.Tensor | None]]:
    """The steps that fill the gradients of q, k, v, memory_k and memory_v, in order, and the gradients.

    See `attend_backward`. capability: of the device, 90 for sm_90 (None: that of q's device).
    """
    grad_out, indices = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, indices))
    window = window_of(k, v, geometry)
    memory = segment_of(memory_k, memory_v) if indices.shape[-1] else Segment()
    launch, terms = plan_row_terms(grad_out, out, lse, grad_lse)
    steps: list[Launch | Sort] = [launch]
    gradients: list[torch.Tensor | None] = [None] * 5
    if wanted[0]:
        launches, gradients[0] = plan_backward_queries(
            grad_out, terms, q, window, memory, indices, geometry, capability=capability
        )
        steps += launches
    if window.k is not None and (wanted[1] or wanted[2]):
        launch, *gradients[1:3] = plan_backward_keys(
            grad_out, terms, q, window, None, geometry, (wanted[1], wanted[2]), capability=capability
        )
        steps.append(launch)
        if window.frames is not None:
            for number in (1, 2):
                of_window = gradients[number]
                if of_window is not None:
                    launch, gradients[number] = plan_stored_gradient(of_window, window.frames)
                    steps.append(launch)
    if memory.k is not None and (wanted[3] or wanted[4]):
        inverting, inverse = plan_inverse(indices, memory.k, geometry)
        launch, *gradients[3:5] = plan_backward_keys(
            grad_out, terms, q, memory, inverse, geometry, (wanted[3], wanted[4]), capability=capability
        )
        steps += [*inverting, launch]
    # Keys that no query could attend to have gradients of zero.
    for number, x, part in ((1, k, window), (2, v, window), (3, memory_k, memory), (4, memory_v, memory)):
        if wanted[number] and x is not None and part.k is None:
            gradients[number] = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
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
    geometry: Geometry,
    wanted: Sequence[bool],
) -> list[torch.Tensor | None]:
    """The gradients of q, k, v, memory_k and memory_v where `wanted` (five bools) says so, else None.

    The arguments are those of `attend`; grad_out (B, Lq, H, D) and grad_lse (B, H, Lq) float32 (None: 0) are what
    arrives from above. out and lse are those of the whole softmax, whoever else took part in it. The gradients are
    contiguous and of the inputs' dtype, accumulated in float32. They are zero for keys that no query attended to, which
    are not read.
    """
    steps, gradients = plan_attend_backward(
        grad_out, grad_lse, q, k, v, memory_k, memory_v, indices, out, lse, geometry, wanted
    )
    run_all(steps)
    return gradients
