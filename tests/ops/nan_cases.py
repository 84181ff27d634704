"""Inputs with a NaN somewhere, and what an implementation must make of them."""

import torch

OPTIONS = dict(top_k=2, block_size=4, frame_tokens=10, query_group=3)
SPOILED = ("q", "k", "v", "memory_k", "memory_v")


def make_inputs(dtype, queries=7, keys=5, size=8):
    sizes = ((queries, 4), (keys, 2), (keys, 2), (20, 2), (20, 2))
    return {name: torch.randn(2, *n, size).to(dtype) for name, n in zip(SPOILED, sizes, strict=True)}


def spoil(tensors, name, value=torch.nan):
    """One channel of one token and head of the second batch element."""
    tensors[name][1, 2, 1, 3] = value


def assert_alike(got, expected):
    """NaN in the same places, and the same numbers elsewhere, in out as in LSE."""
    exact = got[0].dtype in (torch.float32, torch.float64)
    limit = 1e-5 if exact else 4 * torch.finfo(got[0].dtype).eps
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()), f"{int(ours.isnan().sum())}, not {int(theirs.isnan().sum())}"
        torch.testing.assert_close(ours, theirs, equal_nan=True, atol=limit, rtol=limit)
