"""Seeded inputs for benchmarks: tokens whose neighbours agree, as in a video, and unrelated ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Tokens from one knot of the random curves to the next, within which neighbours agree.
_KNOT_TOKENS = 64
# Directions that the curves move in. Real keys have few.
_DIRECTIONS = 12
# The curve's share of the variance. The rest is noise of each token.
_SHARED = 0.7


def random_tokens(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int, device: str = "cpu"
) -> Tensor:
    """Independent normal values (B, L, H, D). Each type of device has its own values for a seed."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(batch, tokens, heads, head_dim, generator=generator, device=device).to(dtype)


def correlated_tokens(
    batch: int, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int, device: str = "cpu"
) -> Tensor:
    """Unit-variance values (B, L, H, D) that follow a smooth random curve in few directions, plus noise.

    The directions of a head are the same for every seed, so that queries and keys of different seeds have much in
    common, and neighbouring queries prefer the same keys.
    """
    shared = torch.Generator().manual_seed(0)
    basis = (torch.randn(heads, _DIRECTIONS, head_dim, generator=shared) / _DIRECTIONS**0.5).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    size = (batch, heads * _DIRECTIONS, -(-tokens // _KNOT_TOKENS) + 1)
    knots = torch.randn(size, generator=generator, device=device)
    curve = functional.interpolate(knots, size=tokens, mode="linear", align_corners=True)
    smooth = torch.einsum("bhrl,hrd->blhd", curve.unflatten(1, (heads, -1)), basis)
    noise = torch.randn(smooth.shape, generator=generator, device=device)
    return (_SHARED**0.5 * smooth / smooth.std() + (1 - _SHARED) ** 0.5 * noise).to(dtype)
