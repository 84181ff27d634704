"""Block descriptors and the selection of blocks, as torch sees them: schema, fake and autograd."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry, Score
from memflow_ops.impl import implementation_of
from memflow_ops.impl.precision import without_autocast
from memflow_ops.impl.torch import selection
from memflow_ops.ops.registration.dispatch import empty_indices


@torch.library.custom_op("memflow_ops::describe_blocks", mutates_args=())
def describe_blocks(k: Tensor, block_size: int, frame_tokens: int, moments: int, impl: str) -> Tensor:
    with without_autocast(k):
        return implementation_of(impl, k.device).describe_blocks(k, block_size, frame_tokens, moments)


@describe_blocks.register_fake
def _(k: Tensor, block_size: int, frame_tokens: int, moments: int, impl: str) -> Tensor:
    batch, tokens, heads, size = k.shape
    return k.new_empty((batch, tokens // frame_tokens * -(-frame_tokens // block_size), heads, moments * size))


@torch.library.custom_op("memflow_ops::describe_blocks_backward", mutates_args=())
def describe_blocks_backward(grad: Tensor, k: Tensor | None, block_size: int, frame_tokens: int) -> Tensor:
    with without_autocast(grad):
        return selection.describe_blocks_backward(grad, k, block_size, frame_tokens)


@describe_blocks_backward.register_fake
def _(grad: Tensor, k: Tensor | None, block_size: int, frame_tokens: int) -> Tensor:
    batch, blocks, heads, size = grad.shape
    size = size if k is None else k.shape[-1]
    return grad.new_empty((batch, blocks // -(-frame_tokens // block_size) * frame_tokens, heads, size))


def _setup_describe(ctx, inputs, output) -> None:
    k, *ctx.sizes, moments, _ = inputs
    ctx.save_for_backward(k if moments == 2 else None)


def _describe_grad(ctx, grad):
    return describe_blocks_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None, None


describe_blocks.register_autograd(_describe_grad, setup_context=_setup_describe)


@torch.library.custom_op("memflow_ops::select_blocks", mutates_args=())
def select_blocks(
    q: Tensor,
    descriptors: Tensor,
    memory_frames: Tensor | None,
    memory_slots: Tensor | None,
    top_k: int,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    score: str,
    impl: str,
) -> Tensor:
    sizes = (block_size, frame_tokens, query_group, softmax_scale)
    geometry = Geometry(*sizes, memory_slots, memory_frames, score=cast(Score, score))
    with without_autocast(q):
        return implementation_of(impl, q.device).select_blocks(q, descriptors, top_k, geometry)


@select_blocks.register_fake
def _(q, descriptors, memory_frames, memory_slots, top_k, block_size, frame_tokens, query_group, *rest) -> Tensor:
    geometry = Geometry(block_size, frame_tokens, query_group, 1.0, memory_slots)
    blocks = geometry.bank_blocks(descriptors.shape[1] // geometry.blocks_per_frame)
    return empty_indices(q, geometry.query_groups(q.shape[1]), min(top_k, blocks))
