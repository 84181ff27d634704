"""Attention over a dense local window and the most relevant blocks of a memory bank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

from torch import Tensor

from memflow_ops.geometry import SCORES, Score
from memflow_ops.impl.precision import as_autocast_does
from memflow_ops.ops import checks, registration
from memflow_ops.ops.registration import dispatch
from memflow_ops.ops.transforms import refuse_transforms

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The options of `memory_attention` beside `return_lse`, as type checkers see them in its overloads."""

    memory_q: Tensor | None
    memory_descriptors: Tensor | None
    memory_k_scale: Tensor | None
    memory_v_scale: Tensor | None
    top_k: int
    block_size: int
    frame_tokens: int | None
    query_group: int | None
    memory_frames: Tensor | None
    memory_slots: Tensor | None
    causal: bool
    seqused_k: Tensor | None
    window_slots: Tensor | None
    score: Score
    softmax_scale: float | None
    impl: str
    dense_backend: str
    dropout_p: float
    window_size: tuple[int | None, int | None]
    softcap: float
    alibi_slopes: None
    deterministic: bool
    return_attn_probs: bool


@overload
def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]: ...


@overload
def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    *,
    return_lse: bool,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, Tensor]: ...


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_k: Tensor | None = None,
    memory_v: Tensor | None = None,
    *,
    memory_q: Tensor | None = None,
    memory_descriptors: Tensor | None = None,
    memory_k_scale: Tensor | None = None,
    memory_v_scale: Tensor | None = None,
    top_k: int = 24,
    block_size: int = 64,
    frame_tokens: int | None = None,
    query_group: int | None = 128,
    memory_frames: Tensor | None = None,
    memory_slots: Tensor | None = None,
    causal: bool = False,
    seqused_k: Tensor | None = None,
    window_slots: Tensor | None = None,
    score: Score = "mean",
    softmax_scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    dense_backend: str = "auto",
    dropout_p: float = 0.0,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend to every key of a local window and to the most relevant blocks of a memory bank, under one softmax.

    A query attends to all of `k` (see `causal`, `seqused_k` and `window_slots`) and to the `top_k` blocks of the bank
    that `select_blocks` gives its query group. This is sparse memory activation (SMA) of MemFlow, arXiv 2512.14699,
    with blocks and query groups in the place of frames and chunks. The function can replace
    `flash_attn_func(q, k, v, softmax_scale=..., causal=...)` where that is called without dropout and window, also if
    the call says so itself.

    Blocks that are not selected are not read, so their values do not matter, NaN included. Gradients reach q, k, v,
    memory_k, memory_v and memory_q (first derivatives only, in reverse mode). The selection has no gradient.

    Under autocast, inputs of different dtypes are cast to that of autocast, as torch's attention does; inputs of one
    dtype are computed in it.

    Args:
        q: queries (B, Lq, H, D) in float16, bfloat16, float32 or float64. The last dimension is contiguous; the other
            strides are free. This holds for all keys and values too.
        k, v: keys and values of the local window, (B, Lk, Hkv, D). H is a multiple of Hkv. Lk may be 0.
        memory_k, memory_v: keys and values of the bank, (B, Lm, Hkv, D), in whole frames of `frame_tokens`. There is no
            bank if they are None or Lm is 0. Both may be int8, of half the size, as `quantise_memory` makes them; no
            gradient is made then, not even of the others.
        memory_q: a second form of the queries, like q, that selects blocks and attends to them, while q attends to the
            window; for example queries rotated to another position, because the bank's keys are (see
            `CacheLayout.positions`). None: q does both. Not without a bank.
        memory_descriptors: what `describe_blocks(memory_k, block_size, frame_tokens)` gives, (B, N, Hkv, D), or for the
            other scores than "mean" what it gives with `moments=2`, (B, N, Hkv, 2 D). None: they are computed here. An
            int8 bank needs them: its keys are what they differ from the means by.
        memory_k_scale, memory_v_scale: the scales of an int8 bank in the dtype of q, (B, N, Hkv, D) for every channel
            of the keys of a block and (B, Lm, Hkv) for every value: key = mean of its block + memory_k_scale *
            memory_k, and value = memory_v_scale * memory_v, rounded to the dtype of q. None: the bank is not int8.
        top_k: the number of blocks that each query group attends to.
        block_size: tokens per block. A block never crosses a frame, so the last block of a frame may be shorter.
        frame_tokens: tokens per frame of the bank. None: the bank is one frame.
        query_group: the number of consecutive queries that share a selection. 1: every query has its own. None: all
            queries share one.
        memory_frames: how many of the leading frames of the bank are valid, int32: (B,) for all query groups, or (B, G)
            for each of the G = ceil(Lq / query_group) groups, as a causal model needs it. None: all are. Values are
            clamped to their range on the device; the host never reads them.
        memory_slots: the slot table (B, F) int32, like the block table of a paged cache: frame j of the bank is frame
            `memory_slots[b, j]` of memory_k, memory_v and memory_descriptors. None: it is frame j. Values are clamped
            to their range on the device; the host never reads them.
        causal: whether a query sees only the keys of the window that are not after it. The mask is aligned to the
            bottom right, as in flash-attn: with n valid keys query i sees the first i + 1 + n - Lq of them, perhaps
            none. The bank is the past, so it is not masked. A NaN or an infinity in the window may reach queries that
            do not see it.
        seqused_k: how many of the leading keys of the window are valid, (B,) int32. None: all are. The others are not
            read. Values are clamped to their range on the device; the host never reads them on CUDA, so that one CUDA
            graph serves a window that fills.
        window_slots: the slot table (B, W) int32 of the window, for keys in a pool of frames, or pages, of
            `frame_tokens` tokens: k and v are (B, P * frame_tokens, Hkv, D), and frame j of the window is frame
            `window_slots[b, j]` of them, so that Lk is W * frame_tokens. With `seqused_k` the last frame may hold
            fewer. None: k and v are the window. Gradients have the shape of k; those of a frame that is there twice
            add up. Values are clamped to their range on the device; the host never reads them on CUDA.
        score: what blocks are ranked by: `mean`, the dot product of mean query and mean key; `moments`, an estimate of
            the weight of a block's keys in the softmax that their variance and number have a part in; or `normalised`,
            the same for each part of a group by itself; see `select_blocks`.
        softmax_scale: the factor of the scores. None: 1/sqrt(D).
        return_lse: whether to return the LSE too.
        impl: `reference` (the specification), `torch`, `triton` (D up to 256, not float64) or `auto`. `auto` is
            `triton` on CUDA except in float64, and else `torch`.
        dense_backend: what attends to `k` and `v`. `own`: the implementation itself, together with the bank. With any
            other backend the implementation continues the backend's softmax over the bank: `cudnn` or `flash` (torch's
            own, for float16 and bfloat16 on CUDA), `flash_attn` (the package, version 4, 3 or 2) or `cpu` (torch's
            flash attention for CPUs). `auto`: for `triton` the best backend of the device, but `own` for short windows
            and where no backend takes the dtype; for other implementations `own`. `cudnn`, `flash` and `flash_attn` can
            be causal where q and k have the same length and heads; none takes `seqused_k` or `window_slots`. The
            implementation itself computes all gradients in every case. They are equal bit for bit in every run.
        dropout_p, window_size, softcap, alibi_slopes, return_attn_probs: arguments of `flash_attn_func`, accepted where
            they ask for nothing: 0.0, (-1, -1), 0.0, None, False.
        deterministic: an argument of `flash_attn_func`; every run is deterministic in any case.

    Returns:
        out (B, Lq, H, D) in the dtype of q, contiguous, 0 where a query has no key. With `return_lse` a pair of out and
        the LSE (B, H, Lq): the natural logarithm of the sum of the exponentials of the scaled scores, in float32
        (float64 for float64 inputs), -inf where a query has no key.

    Raises:
        ValueError, TypeError: an argument is wrong. The message says what was given and what is expected.
        NotImplementedError: an input has a tangent, for a derivative in forward mode, or needs a gradient beside an
            int8 bank.
    """
    checks.check_neutral(
        dropout_p=dropout_p,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_attn_probs=return_attn_probs,
    )
    of_int8 = (memory_k_scale, memory_v_scale, None if memory_k_scale is None else memory_descriptors)
    refuse_transforms("memory_attention", q, k, v, memory_k, memory_v, memory_q, *of_int8)
    q, k, v, memory_k, memory_v, memory_q, memory_descriptors, memory_k_scale, memory_v_scale = as_autocast_does(
        q, k, v, memory_k, memory_v, memory_q, memory_descriptors, memory_k_scale, memory_v_scale
    )
    checks.check_query(q)
    checks.check_pair("k", k, "v", v, q)
    if (memory_k is None) != (memory_v is None):
        raise ValueError("memory_k and memory_v must be given together")
    top_k = checks.check_positive("top_k", top_k)
    block_size = checks.check_positive("block_size", block_size)
    group = checks.group_size(query_group, q.shape[1])
    scale = checks.scale_of(softmax_scale, q)
    checks.check_score(score)
    checks.check_impl(impl)
    checks.check_dense_backend(dense_backend)
    if memory_frames is not None:
        checks.check_frame_counts(memory_frames, q, -(-q.shape[1] // group))
    causal = checks.check_flag("causal", causal)
    if seqused_k is not None:
        checks.check_integers("seqused_k", seqused_k, (q.shape[0],), q)
    frame = 1 if frame_tokens is None else checks.check_positive("frame_tokens", frame_tokens)
    if window_slots is not None:
        if frame_tokens is None:
            raise ValueError("window_slots needs frame_tokens, the number of tokens of a frame of k, got None")
        checks.check_slots(
            window_slots, q, k.shape[1] // checks.frame_size(frame_tokens, k.shape[1], "k"), "window_slots", "k"
        )
        if window_slots.shape[1] == 0:
            k, v, window_slots = k[:, :0], v[:, :0], None
    if memory_k is not None and memory_v is not None:
        scales = (memory_descriptors, memory_k_scale, memory_v_scale)
        is_int8 = checks.check_bank("memory_k", memory_k, "memory_v", memory_v, *scales, q)
        if memory_k.shape[2] != k.shape[2]:
            raise ValueError(f"memory_k must have the heads of k, {k.shape[2]}, got {memory_k.shape[2]}")
        frame = checks.frame_size(frame_tokens, memory_k.shape[1], "memory_k")
        block_size = min(block_size, frame)
        frames = memory_k.shape[1] // frame
        if memory_q is not None:
            checks.check_tensor("memory_q", memory_q, "B Lq H D", like=q)
            checks.check_shape("memory_q", memory_q, tuple(q.shape))
        if memory_slots is not None:
            checks.check_slots(memory_slots, q, frames)
        if memory_descriptors is not None:
            checks.check_descriptors("memory_descriptors", memory_descriptors, memory_k, frame, block_size, (score,), q)
        if is_int8:
            checks.check_scales(memory_k, frame, block_size, *scales, q)
            checks.check_no_gradient(q, k, v, memory_q, *scales)
        if frames == 0 or (memory_slots is not None and memory_slots.shape[1] == 0):
            memory_k = memory_v = memory_q = memory_descriptors = memory_slots = memory_frames = None
            memory_k_scale = memory_v_scale = None
    else:
        given = {
            "memory_q": memory_q,
            "memory_descriptors": memory_descriptors,
            "memory_k_scale": memory_k_scale,
            "memory_v_scale": memory_v_scale,
            "memory_slots": memory_slots,
            "memory_frames": memory_frames,
        }
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is given without memory_k and memory_v")
    stored = (memory_descriptors, memory_k_scale, memory_v_scale)
    bank = (memory_k, memory_v, memory_q, *stored, memory_frames, memory_slots)
    sizes = (top_k, block_size, frame, group, scale, causal, score)
    impl = dispatch.resolve(impl, q)
    out, lse, _ = registration.memory_attention(q, k, v, *bank, seqused_k, window_slots, *sizes, impl, dense_backend)
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
    memory_descriptors: Tensor | None = None,
    memory_k_scale: Tensor | None = None,
    memory_v_scale: Tensor | None = None,
    memory_slots: Tensor | None = None,
    resume: tuple[Tensor, Tensor] | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend to given blocks of a memory bank. On request this continues the softmax of attention over other keys.

    Gradients reach q, k, v and the resumed state (first derivatives only, in reverse mode). Under autocast, inputs of
    different dtypes are cast to that of autocast.

    Args:
        q: queries (B, Lq, H, D).
        k, v: keys and values of the bank, (B, Lm, Hkv, D), in whole frames of `frame_tokens`. H is a multiple of Hkv.
            Both may be int8, which makes no gradient.
        indices: the selection (B, H, G, K) int32 of `select_blocks`, where G = ceil(Lq / query_group). Entries outside
            of the bank, such as -1, are unused. A block that is listed twice counts twice.
        block_size, frame_tokens, query_group, memory_slots, softmax_scale, impl: as in `memory_attention`.
        memory_descriptors, memory_k_scale, memory_v_scale: as in `memory_attention`, for an int8 bank; without one the
            descriptors do not matter.
        resume: the state `(out, lse)` of attention over other keys: out (B, Lq, H, D) in the dtype of q, and the
            natural-log LSE (B, H, Lq) in float32 (float64 for float64 inputs). None: start afresh.

    Returns:
        out (B, Lq, H, D) and the natural-log LSE (B, H, Lq) over the selected keys and those behind `resume`; 0 and
        -inf where a query has no key.

    Raises:
        ValueError, TypeError: an argument is wrong. The message says what was given and what is expected.
        ValueError: the out of `resume` needs a gradient, but its LSE carries none, because the backend that made it
            does not differentiate its LSE. The gradient would be silently wrong.
        NotImplementedError: an input has a tangent, for a derivative in forward mode, or needs a gradient beside an
            int8 bank.
    """
    resume_out: Any = None
    resume_lse: Any = None
    if resume is not None:
        if not isinstance(resume, (tuple, list)) or len(resume) != 2:
            raise TypeError(f"resume must be a pair (out, lse), got {type(resume).__name__}")
        resume_out, resume_lse = resume
    of_int8 = (memory_k_scale, memory_v_scale, None if memory_k_scale is None else memory_descriptors)
    refuse_transforms("attend_selected", q, k, v, resume_out, resume_lse, *of_int8)
    q, k, v, resume_out, memory_descriptors, memory_k_scale, memory_v_scale = as_autocast_does(
        q, k, v, resume_out, memory_descriptors, memory_k_scale, memory_v_scale
    )
    checks.check_query(q)
    scales: tuple[Any, Any, Any] = (memory_descriptors, memory_k_scale, memory_v_scale)
    is_int8 = checks.check_bank("k", k, "v", v, *scales, q)
    block_size = checks.check_positive("block_size", block_size)
    frame = checks.frame_size(frame_tokens, k.shape[1], "k")
    block_size = min(block_size, frame)
    group = checks.group_size(query_group, q.shape[1])
    groups = -(-q.shape[1] // group)
    checks.check_integers("indices", indices, (q.shape[0], q.shape[2], groups, -1), q)
    scale = checks.scale_of(softmax_scale, q)
    checks.check_impl(impl)
    if memory_slots is not None:
        checks.check_slots(memory_slots, q, k.shape[1] // frame)
    if is_int8:
        checks.check_descriptors("memory_descriptors", scales[0], k, frame, block_size, SCORES, q)
        checks.check_scales(k, frame, block_size, *scales, q)
        checks.check_no_gradient(q, resume_out, resume_lse, *scales)
    else:
        scales = (None, None, None)
    if not k.shape[1] or (memory_slots is not None and not memory_slots.shape[1]):
        indices = indices[..., :0]  # An empty bank has no blocks to select.
    if resume is not None:
        checks.check_state("resume", resume_out, resume_lse)
        checks.check_tensor("resume's out", resume_out, "B Lq H D", like=q)
        checks.check_shape("resume's out", resume_out, tuple(q.shape))
    tensors = (q, k, v, indices, *scales, memory_slots, resume_out, resume_lse)
    return registration.attend_selected(*tensors, block_size, frame, group, scale, dispatch.resolve(impl, q))


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the states of attention over two disjoint sets of keys into the state of attention over both.

    The result is exact and differentiable. Each out is weighted by the share exp(its LSE - the merged LSE).

    Args:
        out_a, out_b: (B, Lq, H, D). An out is ignored, NaN included, where its LSE is -inf.
        lse_a, lse_b: natural-log LSE (B, H, Lq) in float32 (float64 for float64 outs).

    Returns:
        out (B, Lq, H, D) in the dtype of out_a, rounded once, and the LSE (B, H, Lq).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices differ.
        ValueError: an out needs a gradient, but its LSE carries none.
    """
    checks.check_state("a", out_a, lse_a)
    checks.check_state("b", out_b, lse_b)
    checks.check_shape("out_b", out_b, tuple(out_a.shape))
    if out_a.dtype != out_b.dtype:
        raise TypeError(f"out_b must have the dtype of out_a, {out_a.dtype}, got {out_b.dtype}")
    checks.check_device("out_b", out_b, out_a)
    return registration.merge_states(out_a, lse_a, out_b, lse_b)
