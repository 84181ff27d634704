"""A window whose frames lie in a pool: as if it were in one piece, whatever the order of its frames there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from window_cases import as_one, expected, make_paged, narrowed, with_gradients

import memflow_ops
from memflow_ops.geometry import Geometry
from memflow_ops.impl import dense

BOTH = pytest.mark.parametrize("impl", ["reference", "torch"])
TABLES = [[[4, 1, 0], [2, 3, 5]], [[-7, 99, 2], [3, 1, 99]], [[2, 2, 2], [0, 5, 0]], [[1], [4]]]
"""In order, out of range (which is clamped), twice the same frame, and a single frame."""


def run(inputs, options, impl):
    return memflow_ops.memory_attention(**inputs, **options, return_lse=True, impl=impl)


@BOTH
@settings(max_examples=25)
@given(
    st.integers(1, 40),
    st.sampled_from(TABLES),
    st.sampled_from([None, (-3, 99), (7, 33), (12, 1)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_out_lse_and_gradients_are_those_of_a_window_in_one_piece(impl, queries, table, used, causal, bank, seed):
    inputs, options, window_of = make_paged(queries, table, used, heads=(4, 2), bank=bank, seed=seed, causal=causal)
    weights = torch.randn(inputs["q"].shape), torch.randn(2, 4, queries)
    found = with_gradients(lambda x: run(x, options, impl), narrowed(inputs, torch.float64), weights)

    def in_one_piece(x):
        return expected(*as_one(x, options, window_of), torch.float64)

    exact = with_gradients(in_one_piece, narrowed(inputs, torch.float64), weights)
    for ours, right in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-10)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"used": (29, 36), "bank": True}, {"causal": True}], ids=str)
def test_the_bits_are_those_of_a_window_in_one_piece(dtype, impl, options):
    used = options.get("used")
    others = {name: value for name, value in options.items() if name != "used"}
    inputs, options, window_of = make_paged(20, TABLES[0], used, **{"causal": False, **others})
    weights = torch.randn(inputs["q"].shape), torch.randn(2, 2, 20)
    given = narrowed(inputs, dtype)
    alone, rest = as_one({name: x.detach() for name, x in given.items()}, options, window_of)
    found = with_gradients(lambda x: run(x, options, impl), given, weights)
    right = with_gradients(lambda x: run(x, rest, impl), narrowed(alone, dtype), weights)
    for name, ours, same in zip(("out", "lse", *inputs), found, right, strict=True):
        assert torch.equal(window_of(ours) if name in ("k", "v") else ours, same), name


@BOTH
def test_frames_outside_of_the_window_get_gradients_of_zero(impl):
    inputs, options, _ = make_paged(9, [[4, 1], [2, 2]], causal=False)
    leaves = narrowed(inputs, torch.float32)
    run(leaves, options, impl)[0].sum().backward()
    frames = leaves["v"].grad.unflatten(1, (6, 12)).abs().sum((2, 3, 4)) > 0
    assert frames.nonzero().tolist() == [[0, 1], [0, 4], [1, 2]]
    assert leaves["k"].grad.isfinite().all()


@BOTH
def test_the_paged_cache_of_a_serving_engine(impl):
    """All sequences share its pages, (pages, page, Hkv, D): seen as one pool by every sequence, without a copy."""
    pages_k, pages_v = torch.randn(2, 7, 4, 2, 8).unbind()
    block_table, lengths = torch.tensor([[6, 0, 2], [1, 5, 6]]).int(), torch.tensor([9, 12]).int()
    q = torch.randn(2, 5, 4, 8)
    k, v = (pages.flatten(0, 1).expand(2, -1, -1, -1) for pages in (pages_k, pages_v))
    assert k.data_ptr() == pages_k.data_ptr()
    options = dict(window_slots=block_table, frame_tokens=4, seqused_k=lengths, causal=True, impl=impl)
    out = memflow_ops.memory_attention(q, k, v, **options)
    for b, length in enumerate([9, 12]):
        alone = (pages[block_table[b].long()].flatten(0, 1)[None, :length] for pages in (pages_k, pages_v))
        right = memflow_ops.memory_attention(q[b : b + 1], *alone, causal=True, impl="reference")
        torch.testing.assert_close(out[b : b + 1], right, rtol=1e-5, atol=1e-5)


@BOTH
def test_a_table_without_frames_is_no_window(impl):
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 6, 1, 8, requires_grad=True)
    none = torch.zeros(2, 0, dtype=torch.int32)
    out, lse = memflow_ops.memory_attention(q, k, k, window_slots=none, frame_tokens=3, return_lse=True, impl=impl)
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert (torch.autograd.grad(out.sum(), k)[0] == 0).all()


def test_what_is_refused():
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 6, 1, 8)
    slots = torch.tensor([[0], [1]], dtype=torch.int32)
    run = lambda k=k, **options: memflow_ops.memory_attention(q, k, k, **options)  # noqa: E731
    with pytest.raises(ValueError, match="window_slots needs frame_tokens, the number of tokens of a frame of k"):
        run(window_slots=slots)
    with pytest.raises(ValueError, match=r"k must hold whole frames of 4 tokens \(frame_tokens\), got 6 tokens"):
        run(window_slots=slots, frame_tokens=4)
    with pytest.raises(TypeError, match=r"window_slots must be int32, got torch\.int64"):
        run(window_slots=slots.long(), frame_tokens=3)
    with pytest.raises(ValueError, match=r"window_slots must have shape \(2, any\), got \(1, 1\)"):
        run(window_slots=slots[:1], frame_tokens=3)
    with pytest.raises(ValueError, match="window_slots names 1 frames, but k holds none"):
        run(k[:, :0], window_slots=slots, frame_tokens=3)
    with pytest.raises(ValueError, match="cannot attend here: it takes no window_slots, use own"):
        run(window_slots=slots, frame_tokens=3, dense_backend="cpu")


def test_auto_leaves_such_a_window_to_the_implementation():
    geometry = Geometry(1, 3, 1, 1.0, window_slots=torch.zeros(1, 2, dtype=torch.int32))
    q = torch.randn(1, 600, 1, 8)
    assert dense.resolve("auto", "triton", q, q, q, geometry) == "own"
    assert dense.resolve("auto", "triton", q, q, q) == "cpu"
