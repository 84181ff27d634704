"""Attention over selected blocks, as torch sees it: schema, fake and autograd.

Torch's schemas have no records, so an operator takes the fields of `Geometry` one by one. The contracts are in
memflow_ops/ops/attention.py, whose functions have checked every argument before they call an operator of this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry, Int8Bank, Score
from memflow_ops.impl import composed, implementation_of
from memflow_ops.impl.precision import without_autocast
from memflow_ops.impl.torch import merge
from memflow_ops.ops.registration.dispatch import empty_indices, empty_state


@torch.library.custom_op("memflow_ops::attend_selected", mutates_args=())
def attend_selected(
    q: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    indices: Tensor,
    memory_descriptors: Tensor | None,
    memory_k_scale: Tensor | None,
    memory_v_scale: Tensor | None,
    memory_slots: Tensor | None,
    resume_out: Tensor | None,
    resume_lse: Tensor | None,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    int8 = Int8Bank.of(memory_descriptors, memory_k_scale, memory_v_scale)
    geometry = Geometry(block_size, frame_tokens, query_group, softmax_scale, memory_slots, int8=int8)
    resume = None if resume_out is None or resume_lse is None else (resume_out, resume_lse)
    with without_autocast(q):
        return implementation_of(impl, q.device).attend(q, None, None, memory_k, memory_v, indices, geometry, resume)


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
    memory_q: Tensor | None,
    memory_descriptors: Tensor | None,
    memory_k_scale: Tensor | None,
    memory_v_scale: Tensor | None,
    memory_frames: Tensor | None,
    memory_slots: Tensor | None,
    seqused_k: Tensor | None,
    window_slots: Tensor | None,
    top_k: int,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    causal: bool,
    score: str,
    impl: str,
    dense_backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, LSE and the selected indices (B, H, G, K), K = 0 without a bank."""
    sizes = (block_size, frame_tokens, query_group, softmax_scale)
    score_kind = cast(Score, score)
    int8 = Int8Bank.of(memory_descriptors, memory_k_scale, memory_v_scale)
    geometry = Geometry(*sizes, memory_slots, memory_frames, causal, seqused_k, window_slots, score_kind, int8)
    with without_autocast(q):
        return composed.memory_attention(
            q, k, v, memory_k, memory_v, memory_q, memory_descriptors, top_k, geometry, impl, dense_backend
        )


@memory_attention.register_fake
def _(q, k, v, memory_k, *rest) -> tuple[Tensor, Tensor, Tensor]:
    memory_slots, _, _, top_k, block_size, frame_tokens, query_group = rest[6:13]
    geometry = Geometry(block_size, frame_tokens, query_group, 1.0, memory_slots)
    blocks = 0 if memory_k is None else geometry.bank_blocks(geometry.stored_frames(memory_k))
    return (*empty_state(q), empty_indices(q, geometry.query_groups(q.shape[1]), min(top_k, blocks)))


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
    seqused_k: Tensor | None,
    window_slots: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wanted: Sequence[bool],
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    causal: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, memory_k and memory_v, every part under the final out and LSE.

    wanted: which of the five to make; the others come back without elements, and nothing is done for them.
    """
    sizes = (block_size, frame_tokens, query_group, softmax_scale)
    geometry = Geometry(*sizes, memory_slots, None, causal, seqused_k, window_slots)
    inputs = (q, k, v, memory_k, memory_v)
    with without_autocast(q):
        gradients = implementation_of(impl, q.device).attend_backward(
            grad_out, grad_lse, *inputs, indices, out, lse, geometry, wanted
        )
    return tuple(q.new_empty(0) if x is None else x for x in gradients)  # type: ignore[return-value]


@attend_backward.register_fake
def _(grad_out, grad_lse, q, k, v, memory_k, memory_v, indices, slots, used, window, out, lse, wanted, *sizes):
    inputs = zip((q, k, v, memory_k, memory_v), wanted, strict=True)
    return tuple(q.new_empty(x.shape if want and x is not None else 0) for x, want in inputs)


def _gradients(grad_out: Tensor | None, grad_lse: Tensor | None, wanted: Sequence[bool], *saved: Any) -> list:
    """The gradients of `attend_backward`, None where not wanted. saved: its arguments from q on, without `wanted`."""
    tensors, sizes = saved[:11], saved[11:]
    grad_out = torch.zeros_like(saved[0]) if grad_out is None else grad_out
    found = attend_backward(grad_out, grad_lse, *tensors, list(wanted), *sizes)
    return [x if want else None for x, want in zip(found, wanted, strict=True)]


def _setup_attention(ctx, inputs, output) -> None:
    q, k, v, memory_k, memory_v, memory_q, *_ = inputs
    *tables, _, block_size, frame, group, scale, causal, _, impl, _ = inputs[10:]
    out, lse, indices = output
    ctx.save_for_backward(memory_q, q, k, v, memory_k, memory_v, indices, *tables, out, lse)
    ctx.sizes = (block_size, frame, group, scale, causal, impl)
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)


def _attention_grad(ctx, grad_out, grad_lse, _):
    memory_q, *saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:6]
    if memory_q is None:
        gradients = [*_gradients(grad_out, grad_lse, wanted[:5], *saved, *ctx.sizes), None]
    else:
        # Under the final out and LSE window and bank have nothing to do with each other.
        q, k, v, memory_k, memory_v, *rest = saved
        of_window = (*wanted[:3], False, False)
        of_bank = (wanted[5], False, False, *wanted[3:5])
        gradients = [None] * 6
        if any(of_window):
            found = _gradients(grad_out, grad_lse, of_window, q, k, v, None, None, *rest, *ctx.sizes)
            gradients[:3] = found[:3]
        if any(of_bank):
            bank = (memory_q, None, None, memory_k, memory_v)
            gradients[5], _, _, *gradients[3:5] = _gradients(grad_out, grad_lse, of_bank, *bank, *rest, *ctx.sizes)
    return (*gradients, *(None,) * 16)


memory_attention.register_autograd(_attention_grad, setup_context=_setup_attention)


def _setup_selected(ctx, inputs, output) -> None:
    q, memory_k, memory_v, indices = inputs[:4]
    memory_slots, resume_out, resume_lse, *sizes, impl = inputs[7:]
    out, lse = output
    bank = (memory_k, memory_v, indices, memory_slots)
    ctx.save_for_backward(q, None, None, *bank, None, None, out, lse, resume_out, resume_lse)
    ctx.sizes = (*sizes, False, impl)
    ctx.set_materialize_grads(False)


def _selected_grad(ctx, grad_out, grad_lse):
    *saved, resume_out, resume_lse = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    gradients = _gradients(grad_out, grad_lse, (wanted[0], False, False, *wanted[1:3]), *saved, *ctx.sizes)
    of_resumed: Sequence[Tensor | None] = (None, None)
    if any(wanted[8:10]):
        out, lse = saved[-2:]
        of_resumed = merge.resumed_gradients(grad_out, grad_lse, out, lse, resume_out, resume_lse)
    return (gradients[0], *gradients[3:], *(None,) * 5, *of_resumed, *(None,) * 5)


attend_selected.register_autograd(_selected_grad, setup_context=_setup_selected)


_library = torch.library.Library("memflow_ops", "FRAGMENT")
_library.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)")
# This is a composite of torch's own operators: its gradient and its fake follow from its parts.
_library.impl("merge_states", merge.merge_states, "CompositeImplicitAutograd")
merge_states = torch.ops.memflow_ops.merge_states
