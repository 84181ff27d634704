"""Cases of retrieval that the tests of all implementations share."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import memflow_ops


def make_case(
    *,
    layers: int = 2,
    batch: int = 2,
    words: int = 5,
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 8,
    stored: int = 9,
    parts: int = 1,
    candidates: int | None = None,
    whole_numbers: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of retrieve_frames, in float64. candidates: so many of the stored frames, in any order (None: all)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        if whole_numbers:
            return torch.randint(-2, 3, shape, generator=generator).double()
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    taken = [torch.randperm(stored, generator=generator)[:candidates] for _ in range(batch)]
    return {
        "text_keys": random(layers, batch, words, heads[0], head_dim),
        "means": random(layers, batch, stored, parts, heads[1], head_dim),
        "candidates": None if candidates is None else torch.stack(taken).int(),
        "text_lengths": torch.randint(1, words + 1, (batch,), generator=generator).int(),
        "block_lengths": list(range(parts, 0, -1)),
    }


@st.composite
def retrieve_cases(draw) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a case, and the options of retrieve_frames."""
    score = draw(st.sampled_from(["linear", "softmax", "coverage"]))
    stored = draw(st.integers(1, 70))
    case = make_case(
        layers=draw(st.integers(1, 3)),
        batch=draw(st.integers(1, 2)),
        words=draw(st.sampled_from([1, 7, 33])),
        heads=draw(st.sampled_from([(1, 1), (3, 3), (4, 2)])),
        head_dim=draw(st.sampled_from([3, 16, 40])),
        stored=stored,
        parts=draw(st.sampled_from([1, 1, 3, 5])),
        candidates=draw(st.sampled_from([None, stored, (stored + 1) // 2])),
        seed=draw(st.integers(0, 99)),
    )
    if draw(st.booleans()):
        case["text_lengths"] = None
    redundancy = None if score == "coverage" else draw(st.sampled_from([None, 0.1, 0.0]))
    return case, {"count": draw(st.integers(1, 5)), "score": score, "redundancy": redundancy}


def rounded(case: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if name in ("text_keys", "means") else x for name, x in case.items()}


def assert_retrieves(case: dict[str, Any], options: dict[str, Any], dtype: torch.dtype, impl: str) -> None:
    """In `dtype` an implementation gives the frames and scores of the reference in float64, from equal numbers."""
    low = rounded(case, dtype)
    expected = memflow_ops.retrieve_frames(**rounded(low, torch.float64), **options, impl="reference")
    indices, scores = memflow_ops.retrieve_frames(**low, **options, impl=impl)
    assert indices.dtype == torch.int32 and scores.dtype == torch.promote_types(dtype, torch.float32)
    message = f"{impl} {dtype} {options} {[tuple(low[n].shape) for n in ('text_keys', 'means')]}"
    assert torch.equal(indices, expected[0]), f"{message}: {indices.tolist()} instead of {expected[0].tolist()}"
    limit = 1e-5 * (1 + expected[1].abs().max())
    assert (scores.double() - expected[1]).abs().max() <= limit, message
