"""`impl="torch"` of the cache write and of retrieval: vectorised; the default on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.torch_impl import describe_blocks


def write_projections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cosines: Tensor,
    sines: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    places: Tensor,
    weight_q: Tensor | None,
    weight_k: Tensor | None,
    descriptors: Tensor | None,
    means: Tensor | None,
    *,
    frame_tokens: int,
    block_size: int,
    mean_size: int,
    eps: float,
) -> Tensor:
    plain_k = _normalised(k, weight_k, eps)
    rotated_k = _rotated(plain_k, cosines, sines, k.dtype)
    if means is not None:
        count = means.shape[1]
        tokens = plain_k[:, : count * frame_tokens]
        means.copy_(describe_blocks(tokens, mean_size, frame_tokens).unflatten(1, (count, -1)))
    pools = [(memory_k, rotated_k), (memory_v, v)]
    if descriptors is not None:
        pools.append((descriptors, describe_blocks(rotated_k, block_size, frame_tokens)))
    pool_frames = memory_k.shape[1] // frame_tokens
    for pool, new in pools:
        _put_frames(pool.unflatten(1, (pool_frames, -1)), new.unflatten(1, (places.shape[1], -1)), places)
    return _rotated(_normalised(q, weight_q, eps), cosines, sines, q.dtype)


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (B, L, H, D) in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is None:
        return x
    flat = x.flatten(2)
    return (F.rms_norm(flat, (flat.shape[-1],), eps=eps) * weight.to(x.dtype)).view(x.shape)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, dtype: torch.dtype) -> Tensor:
    c, s = cosines[:, :, None].to(x.dtype), sines[:, :, None].to(x.dtype)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2).to(dtype)


def _put_frames(pool: Tensor, new: Tensor, places: Tensor) -> None:
    """new (B, F, ...) to the places (B, F) of pool (B, P, ...) that there are; on CUDA the host waits for them."""
    for story, frames in enumerate(places.tolist()):
        for frame, place in enumerate(frames):
            if 0 <= place < pool.shape[1]:
                pool[story, place] = new[story, frame]
