"""A window of which queries see a part: `causal` and `seqused_k`, against plain attention over what each query sees."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import assert_within_tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from window_cases import ALL, EMPTY, expected, make_window, narrowed, with_gradients

import memflow_ops
from memflow_ops.geometry import Geometry
from memflow_ops.impl import dense

BOTH = pytest.mark.parametrize("impl", ["reference", "torch"])


def run(inputs, options, impl):
    return memflow_ops.memory_attention(**inputs, **options, return_lse=True, impl=impl)


@BOTH
@settings(max_examples=30)
@given(
    st.integers(1, 40),
    st.sampled_from([0, 1, 7, 33, 64]),
    st.sampled_from([None, (EMPTY, ALL), (7, 33), (1, 20)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_out_lse_and_gradients_are_those_over_what_each_query_sees(impl, queries, keys, used, causal, bank, seed):
    inputs, options = make_window(queries, keys, used, heads=(4, 2), bank=bank, seed=seed, causal=causal)
    weights = torch.randn(inputs["q"].shape), torch.randn(2, 4, queries)
    found = with_gradients(lambda x: run(x, options, impl), narrowed(inputs, torch.float64), weights)
    exact = with_gradients(lambda x: expected(x, options, torch.float64), narrowed(inputs, torch.float64), weights)
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_is_as_exact_as_dense_attention(dtype):
    inputs, options = make_window(300, 333, (333, 310), bank=True)
    weights = torch.randn(inputs["q"].shape), torch.zeros(2, 2, 300)
    given = {name: x.to(dtype).double() for name, x in inputs.items()}
    exact = with_gradients(lambda x: expected(x, options, torch.float64), narrowed(given, torch.float64), weights)
    yardstick = with_gradients(lambda x: expected(x, options, dtype), narrowed(given, dtype), weights)
    found = with_gradients(lambda x: run(x, options, "torch"), narrowed(given, dtype), weights)
    for name, ours, theirs, right in zip(("out", "lse", *inputs), found, yardstick, exact, strict=True):
        if name == "lse":
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-4)
        else:
            assert_within_tolerance(ours, theirs, right, name)


@BOTH
def test_with_as_many_keys_as_queries_it_is_what_torch_calls_causal(impl):
    q, k, v = (torch.randn(1, 40, 2, 8) for _ in range(3))
    out = memflow_ops.memory_attention(q, k, v, causal=True, impl=impl)
    right = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(out, right)


@BOTH
def test_queries_before_all_keys_have_none(impl):
    """Aligned to the bottom right, as flash-attn 2.1 is: 2 keys and 5 queries, of which the last two see something."""
    q, k, v = torch.randn(1, 5, 1, 8), torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8)
    out, lse = memflow_ops.memory_attention(q, k, v, causal=True, return_lse=True, impl=impl)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == -torch.inf).all()
    torch.testing.assert_close(out[:, 3], v[:, 0])
    assert lse[..., 3:].isfinite().all()


@BOTH
def test_keys_that_are_not_valid_are_not_read(impl):
    """Not even with values that are not finite, forward and backward; their gradients are 0."""
    inputs, options = make_window(9, 12, (5, 12), causal=False)
    inputs["k"][0, 5:], inputs["v"][0, 5:] = torch.inf, torch.nan
    leaves = narrowed(inputs, torch.float32)
    out, lse = run(leaves, options, impl)
    (out.sum() + lse.sum()).backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in leaves.values())
    assert (leaves["k"].grad[0, 5:] == 0).all() and (leaves["v"].grad[0, 5:] == 0).all()
    assert (leaves["v"].grad[1] != 0).all()


def test_what_is_refused():
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 6, 1, 8)
    refused = lambda error, match, **options: pytest.raises(error, match=match)  # noqa: E731
    with pytest.raises(TypeError, match="causal must be True or False, got int"):
        memflow_ops.memory_attention(q, k, k, causal=1)
    with refused(TypeError, r"seqused_k must be an int32 tensor of shape \(2\), got int"):
        memflow_ops.memory_attention(q, k, k, seqused_k=3)
    with refused(TypeError, "seqused_k must be int32, got torch.int64"):
        memflow_ops.memory_attention(q, k, k, seqused_k=torch.tensor([3, 3]))
    with refused(ValueError, r"seqused_k must have shape \(2\), got \(1,\)"):
        memflow_ops.memory_attention(q, k, k, seqused_k=torch.tensor([3], dtype=torch.int32))
    with refused(ValueError, "cannot attend here: it takes no causal mask, use own"):
        memflow_ops.memory_attention(q, k, k, causal=True, dense_backend="cpu")
    with refused(ValueError, "cannot attend here: it takes no seqused_k, use own"):
        memflow_ops.memory_attention(
            q, k, k, seqused_k=torch.tensor([3, 3], dtype=torch.int32), dense_backend="cpu", impl="torch"
        )


def test_which_backends_can_be_causal():
    """Those of CUDA where top left and bottom right are the same; else `auto` goes to our own."""
    geometry = Geometry(1, 1, 1, 1.0, causal=True)
    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 8)
    for name in ("cudnn", "flash", "flash_attn"):
        assert "4 and 6 tokens" in dense.why_not(name, q, k, k, geometry)
        assert "2 and 1 heads" in dense.why_not(name, q, q[:, :, :1], q[:, :, :1], geometry)
        assert "CUDA" in dense.why_not(name, q, q, q, geometry)
    assert dense.resolve("auto", "triton", q, k, k, geometry) == "own"
    assert dense.resolve("auto", "triton", q, k, k) == "cpu"


def test_flash_attn_is_told_of_the_mask(monkeypatch):
    seen = []

    def function(q, k, v, softmax_scale=None, causal=False, return_lse=False):
        seen.append(causal)
        return q, q.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    monkeypatch.setattr(dense, "_flash_attn_func", lambda: function)
    q = torch.randn(1, 4, 2, 8)
    dense.attend("flash_attn", q, q, q, 1.0, True)
    dense.attend("flash_attn", q, q, q, 1.0)
    assert seen == [True, False]
