"""Block descriptors and the selection of blocks, as torch sees them: schema, fake and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl import implementation_of
from memflow_ops.impl.precision import without_autocast
from memflow_ops.impl.torch import selection
from memflow_ops.ops.registration.dispatch import empty_indices


@torch.library.custom_op("memflow_ops::describe_blocks", mutates_args=())
def describe_blocks(k: Tensor, block_size: int, frame_tokens: int, impl: str) -> Tensor:
    with without_autocast(k):
        return implementation_of(impl, k.device).describe_blocks(k, block_size, frame_tokens)


@describe_blocks.register_fake
def _(k: Tensor, block_size: int, frame_tokens: int, impl: str) -> Tensor:
    batch, tokens, heads, size = k.shape
    return k.new_empty((batch, tokens // frame_tokens * -(-frame_tokens // block_size), heads, size))


@torch.library.custom_op("memflow_ops::describe_blocks_backward", mutates_args=())
def describe_blocks_backward(grad: Tensor, block_size: int, frame_tokens: int) -> Tensor:
    return selection.describe_blocks_backward(grad, block_size, frame_tokens)


@describe_blocks_backward.register_fake
def _(grad: Tensor, block_size: int, frame_tokens: int) -> Tensor:
    batch, blocks, heads, size = grad.shape
    return grad.new_empty((batch, blocks // -(-frame_tokens // block_size) * frame_tokens, heads, size))


def _setup_describe(ctx, inputs, output) -> None:
    ctx.sizes = inputs[1:3]


def _describe_grad(ctx, grad):
    return describe_blocks_backward(grad, *ctx.sizes), None, None, None


describe_blocks.register_autograd(_describe_grad, setup_context=_setup_describe)


@torch.library.custom_op("memflow_ops::select_blocks", mutates_args=())
def select_blocks(
    q: Tensor,
    descriptors: Tensor,
    memory_frames: Tensor | None,
    memory_slots: Tensor | None,
    top_k: int,
    query_group: int,
    blocks_per_frame: int,
    impl: str,
) -> Tensor:
    geometry = _selection_geometry(memory_frames, memory_slots, query_group, blocks_per_frame)
    with without_autocast(q):
        return implementation_of(impl, q.device).select_blocks(q, descriptors, top_k, geometry)


@select_blocks.register_fake
def _(q, descriptors, memory_frames, memory_slots, top_k, query_group, blocks_per_frame, impl) -> Tensor:
    geometry = _selection_geometry(memory_frames, memory_slots, query_group, blocks_per_frame)
    blocks = geometry.bank_blocks(descriptors.shape[1] // blocks_per_frame)
    return empty_indices(q, geometry.query_groups(q.shape[1]), min(top_k, blocks))


def _selection_geometry(
    memory_frames: Tensor | None, memory_slots: Tensor | None, query_group: int, blocks_per_frame: int
) -> Geometry:
    """Selection does not depend on the tokens of a block, so a block counts as one token here."""
    return Geometry(1, blocks_per_frame, query_group, 1.0, memory_slots, memory_frames)
