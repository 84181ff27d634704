"""Attention over selected blocks, as torch sees it: schema, fake and autograd.

The contracts are in memflow_ops/ops/attention.py, whose functions have checked every argument before an operator here
is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memflow_ops.impl import dense
from memflow_ops.impl.precision import as_given
from memflow_ops.impl.torch import merge
from memflow_ops.ops.registration.dispatch import empty_indices, empty_state, implementation_of


@torch.library.custom_op("memflow_ops::attend_selected", mutates_args=())
def attend_selected(
    q: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    indices: Tensor,
    memory_slots: Tensor | None,
    resume_out: Tensor | None,
    resume_lse: Tensor | None,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    with as_given(q):
        return implementation_of(impl).attend(
            q, None, None, memory_k, memory_v, indices, block_size=block_size, frame_tokens=frame_tokens,
            query_group=query_group, softmax_scale=softmax_scale, memory_slots=memory_slots,
            resume_out=resume_out, resume_lse=resume_lse,
        )  # fmt: skip


@attend_selected.register_fake
def _(q, *arguments) -> tuple[Tensor, Tensor]:
    return empty_state(q)


@torch.library.custom_op("memflow_ops::memory_attention", mutates_args=())
def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    memory_descriptors: Tensor | None,
    memory_frames: Tensor | None,
    memory_slots: Tensor | None,
    top_k: int,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    impl: str,
    dense_backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, LSE and the selected indices (B, H, G, K), K = 0 without a bank."""
    implementation = implementation_of(impl)
    with as_given(q):
        backend = dense.resolve(dense_backend, impl, q, k, v)
        segments: tuple[Tensor | None, Tensor | None] = (k, v)
        options: dict[str, Any] = dict(
            block_size=block_size, frame_tokens=frame_tokens, query_group=query_group, softmax_scale=softmax_scale,
            memory_slots=memory_slots, resume_out=None, resume_lse=None,
        )  # fmt: skip
        if backend != "own":
            out, lse = dense.attend(backend, q, k, v, softmax_scale)
            segments = (None, None)
            options.update(resume_out=out, resume_lse=lse)
        if memory_k is None:
            indices = empty_indices(q, 0, top_k, query_group)
            if backend == "own":
                out, lse = implementation.attend(q, k, v, None, None, indices, **options)
            return out, lse, indices
        if memory_descriptors is None:
            memory_descriptors = implementation.describe_blocks(memory_k, block_size, frame_tokens)
        inputs: tuple[Any, ...] = (q, *segments, memory_k, memory_v, memory_descriptors)
        options.update(top_k=top_k, memory_frames=memory_frames)
        if impl == "triton":  # which may do both in one launch
            return implementation.select_and_attend(*inputs, **options)
        return select_then_attend(implementation, *inputs, **options)


def select_then_attend(
    implementation: ModuleType,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    memory_k: Tensor,
    memory_v: Tensor,
    descriptors: Tensor,
    *,
    top_k: int,
    memory_frames: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """An implementation's `select_blocks`, then its `attend` over these blocks: out, LSE and indices."""
    blocks = -(-options["frame_tokens"] // options["block_size"])
    selection = (top_k, options["query_group"], memory_frames, options["memory_slots"], blocks)
    indices = implementation.select_blocks(q, descriptors, *selection)
    return (*implementation.attend(q, k, v, memory_k, memory_v, indices, **options), indices)


@memory_attention.register_fake
def _(q, k, v, memory_k, memory_v, memory_descriptors, memory_frames, memory_slots, top_k, block_size, frame_tokens,
      query_group, softmax_scale, impl, dense_backend) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    frames = 0
    if memory_k is not None:
        frames = memory_k.shape[1] // frame_tokens if memory_slots is None else memory_slots.shape[1]
    blocks = frames * -(-frame_tokens // block_size)
    return (*empty_state(q), empty_indices(q, blocks, top_k, query_group))


@torch.library.custom_op("memflow_ops::attend_backward", mutates_args=())
def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    indices: Tensor,
    memory_slots: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: Sequence[bool],
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, memory_k, memory_v, every part under the final out and LSE.

    wanted: of these five; the others come back without elements, and nothing is done for them.
    """
    with as_given(q):
        gradients = implementation_of(impl).attend_backward(
            grad_out, grad_lse, q, k, v, memory_k, memory_v, indices, out, lse, wanted=wanted, block_size=block_size,
            frame_tokens=frame_tokens, query_group=query_group, softmax_scale=softmax_scale, memory_slots=memory_slots,
        )  # fmt: skip
    return tuple(q.new_empty(0) if x is None else x for x in gradients)  # type: ignore[return-value]


@attend_backward.register_fake
def _(grad_out, grad_lse, q, k, v, memory_k, memory_v, indices, memory_slots, out, lse, wanted, *sizes):
    inputs = zip((q, k, v, memory_k, memory_v), wanted, strict=True)
    return tuple(q.new_empty(x.shape if want and x is not None else 0) for x, want in inputs)


def _gradients(grad_out: Tensor | None, grad_lse: Tensor | None, wanted: Sequence[bool], *saved: Any) -> list:
    """attend_backward with None for what is not wanted; `saved` are its arguments from q on, `wanted` left out."""
    tensors, sizes = saved[:9], saved[9:]
    grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
    found = attend_backward(grad_out, grad_lse, *tensors, list(wanted), *sizes)
    return [x if want else None for x, want in zip(found, wanted, strict=True)]


def _setup_attention(ctx, inputs, output) -> None:
    q, k, v, memory_k, memory_v, _, _, memory_slots, _, *sizes, _ = inputs
    out, lse, indices = output
    ctx.save_for_backward(q, k, v, memory_k, memory_v, indices, memory_slots, out, lse)
    ctx.sizes = sizes
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)


def _attention_grad(ctx, grad_out, grad_lse, _):
    gradients = _gradients(grad_out, grad_lse, ctx.needs_input_grad[:5], *ctx.saved_tensors, *ctx.sizes)
    return (*gradients, *(None,) * 10)


memory_attention.register_autograd(_attention_grad, setup_context=_setup_attention)


def _setup_selected(ctx, inputs, output) -> None:
    q, memory_k, memory_v, indices, memory_slots, resume_out, resume_lse, *sizes = inputs
    out, lse = output
    ctx.save_for_backward(q, None, None, memory_k, memory_v, indices, memory_slots, out, lse, resume_out, resume_lse)
    ctx.sizes = sizes
    ctx.set_materialize_grads(False)


def _selected_grad(ctx, grad_out, grad_lse):
    *saved, resume_out, resume_lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    gradients = _gradients(grad_out, grad_lse, (wanted[0], False, False, *wanted[1:3]), *saved, *ctx.sizes)
    of_resumed: Sequence[Tensor | None] = (None, None)
    if any(wanted[5:7]):
        out, lse = saved[-2:]
        of_resumed = merge.resumed_gradients(grad_out, grad_lse, out, lse, resume_out, resume_lse)
    return (gradients[0], *gradients[3:], None, None, *of_resumed, *(None,) * 5)


attend_selected.register_autograd(_selected_grad, setup_context=_setup_selected)


_library = torch.library.Library("memflow_ops", "FRAGMENT")
_library.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)")
# A composite of torch's own operators: its gradient and its fake follow from its parts.
_library.impl("merge_states", merge.merge_states, "CompositeImplicitAutograd")
merge_states = torch.ops.memflow_ops.merge_states
