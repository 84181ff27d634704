"""The backward of attention with memory: with its forward as a user calls it, and our kernels alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memflow_ops import memory_attention
from memflow_ops.bench import inputs
from memflow_ops.bench.cases.alternatives import DenseAttention, dense_ways, torch_attention
from memflow_ops.bench.cases.attention import selected_alone
from memflow_ops.bench.cases.attention_inputs import (
    TILE_QUERIES,
    AttentionInputs,
    KeysAndValues,
    all_of,
    attention_contender,
    ours,
    ours_without_memory,
)
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.bench.harness.correctness import attend_one_head, sampled
from memflow_ops.bench.sizes import Size
from memflow_ops.geometry import Geometry
from memflow_ops.impl import composed, implementation_of

# The gradients, as error messages name them.
_NAMES = ("dq", "dk", "dv", "the bank's dk", "the bank's dv")
# How far a head's gradient may be off, of its largest value and of its norm.
_ALLOWED = {torch.float32: 5e-5, torch.bfloat16: 0.02, torch.float16: 0.02}


class Gradients:
    """The gradients of attention to a window and to the selected blocks, in float64, for one gradient of the output.

    window: keys and values, which may be of no tokens. selected: whether the bank takes part.
    """

    def __init__(self, given: AttentionInputs, window: KeysAndValues, selected: bool, seed: int):
        size, q = given.size, given.q
        self.given, self.selected = given, selected
        self.tensors = [q, *window, *(given.bank if selected else ())]
        self.above = inputs.random_tokens(1, size.queries, size.heads, size.head_dim, q.dtype, seed + 1, str(q.device))

    @property
    def keys(self) -> int:
        """Keys that a query attends to, where blocks count as full."""
        return self.tensors[1].shape[1] + (self.given.selected_keys if self.selected else 0)

    @torch.enable_grad()
    def exact(self, head: int) -> list[Tensor]:
        """Those of one head's queries, keys and values, and of its bank's."""
        size = self.given.size
        of = [x.detach()[0, :, head].double().requires_grad_() for x in self.tensors]
        total = [torch.zeros_like(x) for x in of]
        step = size.query_group * max(1, TILE_QUERIES // size.query_group)
        for first in range(0, size.queries, step):
            rows = slice(first, first + step)
            (queries, keys, values), attended = (of[0][rows], of[1], of[2]), None
            if self.selected:
                tokens, by_query = self.given.selected_by(head, rows)
                attended = torch.cat([by_query.new_ones(len(queries), len(keys)), by_query], 1)
                keys, values = (torch.cat([near, far[tokens]]) for near, far in zip(of[1:3], of[3:], strict=True))
            out = attend_one_head(queries, keys, values, attended)
            parts = torch.autograd.grad(out, of, self.above[0, rows, head].double())
            for sum_, part in zip(total, parts, strict=True):
                sum_ += part
        return total

    def check(self, found: Sequence[Tensor], wanted: Sequence[bool] = (True,) * 5) -> None:
        """found: the gradients in order, of which only the wanted ones count."""
        if self.selected:
            self.given.check_descriptors()
            for head, group in sampled(self.given.size.heads, self.given.size.groups):
                self.given.selection(head, group)
        allowed = _ALLOWED[self.given.q.dtype]
        for head in range(self.given.size.heads):
            for name, gradient, right, counts in zip(_NAMES, found, self.exact(head), wanted, strict=False):
                if not counts or not right.numel():
                    continue
                off = gradient[0, :, head].double() - right
                errors = {"largest": off.abs().max() / right.abs().max(), "mean": off.norm() / right.norm()}
                for of, error in errors.items():
                    assert error <= allowed, f"head {head}: {name} off by {error:.2e} of its {of} size"

    def contender(
        self, call: Callable[[], Sequence[Tensor]], products: int, wanted: Sequence[bool] = (True,) * 5, **more: Any
    ) -> Contender:
        """A way to compute the wanted gradients by so many products of every query with its keys.

        more: for Contender.
        """
        size = self.given.size
        return Contender(
            call,
            lambda: self.check(call(), wanted),
            flops=size.attention_flops(self.keys) * products // 2,
            bytes=3 * size.attention_bytes(self.keys, self.given.q.element_size()),
            **more,
        )


def through_autograd(gradients: Gradients, attend: Callable[..., Tensor], **more: Any) -> Contender:
    """Forward and backward of a differentiable function of the tensors: seven products."""
    leaves = [x.detach().clone().requires_grad_() for x in gradients.tensors]

    @torch.enable_grad()
    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*leaves), leaves, gradients.above)

    return gradients.contender(call, 7, **more)


def forward_and_backward(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Built:
    """Forward and backward; against those of dense attention to the window, and beside the forward alone."""
    given = AttentionInputs.make(size, size.bank_frames, dtype, device, seed)

    def attended(*tensors: Tensor) -> Tensor:
        out = memory_attention(
            *tensors,
            memory_descriptors=given.descriptors,
            top_k=size.top_k,
            block_size=size.block_size,
            frame_tokens=size.frame_tokens,
            query_group=size.query_group,
        )
        assert isinstance(out, Tensor)
        return out

    tracked = [x.detach().clone().requires_grad_() for x in (given.q, *given.window, *given.bank)]
    forward = attention_contender(
        given,
        lambda: attended(*tracked),
        size.window_keys + given.selected_keys,
        given.window_and_selection(),
        graph=False,
    )
    contenders = {
        OURS: through_autograd(Gradients(given, given.window, True, seed), attended, graph=False),
        "window": through_autograd(Gradients(given, given.window, False, seed), torch_attention, graph=False),
        "ours, forward alone": forward,
    }
    return Built(contenders)


# ---------------------------------------------------------------------------------------------------- our kernels alone


def backward_kernels(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    bank_frames: int,
    over: str,
    query_group: int,
) -> Built:
    """Our backward alone, against its forward; beside dense attention's forward, and forward and backward, over as
    many keys.

    over: `window`, `bank` or `both`.
    """
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed, impl="triton").with_query_group(query_group)
    window, selected = (given.no_window if over == "bank" else given.window), over != "window"
    gradients = Gradients(given, window, selected, seed)
    if over == "both":
        forward, keys = ours(given, dense_backend="own"), None
        of = {OURS: (True, True, True, False, False), "ours, gradients of the bank too": (True,) * 5}
    elif over == "bank":
        forward, keys = selected_alone(given), given.as_many_keys
        of = {OURS: (True, False, False, True, True), "ours, gradients of the queries alone": (True, *(False,) * 4)}
    else:
        forward, keys = ours_without_memory(given, given.window, dense_backend="own"), given.window
        of = {OURS: (True, True, True, False, False)}
    alone = {name: backward_alone(gradients, wanted) for name, wanted in of.items()}
    contenders = {OURS: alone.pop(OURS), "ours, forward": forward, **alone}
    theirs, left_out = dense_ways(given.q, keys) if keys is not None else ({}, {})
    for name, way in theirs.items():
        contenders |= dense_forward_and_both(given, name, way, keys, seed)
    return Built(contenders, left_out)


def dense_forward_and_both(
    given: AttentionInputs, name: str, way: DenseAttention, keys: KeysAndValues | None, seed: int
) -> dict[str, Contender]:
    """A way of dense attention: its forward, and forward and backward; their difference is the backward alone."""
    assert keys is not None
    both = through_autograd(Gradients(given, keys, False, seed), way)
    forward = attention_contender(given, lambda: way(given.q, *keys), keys[0].shape[1], all_of(keys))
    return {f"{name}, forward": forward, f"{name}, forward and backward": both}


def backward_alone(gradients: Gradients, wanted: tuple[bool, ...]) -> Contender:
    """The backward kernels alone, for the wanted ones of the five gradients.

    Five products, or three for the queries alone; those that both kernels compute are counted once.
    """
    given, size = gradients.given, gradients.given.size
    q, k, v, *bank = gradients.tensors
    memory_k, memory_v = bank or (None, None)
    descriptors = given.descriptors if bank else None
    geometry = Geometry(size.block_size, size.frame_tokens, size.query_group, size.head_dim**-0.5)
    out, lse, indices = composed.memory_attention(
        q, k, v, memory_k, memory_v, None, descriptors, size.top_k, geometry, "triton", "own"
    )
    near = (k, v) if k.shape[1] else (None, None)

    def call() -> Sequence[Tensor]:
        return implementation_of("triton", q.device).attend_backward(
            gradients.above, None, q, *near, memory_k, memory_v, indices, out, lse, geometry, wanted
        )

    return gradients.contender(call, 5 if any(wanted[1:]) else 3, wanted)
