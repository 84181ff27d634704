"""Operators that are run without torch's dispatcher: only where it would lead to nothing but the implementation."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import memflow_ops
from memflow_ops.ops import registration
from memflow_ops.ops.registration.dispatch import directly

states: list[str] = []


@torch.library.custom_op("memflow_ops_tests::with_state", mutates_args=())
def with_state(x: torch.Tensor) -> torch.Tensor:
    """Notes what is switched off of torch's dispatcher while it runs."""
    states.append(str(torch._C._dispatch_tls_local_exclude_set()))
    return x + 1


with_state.register_autograd(lambda ctx, grad: grad)


class Operator:
    """In the place of a custom operator: it says which way a call took."""

    def _init_fn(self, x: torch.Tensor, size: int) -> str:
        return "direct"

    def __call__(self, x: torch.Tensor, size: int) -> str:
        return "dispatched"


def way(x: torch.Tensor) -> str:
    return directly(Operator())(x, 3)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(operator.name())
        return operator(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


PLAIN = torch.randn(3, 4)


@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_a_call_that_nothing_sees_runs_the_implementation_in_the_same_state(context):
    states.clear()
    with context():
        assert way(PLAIN) == "direct"
        with_state(PLAIN)
        directly(with_state)(PLAIN)
    assert states[0] == states[1] and "AutogradOther" in states[0]


@pytest.mark.parametrize("context", [Functions, Dispatched, torch.profiler.profile])
def test_modes_and_profilers_see_the_operator(context):
    with context():
        assert way(PLAIN) == "dispatched"
    assert way(PLAIN) == "direct"


@pytest.mark.parametrize(
    "x",
    [
        PLAIN.clone().requires_grad_(),
        PLAIN.as_subclass(Subclass),
        torch._neg_view(PLAIN),
        torch._efficientzerotensor((3, 4)),
        PLAIN.to("meta"),
    ],
    ids=["gradient", "subclass", "negated view", "zeros without memory", "meta"],
)
def test_tensors_that_the_dispatcher_treats_in_a_way_of_its_own(x):
    assert way(x) == "dispatched"


def test_named_arguments_are_sorted_by_the_dispatcher():
    assert directly(Operator())(PLAIN, size=3) == "dispatched"
    x = torch.randn(1, 16, 2, 8)
    named = registration.describe_blocks(k=x, block_size=4, frame_tokens=8, moments=1, impl="torch")
    assert torch.equal(named, registration.describe_blocks(x, 4, 8, 1, "torch"))


def test_a_gradient_that_is_not_asked_for_does_not_matter():
    with torch.no_grad():
        assert way(PLAIN.clone().requires_grad_()) == "direct"


def test_transformations_and_tracers_see_the_operator():
    ways = []
    torch.func.vmap(lambda x: (ways.append(way(x)), x)[1])(PLAIN)
    torch.jit.trace(lambda x: (ways.append(way(x)), x + 1)[1], (PLAIN,), check_trace=False)
    assert ways == ["dispatched", "dispatched"]


def test_code_that_is_being_compiled_holds_the_operator(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert way(PLAIN) == "dispatched"


def attended(impl: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    q, k, v, memory_k, memory_v = (
        torch.randn(1, tokens, 2, 8, generator=generator, dtype=torch.float64) for tokens in (6, 5, 5, 24, 24)
    )
    descriptors = memflow_ops.describe_blocks(memory_k, 4, 12, impl=impl)
    indices = memflow_ops.select_blocks(q, descriptors, 2, query_group=3, blocks_per_frame=3, impl=impl)
    sizes = {"block_size": 4, "frame_tokens": 12, "query_group": 3, "impl": impl}
    state = memflow_ops.attend_selected(q, memory_k, memory_v, indices, **sizes)
    out, lse = memflow_ops.memory_attention(q, k, v, memory_k, memory_v, top_k=2, return_lse=True, **sizes)
    return [descriptors, indices, *state, out, lse]


OPERATORS = ("describe_blocks", "select_blocks", "attend_selected", "memory_attention")


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_both_ways_give_the_same_bits(impl, monkeypatch):
    direct = attended(impl)
    for name in OPERATORS:
        monkeypatch.setattr(registration, name, getattr(torch.ops.memflow_ops, name))
    for a, b in zip(direct, attended(impl), strict=True):
        assert torch.equal(a, b) and a._is_view() == b._is_view()


def test_a_mode_sees_our_operators_by_name():
    with Dispatched() as mode:
        attended("torch")
    seen = [name.removeprefix("memflow_ops::") for name in mode.seen if name.startswith("memflow_ops::")]
    assert seen == list(OPERATORS)


def test_a_negated_view_is_attended_to_as_what_it_stands_for():
    q, k = torch.randn(1, 6, 2, 8), torch.randn(1, 5, 2, 8)
    expected = memflow_ops.memory_attention(-q, k, k)
    assert torch.equal(memflow_ops.memory_attention(torch._neg_view(q), k, k), expected)


def test_what_writes_into_its_arguments_goes_through_the_dispatcher():
    """The dispatcher counts the changes of a tensor, by which autograd knows that what it saved is no longer there."""
    pool, places = torch.zeros(1, 2, 3, 1, 4), torch.zeros(1, 1, dtype=torch.int32)
    version = pool._version
    registration.write_frames(pool, places, torch.ones(1, 1, 3, 1, 4))
    assert pool._version > version
