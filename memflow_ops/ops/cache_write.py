"""Writing keys and values into a cache straight from their projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memflow_ops.geometry import SCORES
from memflow_ops.impl.precision import as_autocast_does
from memflow_ops.impl.torch import int8
from memflow_ops.ops import checks, registration
from memflow_ops.ops.registration import dispatch
from memflow_ops.ops.transforms import refuse_transforms


class QKNorm(NamedTuple):
    """The RMSNorm of queries and keys over all heads of a token together, as in Wan."""

    weight_q: Tensor
    """(H * D,)"""
    weight_k: Tensor
    """(Hkv * D,)"""
    eps: float


def write_projections(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    memory_k: Tensor,
    memory_v: Tensor,
    places: Tensor,
    *,
    frame_tokens: int,
    norm: QKNorm | None = None,
    descriptors: Tensor | None = None,
    block_size: int = 64,
    means: Tensor | None = None,
    mean_size: int | None = None,
    memory_rotation: tuple[Tensor, Tensor] | None = None,
    memory_q: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Normalise and rotate the queries and keys of whole frames, and write keys and values into a cache, in one pass.

    For every token, y = x / sqrt(mean(x^2) + eps) * weight, where the mean is over all heads of the token. Then each
    pair (y[2i], y[2i + 1]) of a head is turned by the pair's angle (RoPE, arXiv 2104.09864). All this is in float32
    (float64 for float64 inputs) and rounded once at the end. The function writes in place, in one launch, or two with
    descriptors or means, and the host waits for nothing. Not differentiable. Under autocast, projections are cast to
    the dtype of the cache.

    Args:
        q, k, v: projections of F frames of T tokens: q (B, F * T, H, D), k and v (B, F * T, Hkv, D). D is even. The
            last dimension is contiguous; the other strides are free.
        rotation: the cosines and the sines of the D / 2 angles of every token, two float32 tensors
            (1 or B, F * T, 1, D / 2); see `memflow_ops.rotary.rope_rotation`.
        memory_k, memory_v: (B, P * T, Hkv, D), a pool of P frame places, which is written.
        places: the frame place of each frame, (B, F) int32, all different in a batch element. A frame whose place is
            not one of the pool's is not written. The host never reads it.
        frame_tokens: T.
        norm: weights and epsilon. None: q and k are normalised already.
        descriptors: (B, P * ceil(T / block_size), Hkv, D), which is written at the frames' places with what
            `describe_blocks` gives for the keys as they are stored; with a width of 2 D, what it gives with
            `moments=2`. None: no descriptors are wanted.
        block_size: tokens per block.
        means: (B, M, n, Hkv, D), which is written for the first M of the F frames: the means of every `mean_size`
            tokens' keys before rotation, n = ceil(T / mean_size), computed in float32 and rounded once. Retrieval
            compares them with a prompt. None: no means are wanted.
        mean_size: tokens per mean. None: T.
        memory_rotation: like rotation, for a second form of the queries; see `memory_q` of `memory_attention`. It may
            have the angles of the leading pairs alone; the others are then turned as by rotation.
        memory_q: (B, F * T, H, D), which is written with the queries that memory_rotation has turned in place of
            rotation. Both are given, or neither.
        impl: `reference`, `torch`, `triton` or `auto`, as in `memory_attention`.

    Returns:
        The rotated q (B, F * T, H, D), contiguous.

    Raises:
        ValueError, TypeError: an argument is wrong. The message says what was given and what is expected. Nothing has
            been written then.
        NotImplementedError: a gradient is needed, or an input has a tangent for a derivative in forward mode.
    """
    weight_q, weight_k, eps = norm or (None, None, 0.0)
    refuse_transforms("write_projections", q, k, v, weight_q, weight_k, memory_k, memory_v, memory_q)
    q, k, v = as_autocast_does(q, k, v, to=getattr(memory_k, "dtype", None))
    checks.check_query(q)
    pools = {"memory_k": memory_k, "memory_v": memory_v}
    for name, x in {"k": k, "v": v, **pools}.items():
        checks.check_tensor(name, x, "B L Hkv D", like=q)
    batch, tokens, _, size = q.shape
    frame = checks.check_positive("frame_tokens", frame_tokens)
    if tokens % frame or size % 2:
        raise ValueError(f"q must hold whole frames of {frame} tokens and an even head size, got {tuple(q.shape)}")
    frames, kv_heads = tokens // frame, k.shape[2]
    for name, x in {"k": k, "v": v}.items():
        checks.check_shape(name, x, (batch, tokens, kv_heads, size))
    if kv_heads == 0 or memory_k.shape[1] % frame:
        raise ValueError(
            f"memory_k must hold whole frames of {frame} tokens and k a head at least, got {memory_k.shape[1]} tokens "
            f"and {kv_heads} heads"
        )
    for name, x in pools.items():
        checks.check_shape(name, x, (batch, memory_k.shape[1], kv_heads, size))
    cosines, sines = _angles("rotation", rotation, q, (size // 2,))
    if (memory_rotation is None) != (memory_q is None):
        raise ValueError("memory_rotation and memory_q must be given together")
    second: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if memory_rotation is not None and memory_q is not None:
        checks.check_tensor("memory_q", memory_q, "B L H D", like=q)
        checks.check_shape("memory_q", memory_q, tuple(q.shape))
        second = (*_angles("memory_rotation", memory_rotation, q, range(1, size // 2 + 1)), memory_q)
    checks.check_integers("places", places, (batch, frames), q)
    block_size = min(checks.check_positive("block_size", block_size), frame)
    mean_size = frame if mean_size is None else min(checks.check_positive("mean_size", mean_size), frame)
    if descriptors is not None:
        checks.check_descriptors("descriptors", descriptors, memory_k, frame, block_size, SCORES, q)
    if means is not None:
        checks.check_tensor("means", means, "B M n Hkv D", like=q)
        if not 1 <= means.shape[1] <= frames:
            raise ValueError(f"means must be of 1 to {frames} frames, got shape {tuple(means.shape)}")
        checks.check_shape("means", means, (batch, means.shape[1], -(-frame // mean_size), kv_heads, size))
    _check_weight("weight_q", weight_q, q)
    _check_weight("weight_k", weight_k, k)
    checks.check_impl(impl)
    if dispatch.needs_grad(q, k, v, weight_q, weight_k):
        raise NotImplementedError(
            "write_projections has no backward: call it under torch.no_grad(), or normalise, rotate and write yourself"
        )
    written = (memory_k, memory_v, places, weight_q, weight_k, descriptors, means)
    sizes = (frame, block_size, mean_size, float(eps))
    return registration.write_projections(q, k, v, cosines, sines, *second, *written, *sizes, dispatch.resolve(impl, q))


class Int8Memory(NamedTuple):
    """Keys and values of whole frames as int8, in about half the memory of a half precision."""

    memory_k: Tensor
    """(B, Lm, Hkv, D) int8: the keys less the mean of their block, in units of `memory_k_scale`."""
    memory_v: Tensor
    """(B, Lm, Hkv, D) int8: the values, in units of `memory_v_scale`."""
    memory_k_scale: Tensor
    """(B, N, Hkv, D) in the dtype of the keys: of every channel of a block."""
    memory_v_scale: Tensor
    """(B, Lm, Hkv) in the dtype of the values: of every value."""


def quantise_memory(
    k: Tensor, v: Tensor, descriptors: Tensor, *, block_size: int = 64, frame_tokens: int | None = None
) -> Int8Memory:
    """The keys and values of whole frames as int8, for the bank of `memory_attention`.

    What the keys of a block have in common is in its descriptor already, so only what they differ by is stored, with a
    scale for every channel of the block: an error is at most 1/254 of the largest difference there. Of a value it is at
    most 1/254 of its largest number. The descriptors are those of the exact keys and stay as they are, so that an int8
    bank is selected from as an exact one is.

    A key that is not finite makes its channel of its block NaN, a value that is not finite all of itself. Not
    differentiable: the result carries no gradient.

    Args:
        k, v: (B, Lm, Hkv, D), whole frames of `frame_tokens`.
        descriptors: what `describe_blocks(k, block_size, frame_tokens)` gives, with one moment or with two.
        block_size: tokens per block.
        frame_tokens: tokens per frame. None: the memory is one frame.

    Returns:
        An `Int8Memory`, whose fields are the arguments of `memory_attention` of these names. With the descriptors they
        take 2 D + bytes per token and head, and 2 D * bytes per block and head, where bytes is the size of a number.

    Raises:
        ValueError, TypeError: an argument is wrong. The message says what was given and what is expected.
    """
    checks.check_tensor("k", k, "B L Hkv D")
    checks.check_tensor("v", v, "B L Hkv D", like=k)
    checks.check_shape("v", v, tuple(k.shape))
    frame = checks.frame_size(frame_tokens, k.shape[1], "k")
    block_size = min(checks.check_positive("block_size", block_size), frame)
    checks.check_descriptors("descriptors", descriptors, k, frame, block_size, SCORES, k)
    with torch.no_grad():
        return Int8Memory(*int8.quantise_memory(k, v, descriptors, block_size, frame))


def _check_weight(name: str, weight: Tensor | None, x: Tensor) -> None:
    """The weight of the norm of x (B, L, H, D) is (H * D,), or None."""
    if weight is not None:
        checks.check_tensor(f"{name} of norm", weight, "width")
        checks.check_shape(f"{name} of norm", weight, (x.shape[2] * x.shape[3],))
        checks.check_device(f"{name} of norm", weight, x)


def _angles(name: str, rotation: tuple[Tensor, Tensor], q: Tensor, pairs: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines (1 or B, L, 1, P) of P pairs, one of `pairs`; checked, as (1 or B, L, P), contiguous."""
    parts = zip(("cosines", "sines"), rotation, strict=True)
    cosines, sines = (_angle(f"{part} of {name}", x, q, pairs) for part, x in parts)
    checks.check_shape(f"sines of {name}", sines, tuple(cosines.shape))
    return cosines, sines


def _angle(name: str, x: object, q: Tensor, pairs: Sequence[int]) -> Tensor:
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a float32 tensor, got {got}")
    expected = (q.shape[1], 1)
    shape = tuple(x.shape)
    if x.dim() != 4 or shape[1:3] != expected or shape[3] not in pairs or shape[0] not in (1, q.shape[0]):
        most = f"{pairs[0]} to {pairs[-1]}" if len(pairs) > 1 else f"{pairs[0]}"
        raise ValueError(f"{name} must have shape (1 or {q.shape[0]}, {q.shape[1]}, 1, {most}), got {shape}")
    checks.check_device(name, x, q)
    return x.flatten(2).contiguous()
