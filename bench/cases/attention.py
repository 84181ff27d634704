"""Attention with memory: the whole op beside what one would otherwise use, its parts, and what a GPU has to decide."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops import attend_selected, memory_attention
from memflow_ops.bench.cases.alternatives import dense_backends, flex, released, whole_history
from memflow_ops.bench.cases.attention_inputs import (
    AttentionInputs,
    KeysAndValues,
    attention_contender,
    ours,
    ours_without_memory,
)
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.bench.sizes import TINY, Size
from memflow_ops.environment import why_not_compile
from memflow_ops.impl import dense

# The longest history, in frames, that dense attention is measured over.
_DENSE_FRAMES = {"cpu": 256, "cuda": 1000}


def whole_op(
    size: Size, dtype: torch.dtype, device: torch.device, seed: int, bank_frames: int, everything: bool
) -> Built:
    """memory_attention beside all that one would otherwise use; without `everything`, beside window and history."""
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed)
    window, left_out = dense_backends(given, given.window)
    best = next(iter(window))
    contenders = {OURS: ours(given), f"window, {best}": window.pop(best)}
    if everything:
        contenders |= {f"window, {name}": contender for name, contender in window.items()}
        sink, _ = dense_backends(given, given.sink_and_window)
        contenders |= {f"sink and window, {name}": contender for name, contender in sink.items()}
        contenders["ours, one selection per chunk"] = ours(given.with_query_group(size.queries))
    contenders["released way"] = released(given)
    contenders["released way, window in place"] = released(given, window_in_place=True)
    if everything and size is not TINY:  # FlexAttention takes seconds to compile.
        if why := why_not_compile(device):
            left_out["FlexAttention"] = why
        else:
            contenders["FlexAttention"] = flex(given)
    if bank_frames <= _DENSE_FRAMES[device.type]:
        every = min(3, max(1, bank_frames // 16)) if device.type == "cpu" else 1  # At least 3 of 9 rounds.
        contenders["whole history, dense"] = whole_history(given, every)
    return Built(contenders, left_out)


def attend(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Built:
    """Attention to the selected blocks that continues the window's softmax.

    Against dense attention to as many adjacent keys, and to the window, through memory_attention without a bank: a
    dense backend of torch or flash-attn, which gives the LSE too, and our call around it.
    """
    given = AttentionInputs.make(size, size.bank_frames, dtype, device, seed)
    state = memory_attention(given.q, *given.window, return_lse=True)
    assert isinstance(state, tuple)
    contenders = {
        OURS: selected_alone(given, given.window, state),
        "as many keys, dense": ours_without_memory(given, given.as_many_keys),
        "window, dense": ours_without_memory(given, given.window),
    }
    return Built(contenders)


def selected_alone(
    given: AttentionInputs,
    window: KeysAndValues | None = None,
    state: tuple[Tensor, Tensor] | None = None,
    with_union_size: bool = False,
) -> Contender:
    """attend_selected over the inputs' selection. state: out and LSE over `window`, to continue from."""
    size = given.size

    def call() -> Tensor:
        return attend_selected(
            given.q,
            *given.bank,
            given.indices,
            block_size=size.block_size,
            frame_tokens=size.frame_tokens,
            query_group=size.query_group,
            resume=state,
            impl=given.impl,
        )[0]

    return attention_contender(
        given,
        call,
        given.selected_keys,
        given.window_and_selection(given.no_window if window is None else window),
        settings={"query_group": size.query_group},
        notes=given.union_size if with_union_size else None,
    )


# ---------------------------------------------------------------------------------------------------- our kernels alone


def window_kernel(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Built:
    """Our own dense attention to the window, against every dense backend."""
    given = AttentionInputs.make(size, 1, dtype, device, seed, impl="triton")
    theirs, left_out = dense_backends(given, given.window)
    return Built({OURS: ours_without_memory(given, given.window, dense_backend="own"), **theirs}, left_out)


def bank_kernel(size: Size, dtype: torch.dtype, device: torch.device, seed: int, bank_frames: int) -> Built:
    """Attention to the selected blocks alone, against every dense backend over as many keys: equal FLOPs."""
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed, impl="triton")
    theirs, left_out = dense_backends(given, given.as_many_keys)
    per_query = selected_alone(given.with_query_group(1), with_union_size=True)
    return Built({OURS: selected_alone(given), **theirs, "ours, a selection per query": per_query}, left_out)


def query_groups(
    size: Size, dtype: torch.dtype, device: torch.device, seed: int, bank_frames: int, correlated: bool
) -> Built:
    """memory_attention with a selection per tile, per query and per chunk, against the window, and sink and window."""
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed, impl="triton", correlated=correlated)
    window, left_out = dense_backends(given, given.window)
    sink, _ = dense_backends(given, given.sink_and_window)
    per_query = given.with_query_group(1)
    contenders = {
        OURS: ours(given),
        **{f"window, {name}": contender for name, contender in window.items()},
        **{f"sink and window, {name}": contender for name, contender in sink.items()},
        "ours, a selection per query": ours(per_query, notes=per_query.union_size),
        "ours, one selection per chunk": ours(given.with_query_group(size.queries)),
    }
    return Built(contenders, left_out)


def large_bank(
    size: Size, dtype: torch.dtype, device: torch.device, seed: int, bank_frames: int, smaller: int
) -> Built:
    """memory_attention with a large bank, against the same with the first `smaller` frames of it, and the window."""
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed, impl="triton")
    window, left_out = dense_backends(given, given.window)
    contenders = {
        OURS: ours(given),
        f"ours, bank of {smaller} frames": ours(given.with_bank(smaller)),
        **{f"window, {name}": contender for name, contender in window.items()},
    }
    return Built(contenders, left_out)


def short_window(size: Size, dtype: torch.dtype, device: torch.device, seed: int, bank_frames: int, keys: int) -> Built:
    """A window of so many keys inside our own launch, against the same through each dense backend first."""
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed, impl="triton")
    k, v = (x[:, :keys] for x in given.window)
    contenders = {OURS: ours(given, (k, v), dense_backend="own")}
    left_out = {}
    for name in dense.NAMES[2:]:
        if why := dense.why_not(name, given.q, k, v):
            left_out[f"window by {name}"] = why
        else:
            contenders[f"window by {name}"] = ours(given, (k, v), dense_backend=name)
    return Built(contenders, left_out)
