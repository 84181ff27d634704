"""The kernels with a second query for the bank: bank and window in one launch or in two, and their gradients."""

import pytest
import torch
from attention_cases import Case, assert_within_tolerance
from bounded_cases import NORM, make, numbers, opened
from memory_q_cases import chosen, dense, in_dtype

import memflow_ops
from memflow_ops.cache import BlockSelection, attend_to_memory
from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.plan import plan_attend


def make_case(window: int, group: int | None) -> Case:
    """Two ragged frames of 20 tokens, GQA, and 18 queries."""
    make = lambda tokens, heads: torch.randn(1, tokens, heads, 16, dtype=torch.float64)  # noqa: E731
    options = dict(top_k=3, block_size=8, frame_tokens=20, query_group=group, softmax_scale=None,
                   memory_frames=None, memory_slots=torch.tensor([[1, 0]], dtype=torch.int32),
                   memory_q=make(18, 2))  # fmt: skip
    return Case(make(18, 2), make(window, 1), make(window, 1), make(40, 1), make(40, 1), options)


@pytest.mark.parametrize("backend", ["own", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("window", "group"), [(33, 1), (33, 16), (70, None), (1, 5), (0, 7)])
def test_out_and_gradients_are_as_exact_as_dense_attention(dtype, window, group, backend):
    torch.manual_seed(window)
    case = in_dtype(make_case(window, group), dtype)
    indices, weight = chosen(case, "triton"), torch.randn(case.q.shape)

    def outputs(case: Case, attention) -> list[torch.Tensor]:
        second = case.options["memory_q"].requires_grad_()
        leaves = [*case.requires_grad(), second]
        out = attention(case)[0]
        found = torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves, allow_unused=True)
        return [out, *(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True))]

    def ours(case: Case):
        options = {**case.options, "impl": "triton", "dense_backend": backend, "return_lse": True}
        return memflow_ops.memory_attention(*case.tensors().values(), **options)

    exact = outputs(in_dtype(case, torch.float64), lambda x: dense(x, indices))
    yardstick = outputs(case, lambda x: dense(x, indices))
    names = ("out", *case.tensors(), "memory_q")
    for name, got, low, right in zip(names, outputs(case, ours), yardstick, exact, strict=True):
        assert_within_tolerance(got.detach(), low.detach(), right.detach(), name)


@pytest.mark.parametrize(("window", "launches"), [(70, 1), (1, 2)])
def test_window_and_bank_are_one_launch_where_they_are_with_one_query(window, launches):
    case = make_case(window, 16)
    tensors = [x.float() for x in (*case.tensors().values(), case.options["memory_q"])]
    geometry = Geometry(8, 20, 16, 0.25, memory_slots=case.options["memory_slots"])
    indices = torch.zeros(1, 2, 2, 3, dtype=torch.int32)
    for second in (None, tensors[5]):
        planned, *_ = plan_attend(*tensors[:5], indices, geometry, None, second)
        assert [step.kernel.fn.__name__ for step in planned] == ["attend_kernel"] * launches


@pytest.mark.parametrize("query_group", [1, None])
def test_a_bounded_bank_is_attended_to_as_if_it_were_rotated_again(query_group):
    selection = BlockSelection(1000, query_group)
    streamed = make(sink_frames=1, bank_frames=2)
    rotation = opened(streamed, 5, selection, impl="triton")
    x = numbers(77)
    with torch.no_grad():
        out = attend_to_memory(streamed.cache, rotation, selection, impl="triton").projections(1, *x, NORM)
    assert (out - streamed.exact(1, x)).abs().max() <= 1e-5
    assert [len(bank) for bank in streamed.cache.bank()] == [3, 3]
