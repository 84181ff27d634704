"""The operators as torch sees them: schema, fake, autograd, and dispatch by the name of the implementation.

Contracts are in the public functions (attention.py, selection.py, relevance.py), which have checked every argument
before an operator here is called. Implementations are imported on first use.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memflow_ops import dense

_MODULES = {
    "reference": "memflow_ops.reference",
    "torch": "memflow_ops.torch_impl",
    "triton": "memflow_ops.triton_impl",
}


def resolve(impl: str, x: Tensor) -> str:
    """What `auto` stands for: `triton` on CUDA and not in float64, else `torch`."""
    if impl != "auto":
        return impl
    return "triton" if x.device.type == "cuda" and x.dtype != torch.float64 else "torch"


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _implementation(impl: str) -> ModuleType:
    return importlib.import_module(_MODULES[impl])


def _as_given(x: Tensor) -> torch.autocast:
    """Precision is the inputs': autocast would otherwise reach into the implementations' own products."""
    return torch.autocast(x.device.type, enabled=False)


def _state_like(q: Tensor) -> tuple[Tensor, Tensor]:
    """Empty out (B, Lq, H, D) and LSE (B, H, Lq)."""
    batch, queries, heads, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=wide)


def _indices_like(q: Tensor, blocks: int, top_k: int, query_group: int) -> Tensor:
    batch, queries, heads, _ = q.shape
    return q.new_empty((batch, heads, -(-queries // query_group), min(top_k, blocks)), dtype=torch.int32)


@torch.library.custom_op("memflow_ops::describe_blocks", mutates_args=())
def describe_blocks(k: Tensor, block_size: int, frame_tokens: int, impl: str) -> Tensor:
    with _as_given(k):
        return _implementation(impl).describe_blocks(k, block_size, frame_tokens)


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


@torch.library.custom_op("memflow_ops::write_frames", mutates_args=("pool",))
def write_frames(pool: Tensor, places: Tensor, new: Tensor) -> None:
    """Puts frames new (B, F, T, Hkv, D) into a pool (B, P, T, Hkv, D), frame i of story b into place places[b, i].

    places (B, F) int32, different in a story; a frame whose place is not one of the pool's is not written. Never read
    back from a device, so that a CUDA graph of it follows the places.
    """
    if pool.device.type == "cpu":  # where reading them costs nothing, and a frame is one copy
        for story, row in enumerate(places.tolist()):
            for i, place in enumerate(row):
                if 0 <= place < pool.shape[1]:
                    pool[story, place] = new[story, i]
    else:
        _write_frames_on_device(pool, places, new)


def _write_frames_on_device(pool: Tensor, places: Tensor, new: Tensor) -> None:
    stories = torch.arange(len(pool), device=pool.device)
    for i in range(new.shape[1]):
        place = places[:, i].long()
        there = (place >= 0) & (place < pool.shape[1])
        place = place.clamp(0, pool.shape[1] - 1)
        pool[stories, place] = torch.where(there.view(-1, 1, 1, 1), new[:, i], pool[stories, place])


@write_frames.register_fake
def _(pool: Tensor, places: Tensor, new: Tensor) -> None:
    return None


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
    with _as_given(q):
        return _implementation(impl).select_blocks(
            q, descriptors, top_k, query_group, memory_frames, memory_slots, blocks_per_frame
        )


@select_blocks.register_fake
def _(q, descriptors, memory_frames, memory_slots, top_k, query_group, blocks_per_frame, impl) -> Tensor:
    blocks = descriptors.shape[1] if memory_slots is None else memory_slots.shape[1] * blocks_per_frame
    return _indices_like(q, blocks, top_k, query_group)


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
    with _as_given(q):
        return _implementation(impl).attend(
            q, None, None, memory_k, memory_v, indices, block_size=block_size, frame_tokens=frame_tokens,
            query_group=query_group, softmax_scale=softmax_scale, memory_slots=memory_slots,
            resume_out=resume_out, resume_lse=resume_lse,
        )  # fmt: skip


@attend_selected.register_fake
def _(q, *arguments) -> tuple[Tensor, Tensor]:
    return _state_like(q)


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
    implementation = _implementation(impl)
    with _as_given(q):
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
            indices = _indices_like(q, 0, top_k, query_group)
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
    return (*_state_like(q), _indices_like(q, blocks, top_k, query_group))


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
    with _as_given(q):
        gradients = _implementation(impl).attend_backward(
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
        of_resumed = _resumed_gradients(grad_out, grad_lse, out, lse, resume_out, resume_lse)
    return (gradients[0], *gradients[3:], None, None, *of_resumed, *(None,) * 5)


attend_selected.register_autograd(_selected_grad, setup_context=_setup_selected)


def _resumed_gradients(
    grad_out: Tensor | None, grad_lse: Tensor | None, out: Tensor, lse: Tensor, resume_out: Tensor, resume_lse: Tensor
) -> list[Tensor]:
    """Of the state that was continued: one more key, whose score is its LSE and whose value its out."""
    wide = lse.dtype
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    weight = _state_weight(resume_lse, lse)
    slope = (grad_out.to(wide) * (resume_out.to(wide) - out.to(wide))).sum(-1).transpose(1, 2)
    if grad_lse is not None:
        slope = slope + grad_lse
    # what has no weight is ignored, NaN included
    grad_resume_lse = torch.where(weight > 0, weight * slope, 0.0)
    return [(grad_out * weight.transpose(1, 2).unsqueeze(-1)).to(out.dtype), grad_resume_lse]


def _state_weight(lse: Tensor, total: Tensor) -> Tensor:
    """The share exp(lse - total) of a part in the whole; 0 where the whole has no key."""
    return torch.where(total == -torch.inf, 0.0, torch.exp(lse - total))


_library = torch.library.Library("memflow_ops", "FRAGMENT")
_library.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)")
_library.define(
    "frame_relevance(Tensor text_q, Tensor frame_keys, Tensor? text_lengths, Tensor block_weights, "
    "str score, float softmax_scale) -> Tensor"
)


def _merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    # logaddexp has a NaN gradient where both are -inf: a query without keys gets none
    empty = (lse_a == -torch.inf) & (lse_b == -torch.inf)
    lse = torch.logaddexp(lse_a.masked_fill(empty, 0.0), lse_b.masked_fill(empty, 0.0)).masked_fill(empty, -torch.inf)
    wide = lse_a.dtype
    parts = []
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        gone = part == -torch.inf
        weight = torch.exp(part.masked_fill(gone, 0.0) - lse.masked_fill(gone, 0.0)).masked_fill(gone, 0.0)
        weight = weight.transpose(1, 2).unsqueeze(-1)
        parts.append(torch.where(weight > 0, out.to(wide), 0.0) * weight)
    return (parts[0] + parts[1]).to(out_a.dtype), lse


def _frame_relevance(
    text_q: Tensor,
    frame_keys: Tensor,
    text_lengths: Tensor | None,
    block_weights: Tensor,
    score: str,
    softmax_scale: float,
) -> Tensor:
    wide = torch.promote_types(text_q.dtype, torch.float32)
    text_q, frame_keys = text_q.to(wide), frame_keys.to(wide)
    batch, tokens, heads, _ = text_q.shape
    positions = torch.arange(tokens, device=text_q.device)
    if text_lengths is None:
        share = text_q.new_full((batch, tokens), 1.0 / (tokens * heads))
    else:
        lengths = text_lengths.clamp(1, tokens).unsqueeze(1)
        share = (positions < lengths).to(wide) / (lengths * heads)  # padding takes no part
        text_q = torch.where((positions < lengths)[:, :, None, None], text_q, 0.0)
    text_q = text_q.unflatten(2, (frame_keys.shape[3], -1))  # a group of query heads per key head
    with _as_given(text_q):
        if score == "linear":
            # an inner product of means: nothing of size text x history is made
            frame_means = torch.einsum("bfnkd,n->bfkd", frame_keys, block_weights.to(wide))
            text_sum = torch.einsum("btkgd,bt->bkd", text_q, share)
            return torch.einsum("bkd,bfkd->bf", text_sum, frame_means) * softmax_scale
        scores = torch.einsum("btkgd,bfnkd->btkgfn", text_q, frame_keys) * softmax_scale + block_weights.to(wide).log()
        mass = scores.flatten(4).softmax(-1).unflatten(4, frame_keys.shape[1:3]).sum(-1)
        return torch.einsum("btkgf,bt->bf", mass, share)


# composites of torch's own operators: autograd and fakes follow from their parts
_library.impl("merge_states", _merge_states, "CompositeImplicitAutograd")
_library.impl("frame_relevance", _frame_relevance, "CompositeImplicitAutograd")
merge_states = torch.ops.memflow_ops.merge_states
frame_relevance = torch.ops.memflow_ops.frame_relevance
