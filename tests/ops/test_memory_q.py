"""A second query, `memory_q`, that selects blocks of the bank and attends to them, while q attends to the window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_cases import assert_within_tolerance, cases, small_case
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_q_cases import chosen, dense, in_dtype, with_second_query
from torch import Tensor

import memflow_ops

IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["reference", "torch"])
LOW = [torch.float32, torch.bfloat16, torch.float16]


@IMPLEMENTATIONS
@given(cases())
@settings(max_examples=100)
def test_in_float64_it_is_dense_attention(impl, case):
    case = with_second_query(case)
    for ours, exact in zip(case.run(impl), dense(case, chosen(case, impl)), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)


@given(cases(), st.sampled_from(LOW))
@settings(max_examples=100)
def test_torch_is_as_exact_as_dense_attention(case, dtype):
    low = in_dtype(with_second_query(case), dtype)
    indices = chosen(low, "torch")
    out, lse = low.run("torch")
    exact, exact_lse = dense(in_dtype(low, torch.float64), indices)
    assert_within_tolerance(out, dense(low, indices)[0], exact, repr(low))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@IMPLEMENTATIONS
@given(cases())
@settings(max_examples=40)
def test_gradients_of_both_queries_are_those_of_dense_attention(impl, case):
    case = with_second_query(case)
    indices = chosen(case, impl)
    if indices is None and not case.k.shape[1]:
        return
    leaves = case.requires_grad()
    if "memory_q" in case.options:
        case.options["memory_q"].requires_grad_()
        leaves.append(case.options["memory_q"])
    weights = [torch.randn(x.shape, dtype=torch.float64) for x in case.run(impl)]

    def gradients(out: Tensor, lse: Tensor) -> list[Tensor]:
        seen = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
        loss = (out * weights[0]).sum() + (seen * weights[1]).sum()
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    for ours, exact in zip(gradients(*case.run(impl)), gradients(*dense(case, indices)), strict=True):
        torch.testing.assert_close(ours, exact.nan_to_num(0.0), rtol=1e-9, atol=1e-10)


@IMPLEMENTATIONS
@pytest.mark.parametrize("wanted", ["q", "memory_q", "memory_v"])
def test_each_gradient_alone_is_the_one_beside_the_others(impl, wanted):
    case = with_second_query(small_case())
    tensors = {**case.tensors(), "memory_q": case.options.pop("memory_q")}
    weight = torch.randn(case.q.shape, dtype=torch.float64)

    def gradient(leaves: dict[str, Tensor]) -> Tensor:
        out = memflow_ops.memory_attention(**{**tensors, **leaves}, **case.options, impl=impl)
        return torch.autograd.grad((out * weight).sum(), leaves[wanted])[0]

    alone = {wanted: tensors[wanted].clone().requires_grad_()}
    together = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    assert torch.equal(gradient(alone), gradient(together))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_the_same_queries_twice_are_one(impl, dtype):
    case = small_case().to(dtype)
    twice = replace(case, options={**case.options, "memory_q": case.q.clone()})
    for one, two in zip(case.run(impl), twice.run(impl), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12 if dtype == torch.float64 else 4e-3, atol=1e-12)


@IMPLEMENTATIONS
def test_an_empty_bank_leaves_the_window(impl):
    case = small_case()
    case.memory_k, case.memory_v = case.memory_k[:, :0], case.memory_v[:, :0]
    second = replace(case, options={**case.options, "memory_q": torch.full_like(case.q, torch.nan)})
    for one, two in zip(case.run(impl), second.run(impl), strict=True):
        assert torch.equal(one, two)


def test_a_dense_backend_attends_to_the_window_alone():
    case = in_dtype(with_second_query(small_case()), torch.float32)
    own, backend = (
        memflow_ops.memory_attention(*case.tensors().values(), **case.options, dense_backend=name)
        for name in ("own", "cpu")
    )
    exact, _ = dense(in_dtype(case, torch.float64), chosen(case, "torch"))
    for out in (own, backend):
        assert (out - exact).abs().max() <= 1e-5
