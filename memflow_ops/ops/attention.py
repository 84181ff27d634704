"""Attention over a dense local window and the most relevant blocks of a memory bank."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.ops import checks, registration
from memflow_ops.ops.checks import check_slots
from memflow_ops.ops.registration import dispatch


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    *,
    memory_descriptors: Tensor | None = None,
    top_k: int = 24,
    block_size: int = 64,
    frame_tokens: int | None = None,
    query_group: int | None = 128,
    memory_frames: Tensor | None = None,
    memory_slots: Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    dense_backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to every key of `k` and to the `top_k` most relevant blocks of the memory bank, under one softmax.

    Drops in where `flash_attn_func(q, k, v, softmax_scale=...)` is called without dropout, causal mask or window.
    Selection is that of `select_blocks`; what is not selected is not read, so its values (NaN included) do not
    matter. Differentiable in q, k, v, memory_k, memory_v, once; the selection is not.

    Args:
        q: (B, Lq, H, D), float16, bfloat16, float32 or float64.
        k, v: (B, Lk, Hkv, D), always attended to; Lk may be 0, H is a multiple of Hkv.
        memory_k, memory_v: (B, Lm, Hkv, D), whole frames of `frame_tokens` (None or Lm = 0: no bank).
        memory_descriptors: (B, N, Hkv, D), `describe_blocks(memory_k, ...)` (None: computed here).
        top_k: blocks that each query group attends to.
        block_size: tokens per block; the last block of a frame may be shorter.
        frame_tokens: tokens per frame of the bank (None: the bank is one frame).
        query_group: consecutive queries that share a selection (1: each its own; None: all of them).
        memory_frames: (B,) int32, how many leading frames of the bank are valid (None: all). Clamped, never read back.
        memory_slots: (B, F) int32, the slot table, as a paged cache's block table: frame j of the bank is frame
            `memory_slots[b, j]` of memory_k, memory_v and memory_descriptors (None: frame j). Clamped, never read back.
        softmax_scale: factor of the scores (None: 1/sqrt(D)).
        return_lse: also return the LSE.
        impl: `reference` (the specification), `torch`, `triton` (D up to 256, not float64), or `auto`: `triton` on CUDA
            and not in float64, else `torch`.
        dense_backend: what attends to k, v, the implementation's bank part continuing its softmax: `own` (the
            implementation itself, in one launch), `cudnn` or `flash` (torch's, float16 and bfloat16 on CUDA),
            `flash_attn` (that package, 4, 3 or 2), `cpu` (torch's flash attention for CPUs), or `auto`: for `triton`
            the best there is on this device, `own` for float32 and short windows; for the others `own`. Gradients are
            made by the implementation itself in any case, and are equal bit for bit from run to run.

    Returns:
        out (B, Lq, H, D), contiguous, zero where a query has no key; with `return_lse` also the natural-log LSE of
        the scaled scores (B, H, Lq), float32 (float64 for float64 inputs), -inf where a query has no key.

    Raises:
        ValueError, TypeError: an argument is wrong; says what was got and what is expected.
    """
    checks.check_query(q)
    _check_pair("k", k, "v", v, q)
    if (memory_k is None) != (memory_v is None):
        raise ValueError("memory_k and memory_v must be given together")
    top_k = checks.check_positive("top_k", top_k)
    block_size = checks.check_positive("block_size", block_size)
    group = checks.group_size(query_group, q.shape[1])
    scale = checks.scale_of(softmax_scale, q)
    checks.check_impl(impl)
    checks.check_dense_backend(dense_backend)
    if memory_frames is not None:
        checks.check_integers("memory_frames", memory_frames, (q.shape[0],), q)
    frame = 1 if frame_tokens is None else checks.check_positive("frame_tokens", frame_tokens)
    if memory_k is not None and memory_v is not None:
        _check_pair("memory_k", memory_k, "memory_v", memory_v, q)
        if memory_k.shape[2] != k.shape[2]:
            raise ValueError(f"memory_k must have the heads of k, {k.shape[2]}, got {memory_k.shape[2]}")
        frame = checks.frame_size(frame_tokens, memory_k.shape[1], "memory_k")
        block_size = min(block_size, frame)
        frames = memory_k.shape[1] // frame
        if memory_slots is not None:
            check_slots(memory_slots, q, frames)
        if memory_descriptors is not None:
            blocks = frames * -(-frame // block_size)
            checks.check_tensor("memory_descriptors", memory_descriptors, "B N Hkv D", like=q)
            checks.check_shape("memory_descriptors", memory_descriptors, (q.shape[0], blocks, *memory_k.shape[2:]))
        if frames == 0 or (memory_slots is not None and memory_slots.shape[1] == 0):
            memory_k = memory_v = memory_descriptors = memory_slots = None
    else:
        given = {"memory_descriptors": memory_descriptors, "memory_slots": memory_slots, "memory_frames": memory_frames}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is given without memory_k and memory_v")
    if memory_k is None:
        memory_frames = None
    chosen = dispatch.resolve(impl, q)
    out, lse, _ = registration.memory_attention(
        q, k, v, memory_k, memory_v, memory_descriptors, memory_frames, memory_slots,
        top_k, block_size, frame, group, scale, chosen, dense_backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    block_size: int,
    frame_tokens: int | None = None,
    query_group: int | None = 128,
    memory_slots: Tensor | None = None,
    resume: tuple[Tensor, Tensor] | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend to selected blocks of a memory bank, optionally continuing the softmax of another attention.

    Args:
        q: (B, Lq, H, D).
        k, v: the bank (B, Lm, Hkv, D), whole frames of `frame_tokens`; H is a multiple of Hkv.
        indices: (B, H, G, K) int32 of `select_blocks`, G = ceil(Lq / query_group); entries outside the bank (-1) are
            unused. A block listed twice counts twice.
        block_size, frame_tokens, query_group, memory_slots, softmax_scale, impl: as in `memory_attention`.
        resume: `(out, lse)`, (B, Lq, H, D) and natural-log (B, H, Lq), of attention over other keys.

    Returns:
        out (B, Lq, H, D) and LSE (B, H, Lq), over the selected keys and those behind `resume`.

    Raises:
        ValueError, TypeError: an argument is wrong; says what was got and what is expected. So is a `resume` whose out
            needs a gradient and whose LSE carries none (a backend without one): its gradient would be silently wrong.
    """
    checks.check_query(q)
    _check_pair("k", k, "v", v, q)
    block_size = checks.check_positive("block_size", block_size)
    frame = checks.frame_size(frame_tokens, k.shape[1], "k")
    block_size = min(block_size, frame)
    group = checks.group_size(query_group, q.shape[1])
    groups = -(-q.shape[1] // group)
    checks.check_integers("indices", indices, (q.shape[0], q.shape[2], groups, -1), q)
    scale = checks.scale_of(softmax_scale, q)
    checks.check_impl(impl)
    if memory_slots is not None:
        check_slots(memory_slots, q, k.shape[1] // frame)
    if not k.shape[1] or (memory_slots is not None and not memory_slots.shape[1]):
        indices = indices[..., :0]  # an empty bank
    resume_out = resume_lse = None
    if resume is not None:
        if not isinstance(resume, (tuple, list)) or len(resume) != 2:
            raise TypeError(f"resume must be a pair (out, lse), got {type(resume).__name__}")
        resume_out, resume_lse = resume
        _check_state("resume", resume_out, resume_lse)
        checks.check_tensor("resume's out", resume_out, "B Lq H D", like=q)
        checks.check_shape("resume's out", resume_out, tuple(q.shape))
    chosen = dispatch.resolve(impl, q)
    return registration.attend_selected(
        q, k, v, indices, memory_slots, resume_out, resume_lse, block_size, frame, group, scale, chosen
    )


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over both; exact, differentiable.

    Args:
        out_a, out_b: (B, Lq, H, D); ignored where their LSE is -inf.
        lse_a, lse_b: natural-log LSE (B, H, Lq), float32 (float64 for float64 outs).

    Returns:
        out (B, Lq, H, D) in out_a's dtype, rounded once, and LSE (B, H, Lq).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices differ, or an LSE carries no gradient where its out needs one.
    """
    _check_state("a", out_a, lse_a)
    _check_state("b", out_b, lse_b)
    checks.check_shape("out_b", out_b, tuple(out_a.shape))
    if out_a.dtype != out_b.dtype:
        raise TypeError(f"out_b must have the dtype of out_a, {out_a.dtype}, got {out_b.dtype}")
    checks.check_device("out_b", out_b, out_a)
    return registration.merge_states(out_a, lse_a, out_b, lse_b)


def _check_pair(k_name: str, k: object, v_name: str, v: object, q: Tensor) -> None:
    """Keys and values that fit the queries and each other."""
    checks.check_tensor(k_name, k, "B L Hkv D", like=q)
    checks.check_tensor(v_name, v, "B L Hkv D", like=q)
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    checks.check_heads(q, k, k_name)
    checks.check_shape(v_name, v, tuple(k.shape))


def _check_state(name: str, out: Tensor, lse: Tensor) -> None:
    """An attention state: out and LSE that belong together, and carry gradients together."""
    checks.check_tensor(f"the out of {name}", out, "B Lq H D")
    wide = torch.promote_types(out.dtype, torch.float32)
    if not isinstance(lse, Tensor) or lse.dtype != wide:
        raise TypeError(f"the LSE of {name} must be a {wide} tensor, got {getattr(lse, 'dtype', type(lse).__name__)}")
    checks.check_shape(f"the LSE of {name}", lse, (out.shape[0], out.shape[2], out.shape[1]))
    checks.check_device(f"the LSE of {name}", lse, out)
    if dispatch.needs_grad(out) and not lse.requires_grad:
        raise ValueError(
            f"the out of {name} needs a gradient, but its LSE carries none (its backend does not differentiate it), so "
            f"gradients would be wrong: use memory_attention, which is one autograd node, or detach both"
        )
