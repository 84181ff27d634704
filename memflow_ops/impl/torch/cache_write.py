"""Norm, rotation and the write of whole frames into a cache, vectorised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.geometry import WriteTarget
from memflow_ops.impl.precision import widened
from memflow_ops.impl.torch.selection import describe_blocks
from memflow_ops.rotary import turn_pairs


def write_frames(pool: Tensor, places: Tensor, new: Tensor) -> None:
    """Write frame i of batch element b of new (B, F, T, Hkv, D) to place places[b, i] of pool (B, P, T, Hkv, D).

    A frame whose place is not one of the pool's is not written.
    """
    if pool.device.type == "cpu":  # Here the host can read the places at no cost, and a frame is one copy.
        for b, of_element in enumerate(places.tolist()):
            for i, place in enumerate(of_element):
                if 0 <= place < pool.shape[1]:
                    pool[b, place] = new[b, i]
    else:
        write_frames_on_device(pool, places, new)


def write_frames_on_device(pool: Tensor, places: Tensor, new: Tensor) -> None:
    """`write_frames` without reading the places on the host."""
    each = torch.arange(len(pool), dtype=torch.int64, device=pool.device)
    for i in range(new.shape[1]):
        place = places[:, i].long()
        there = (place >= 0) & (place < pool.shape[1])
        place = place.clamp(0, pool.shape[1] - 1)
        pool[each, place] = torch.where(there.view(-1, 1, 1, 1), new[:, i], pool[each, place])


def write_projections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    norm: tuple[Tensor | None, Tensor | None, float],
    target: WriteTarget,
    memory_rotation: tuple[Tensor | None, Tensor | None] = (None, None),
    memory_q: Tensor | None = None,
) -> Tensor:
    weight_q, weight_k, eps = norm
    plain_q = _normalised(q, weight_q, eps)
    rotated_q = _rotated(plain_q, *rotation, q.dtype)
    cosines, sines = memory_rotation
    if memory_q is not None and cosines is not None and sines is not None:
        width = 2 * cosines.shape[-1]
        memory_q[..., :width] = _rotated(plain_q[..., :width], cosines, sines, q.dtype)
        memory_q[..., width:] = rotated_q[..., width:]
    plain_k = _normalised(k, weight_k, eps)
    rotated_k = _rotated(plain_k, *rotation, k.dtype)
    frame_tokens = target.frame_tokens
    if target.means is not None:
        count = target.means.shape[1]
        tokens = plain_k[:, : count * frame_tokens]
        target.means.copy_(describe_blocks(tokens, target.mean_size, frame_tokens).unflatten(1, (count, -1)))
    pools = [(target.memory_k, rotated_k), (target.memory_v, v)]
    if target.descriptors is not None:
        described = describe_blocks(rotated_k, target.block_size, frame_tokens, target.moments)
        pools.append((target.descriptors, described))
    pool_frames = target.memory_k.shape[1] // frame_tokens
    for pool, new in pools:
        frames = new.unflatten(1, (target.places.shape[1], -1))
        write_frames(pool.unflatten(1, (pool_frames, -1)), target.places, frames)
    return rotated_q


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x (B, L, H, D) in float32 or wider, after RMSNorm over all heads of a token (weight None: as it is)."""
    x = widened(x)
    if weight is None:
        return x
    flat = x.flatten(2)
    return F.rms_norm(flat, (flat.shape[-1],), eps=eps).mul_(weight.to(x.dtype)).view(x.shape)


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, dtype: torch.dtype) -> Tensor:
    return turn_pairs(x, torch.complex(cosines.to(x.dtype), sines.to(x.dtype))[:, :, None]).to(dtype)
