"""Retrieval: the relevance of every remembered frame to a prompt, and the choice of the bank for all layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memflow_ops import frame_relevance, retrieve_frames
from memflow_ops.bench import inputs
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.bench.sizes import Size

_WORDS = 512


def relevance(size: Size, dtype: torch.dtype, device: torch.device, seed: int, history: int) -> Built:
    """Every remembered frame against a prompt of 512 tokens; against scoring every token and then averaging."""
    text = inputs.random_tokens(1, _WORDS, size.heads, size.head_dim, dtype, seed, str(device))
    frames = inputs.random_tokens(1, history, size.heads, size.head_dim, dtype, seed + 1, str(device)).unsqueeze(2)

    def scored() -> Tensor:
        return frame_relevance(text, frames, softmax_scale=1.0)

    def plain() -> Tensor:
        return torch.einsum("bthd,bfhd->bfth", text, frames[:, :, 0]).float().mean((2, 3))

    def check(found: Tensor) -> None:
        exact = torch.einsum("hd,fhd->f", text[0].double().mean(0), frames[0, :, 0].double()) / size.heads
        off = (found[0].double() - exact).abs().max()
        allowed = (1e-5 if dtype == torch.float32 else 1e-2) * exact.abs().max()
        assert off <= allowed, f"off by {off:.2e}, at most {allowed:.2e} is allowed"

    moved = (_WORDS + history) * size.dim * dtype.itemsize
    contenders = {
        OURS: Contender(scored, lambda: check(scored()), flops=(_WORDS + 2 * history) * size.dim, bytes=moved),
        "every word": Contender(plain, lambda: check(plain()), flops=2 * _WORDS * history * size.dim, bytes=moved),
    }
    return Built(contenders)


def retrieve(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    history: int,
    words: int,
    valid_words: int,
    count: int,
) -> Built:
    """A chunk's choice of frames for all layers, from stored frame means to the frames' indices, by every score.

    Against the linear score in plain torch. valid_words: of the prompt, the rest is padding. count: frames taken.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def tokens(*shape: int) -> Tensor:
        whole = (size.layers, 1, *shape, size.heads, size.head_dim)
        return torch.randn(whole, generator=generator, device=device).to(dtype)

    text, means = tokens(words), tokens(history, 1)
    candidates = torch.arange(history, dtype=torch.int32, device=device)[None].flip(1).contiguous()
    lengths = torch.tensor([valid_words], dtype=torch.int32, device=device)
    given: dict[str, Any] = {"candidates": candidates, "text_lengths": lengths}

    def contender(impl: str, **options: Any) -> Contender:
        def call() -> tuple[Tensor, Tensor]:
            return retrieve_frames(
                text, means, count, candidates=candidates, text_lengths=lengths, impl=impl, **options
            )

        def check() -> None:
            exact, exact_scores = retrieve_frames(
                text.double(),
                means.double(),
                count,
                **given,
                impl="reference",
                **options,
            )
            indices, scores = call()
            assert torch.equal(indices, exact), f"frames {indices.tolist()} are taken, expected {exact.tolist()}"
            off, allowed = (scores.double() - exact_scores).abs().max(), 1e-5 * (1 + exact_scores.abs().max())
            assert off <= allowed, f"a score is off by {off:.2e}, at most {allowed:.2e} is allowed"

        moved = (text.numel() + means.numel()) * dtype.itemsize
        return Contender(call, check, bytes=moved, graph=impl == "triton")

    contenders = {
        OURS: contender("triton", score="linear"),
        "linear, plain torch": contender("torch", score="linear"),
        "ours, linear without near copies": contender("triton", score="linear", redundancy=0.95),
        "ours, softmax": contender("triton", score="softmax"),
        "ours, coverage": contender("triton", score="coverage"),
    }
    return Built(contenders)
