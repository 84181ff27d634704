"""The operators that write into the cache, as torch sees them: schema and fake."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.geometry import WriteTarget
from memflow_ops.impl import implementation_of
from memflow_ops.impl.precision import without_autocast
from memflow_ops.impl.torch import cache_write


@torch.library.custom_op(
    "memflow_ops::write_projections", mutates_args=("memory_q", "memory_k", "memory_v", "descriptors", "means")
)
def write_projections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor,
    sines: Tensor,
    memory_cosines: Tensor | None,
    memory_sines: Tensor | None,
    memory_q: Tensor | None,
    memory_k: Tensor,
    memory_v: Tensor,
    places: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    descriptors: Tensor | None,
    means: Tensor | None,
    frame_tokens: int,
    block_size: int,
    mean_size: int,
    eps: float,
    impl: str,
) -> Tensor:
    target = WriteTarget(memory_k, memory_v, places, frame_tokens, descriptors, block_size, means, mean_size)
    with without_autocast(q):
        return implementation_of(impl, q.device).write_projections(
            q, k, v, (cosines, sines), (weight_q, weight_k, eps), target, (memory_cosines, memory_sines), memory_q
        )


@write_projections.register_fake
def _(q, *arguments) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("memflow_ops::write_frames", mutates_args=("pool",))
def write_frames(pool: Tensor, places: Tensor, new: Tensor) -> None:
    """Write frame i of batch element b of new (B, F, T, Hkv, D) to place places[b, i] of pool (B, P, T, Hkv, D).

    places: (B, F) int32, all different in a batch element. A frame whose place is not one of the pool's is not written.
    On a device the host never reads the places, so that a CUDA graph of this follows them.
    """
    cache_write.write_frames(pool, places, new)


@write_frames.register_fake
def _(pool: Tensor, places: Tensor, new: Tensor) -> None:
    return None
