"""Memory attention made of its parts: a dense backend, the selection of blocks, and attention to these."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry, descriptor_width
from memflow_ops.impl import dense, implementation_of


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    memory_q: Tensor | None,
    descriptors: Tensor | None,
    top_k: int,
    geometry: Geometry,
    impl: str,
    dense_backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, LSE and the selected indices (B, H, G, K), K = 0 without a bank; see `memflow_ops.memory_attention`."""
    implementation = implementation_of(impl, q.device)
    backend = dense.resolve(dense_backend, impl, q, k, v, geometry)
    segment: tuple[Tensor | None, Tensor | None] = (k, v)
    resume = None
    if backend != "own":
        resume = dense.attend(backend, q, k, v, geometry.softmax_scale, geometry.causal)
        segment = (None, None)
    if memory_k is None or memory_v is None:
        groups = geometry.query_groups(q.shape[1])
        indices = q.new_empty((q.shape[0], q.shape[2], groups, 0), dtype=torch.int32)
        out, lse = resume or implementation.attend(q, k, v, None, None, indices, geometry)
        return out, lse, indices
    if descriptors is None:
        moments = descriptor_width(memory_k.shape[-1], geometry.score) // memory_k.shape[-1]
        descriptors = implementation.describe_blocks(memory_k, geometry.block_size, geometry.frame_tokens, moments)
    indices = implementation.select_blocks(q if memory_q is None else memory_q, descriptors, top_k, geometry)
    out, lse = implementation.attend(q, *segment, memory_k, memory_v, indices, geometry, resume, memory_q)
    return out, lse, indices
