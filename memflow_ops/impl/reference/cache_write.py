"""Norm, rotation and the write of whole frames into a cache, frame by frame."""

from __future__ import annotations

from torch import Tensor

from memflow_ops.geometry import WriteTarget
from memflow_ops.impl.precision import widened
from memflow_ops.impl.reference.selection import describe_blocks
from memflow_ops.rotary import with_other_pairs


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
    """
    for every token of q and k:
        y       = x / sqrt(mean(x^2) + eps) * weight
        rotated = y with each pair turned by its angle
    for every frame:
        the frame's place in the pool = rotated keys, values
        the place's descriptors       = those of the blocks of the rotated keys
    for the first M frames:
        means = means of y of the keys
    memory_q = y of the queries with each pair turned by its angle of memory_rotation, or of rotation where it has none
    returns the rotated q
    """
    memory_k, descriptors, frame_tokens = target.memory_k, target.descriptors, target.frame_tokens
    weight_q, weight_k, eps = norm
    plain_q, plain_k = normalised(q, weight_q, eps), normalised(k, weight_k, eps)
    rotated_k = rotated(plain_k, *rotation).to(k.dtype)
    if target.means is not None:
        for frame in range(target.means.shape[1]):
            tokens = plain_k[:, frame * frame_tokens : (frame + 1) * frame_tokens]
            described = describe_blocks(tokens, target.mean_size, frame_tokens)
            target.means[:, frame] = described.to(target.means.dtype)
    for b, frames in enumerate(target.places.tolist()):
        for frame, place in enumerate(frames):
            if not 0 <= place < memory_k.shape[1] // frame_tokens:
                continue
            source = slice(frame * frame_tokens, (frame + 1) * frame_tokens)
            stored = slice(place * frame_tokens, (place + 1) * frame_tokens)
            memory_k[b, stored], target.memory_v[b, stored] = rotated_k[b, source], v[b, source]
            if descriptors is not None:
                keys = rotated_k[b : b + 1, source]
                described = describe_blocks(keys, target.block_size, frame_tokens, target.moments)[0]
                descriptors[b, place * len(described) : (place + 1) * len(described)] = described
    cosines, sines = memory_rotation
    if memory_q is not None and cosines is not None and sines is not None:
        memory_q.copy_(rotated(plain_q, *with_other_pairs((cosines, sines), rotation)).to(q.dtype))
    return rotated(plain_q, *rotation).to(q.dtype).contiguous()


def normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = widened(x)
    if weight is None:
        return x
    return x / (x.square().mean((2, 3), keepdim=True) + eps).sqrt() * weight.to(x.dtype).view(x.shape[2:])


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    out = x.clone()
    c, s = cosines[:, :, None].to(x.dtype), sines[:, :, None].to(x.dtype)
    out[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
    out[..., 1::2] = x[..., 0::2] * s + x[..., 1::2] * c
    return out
