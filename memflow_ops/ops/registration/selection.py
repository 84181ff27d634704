"""Block descriptors and the selection of blocks, as torch sees them: schema, fake and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.impl.precision import as_given
from memflow_ops.ops.registration.dispatch import empty_indices, implementation_of


@torch.library.custom_op("memflow_ops::describe_blocks", mutates_args=())
def describe_blocks(k: Tensor, block_size: int, frame_tokens: int, impl: str) -> Tensor:
    with as_given(k):
        return implementation_of(impl).describe_blocks(k, block_size, frame_tokens)


@describe_blocks.register_fake
def _(k: Tensor, block_size: int, frame_tokens: int, impl: str) -> Tensor:
    batch, tokens, heads, size = k.shape
    return k.new_empty((batch, tokens // frame_tokens * -(-frame_tokens // block_size), heads, size))


@torch.library.custom_op("memflow_ops::describe_blocks_backward", mutates_args=())
def describe_blocks_backward(grad: Tensor, block_size: int, frame_tokens: int) -> Tensor:
    """The gradient (B, Lm, Hkv, D) of the mean: every key gets its block's share."""
    blocks = -(-frame_tokens // block_size)
    lengths = torch.full((blocks,), block_size, device=grad.device)
    lengths[-1] = frame_tokens - (blocks - 1) * block_size
    shares = grad.unflatten(1, (-1, blocks)) / lengths.view(-1, 1, 1)
    return shares.repeat_interleave(block_size, 2)[:, :, :frame_tokens].flatten(1, 2).to(grad.dtype)


@describe_blocks_backward.register_fake
def _(grad: Tensor, block_size: int, frame_tokens: int) -> Tensor:
    batch, n, heads, size = grad.shape
    return grad.new_empty((batch, n // -(-frame_tokens // block_size) * frame_tokens, heads, size))


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
    with as_given(q):
        return implementation_of(impl).select_blocks(
            q, descriptors, top_k, query_group, memory_frames, memory_slots, blocks_per_frame
        )


@select_blocks.register_fake
def _(q, descriptors, memory_frames, memory_slots, top_k, query_group, blocks_per_frame, impl) -> Tensor:
    blocks = descriptors.shape[1] if memory_slots is None else memory_slots.shape[1] * blocks_per_frame
    return empty_indices(q, blocks, top_k, query_group)
