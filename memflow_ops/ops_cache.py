"""The operators around the attention as torch sees them, as in ops.py: the cache write and retrieval."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from memflow_ops.ops import _as_given

_MODULES = {
    "reference": "memflow_ops.reference_cache",
    "torch": "memflow_ops.torch_cache",
    "triton": "memflow_ops.triton_impl",
}


def _implementation(impl: str) -> ModuleType:
    return importlib.import_module(_MODULES[impl])


@torch.library.custom_op(
    "memflow_ops::write_projections", mutates_args=("memory_k", "memory_v", "descriptors", "means")
)
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
    frame_tokens: int,
    block_size: int,
    mean_size: int,
    eps: float,
    impl: str,
) -> Tensor:
    with _as_given(q):
        return _implementation(impl).write_projections(
            q, k, v, cosines, sines, memory_k, memory_v, places, weight_q, weight_k, descriptors, means,
            frame_tokens=frame_tokens, block_size=block_size, mean_size=mean_size, eps=eps,
        )  # fmt: skip


@write_projections.register_fake
def _(q, *arguments) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("memflow_ops::retrieve_frames", mutates_args=())
def retrieve_frames(
    text_keys: Tensor,
    means: Tensor,
    rows: Tensor | None,
    text_lengths: Tensor | None,
    weights: Tensor,
    count: int,
    score: str,
    redundancy: float | None,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with _as_given(text_keys):
        return _implementation(impl).retrieve_frames(
            text_keys, means, rows, text_lengths, weights, count=count, score=score, redundancy=redundancy,
            softmax_scale=softmax_scale,
        )  # fmt: skip


@retrieve_frames.register_fake
def _(text_keys, means, rows, text_lengths, weights, count, *rest) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(text_keys.dtype, means.dtype), torch.float32)
    size = (text_keys.shape[1], count)
    return text_keys.new_empty(size, dtype=torch.int32), text_keys.new_empty(size, dtype=wide)
