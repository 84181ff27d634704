"""Writing a chunk's keys and values into a cache straight from their projections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memflow_ops.ops import checks, registration
from memflow_ops.ops.registration import dispatch


class QKNorm(NamedTuple):
    """The RMSNorm of queries and keys, over all heads of a token together, as Wan has it."""

    weight_q: Tensor  # (H * D,)
    weight_k: Tensor  # (Hkv * D,)
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
    impl: str = "auto",
) -> Tensor:
    """Normalise and rotate the queries and keys of whole frames, and put keys and values into a cache: in one pass.

    Norm and rotation are in float32, with a single rounding to the inputs' dtype at the end:
    y = x / sqrt(mean(x^2) + eps) * weight, the mean over all heads of the token; then each pair (y[2i], y[2i + 1]) of a
    head is turned by its angle (RoPE, arXiv 2104.09864). Not differentiable. Writes in place, in one launch (two where
    there are descriptors or means), and waits for nothing.

    Args:
        q, k, v: projections (B, F * T, H, D), (B, F * T, Hkv, D) twice, of F frames of T tokens; any strides with a
            contiguous last dimension, D even.
        rotation: cosines and sines of every token's D / 2 angles, each (1 or B, F * T, 1, D / 2) float32, for positions
            of any size: see `rope_rotation` of the model.
        memory_k, memory_v: (B, P * T, Hkv, D), a pool of P frame places, written.
        places: (B, F) int32, the frame place of each frame, all different in a story. A frame whose place is not one of
            the pool's is not written. Never read back.
        frame_tokens: T.
        norm: weights and epsilon (None: q and k are normalised already).
        descriptors: (B, P * ceil(T / block_size), Hkv, D), written at the frames' places: `describe_blocks` of the keys
            as they are stored. None: not wanted.
        block_size: tokens of a block.
        means: (B, M, n, Hkv, D), M up to F, written: of the first M frames, the means of every `mean_size` tokens' keys
            before rotation, float32 and rounded once, n = ceil(T / mean_size). Retrieval compares them with a prompt.
            None: not wanted.
        mean_size: tokens behind a mean (None: T).
        impl: `auto` (by device), `reference`, `torch` or `triton`.

    Returns:
        The rotated q (B, F * T, H, D), contiguous.

    Raises:
        ValueError, TypeError: an argument is wrong; says what was got and what is expected. Nothing has been written.
        NotImplementedError: a gradient is needed.
    """
    checks.check_query(q)
    pools = {"memory_k": memory_k, "memory_v": memory_v}
    for name, x in {"k": k, "v": v, **pools}.items():
        checks.check_tensor(name, x, "B L Hkv D", like=q)
    batch, tokens, heads, size = q.shape
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
    cosines, sines = (_angles(name, x, q) for name, x in zip(("cosines", "sines"), rotation, strict=True))
    checks.check_shape("sines of rotation", sines, tuple(cosines.shape))
    checks.check_integers("places", places, (batch, frames), q)
    block_size = min(checks.check_positive("block_size", block_size), frame)
    mean_size = frame if mean_size is None else min(checks.check_positive("mean_size", mean_size), frame)
    if descriptors is not None:
        checks.check_tensor("descriptors", descriptors, "B N Hkv D", like=q)
        blocks = memory_k.shape[1] // frame * -(-frame // block_size)
        checks.check_shape("descriptors", descriptors, (batch, blocks, kv_heads, size))
    if means is not None:
        checks.check_tensor("means", means, "B M n Hkv D", like=q)
        if not 1 <= means.shape[1] <= frames:
            raise ValueError(f"means must be of 1 to {frames} frames, got shape {tuple(means.shape)}")
        checks.check_shape("means", means, (batch, means.shape[1], -(-frame // mean_size), kv_heads, size))
    weight_q, weight_k, eps = norm or (None, None, 0.0)
    for name, weight, width in (("weight_q", weight_q, heads * size), ("weight_k", weight_k, kv_heads * size)):
        if weight is not None:
            checks.check_tensor(f"{name} of norm", weight, "width")
            checks.check_shape(f"{name} of norm", weight, (width,))
            checks.check_device(f"{name} of norm", weight, q)
    checks.check_impl(impl)
    if dispatch.needs_grad(q, k, v, weight_q, weight_k):
        raise NotImplementedError(
            "write_projections has no backward: call it under torch.no_grad(), or normalise, rotate and write yourself"
        )
    return registration.write_projections(
        q, k, v, cosines, sines, memory_k, memory_v, places, weight_q, weight_k, descriptors, means, frame, block_size,
        mean_size, float(eps), dispatch.resolve(impl, q),
    )  # fmt: skip


def _angles(name: str, x: object, q: Tensor) -> Tensor:
    """Cosines or sines as (1 or B, L, D / 2), contiguous."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} of rotation must be a float32 tensor, got {got}")
    expected = (q.shape[1], 1, q.shape[3] // 2)
    if x.dim() != 4 or tuple(x.shape[1:]) != expected or x.shape[0] not in (1, q.shape[0]):
        raise ValueError(f"{name} of rotation must have shape (1 or {q.shape[0]}, {expected}), got {tuple(x.shape)}")
    checks.check_device(f"{name} of rotation", x, q)
    return x.flatten(2).contiguous()
