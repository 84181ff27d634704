"""Norm, rotation and the write into the cache, which every pass of a stream does, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops import QKNorm, write_projections
from memflow_ops.bench import inputs
from memflow_ops.bench.harness.case import OURS, Contender
from memflow_ops.bench.harness.correctness import check_means, check_rounded, exact_projection
from memflow_ops.bench.sizes import Size
from memflow_ops.rotary import rope_rotation

_EPS = 1e-6


def write(size: Size, dtype: torch.dtype, device: torch.device, seed: int, clean: bool) -> dict[str, Contender]:
    """One layer of a pass: the chunk's queries and keys normalised and rotated, keys and values written into a pool
    that lies as the frame cache's. clean: of the last pass, which takes the descriptors of every frame and the mean of
    the first too. Against torch's rms_norm, rotation by even and odd channels, and copies."""
    tokens, frames, pool_frames = size.frame_tokens, size.chunk_frames, size.window_frames + size.chunk_frames
    q, k, v = (
        inputs.correlated_tokens(1, size.queries, size.heads, size.head_dim, dtype, seed + n, str(device)).contiguous()
        for n in range(3)
    )
    generator = torch.Generator(device).manual_seed(seed)
    weight_q, weight_k = (
        (1 + torch.randn(size.dim, generator=generator, device=device) / 4).to(dtype) for _ in range(2)
    )
    norm = QKNorm(weight_q, weight_k, _EPS)
    rotation = rope_rotation(
        size.head_dim, torch.arange(90, 90 + frames, device=device),
        *(torch.arange(n // 2, device=device) for n in (size.height, size.width)),
    )  # fmt: skip
    shape = (1, size.heads, pool_frames * tokens, size.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
    descriptors = k.new_empty(1, pool_frames * size.blocks_per_frame, size.heads, size.head_dim)
    means = k.new_empty(1, 1, 1, size.heads, size.head_dim)
    first = pool_frames - frames
    places = torch.arange(first, pool_frames, dtype=torch.int32, device=device)[None]
    written = slice(first * tokens, None)
    described = slice(first * size.blocks_per_frame, None)
    in_block = torch.full((size.blocks_per_frame,), float(size.block_size), device=device)
    in_block[-1] = tokens - (size.blocks_per_frame - 1) * size.block_size

    def ours() -> Tensor:
        return write_projections(
            q, k, v, rotation, keys, values, places, frame_tokens=tokens, norm=norm, block_size=size.block_size,
            descriptors=descriptors if clean else None, means=means if clean else None,
        )  # fmt: skip

    def normalised(x: Tensor, weight: Tensor) -> Tensor:
        """In float32."""
        return F.rms_norm(x.flatten(2).float(), (size.dim,), weight.float(), _EPS).view(x.shape)

    def rotated(x: Tensor) -> Tensor:
        cosines, sines = rotation
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), -1)
        return turned.flatten(-2).to(dtype)

    def plain() -> Tensor:
        upright = normalised(k, weight_k)
        turned = rotated(upright)
        keys[:, written].copy_(turned)
        values[:, written].copy_(v)
        if clean:
            missing = size.blocks_per_frame * size.block_size - tokens
            of_frames = F.pad(turned.unflatten(1, (frames, tokens)), (0, 0, 0, 0, 0, missing))
            blocks = of_frames.unflatten(2, (-1, size.block_size)).sum(3, dtype=torch.float32)
            descriptors[:, described].copy_((blocks / in_block[:, None, None]).flatten(1, 2))
            means.copy_(upright[:, None, :tokens].mean(2, keepdim=True))
        return rotated(normalised(q, weight_q))

    def check(out: Tensor) -> None:
        check_rounded(out, exact_projection(q, rotation, weight_q, _EPS), "queries")
        check_rounded(keys[:, written], exact_projection(k, rotation, weight_k, _EPS), "keys in the pool")
        assert torch.equal(values[:, written], v), "the pool does not hold the chunk's values"
        if clean:
            check_means(descriptors[0, described], keys[0, written], size.block_size, tokens, "descriptors")
            upright = exact_projection(k, (torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])), weight_k, _EPS)
            check_means(means[0, 0], upright[0, :tokens], tokens, tokens, "mean of the first frame")
        before = (keys[:, : written.start], values[:, : written.start], descriptors[:, : described.start])
        for x in before if clean else (*before[:2], descriptors, means):
            assert x.isnan().all(), "something else was written"

    def contender(way: Callable[[], Tensor]) -> Contender:
        def poisoned() -> None:
            for x in (keys, values, descriptors, means):
                x.fill_(torch.nan)
            check(way())

        return Contender(way, poisoned, bytes=moved)

    more = frames * size.blocks_per_frame + 1 if clean else 0
    moved = (6 * size.queries + more) * size.dim * dtype.itemsize
    return {OURS: contender(ours), "torch": contender(plain)}
