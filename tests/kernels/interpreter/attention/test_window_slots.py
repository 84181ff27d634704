"""The kernels read a window whose frames lie in a pool where they are: the bits of a window in one piece, no copy."""

import pytest
import torch
from attention_cases import assert_within_tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from window_cases import as_one, expected, make_paged, narrowed, with_gradients

import memflow_ops
from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.backward import plan_attend_backward
from memflow_ops.kernels.attention.plan import plan_attend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(inputs, options):
    return memflow_ops.memory_attention(**inputs, **options, return_lse=True, impl="triton", dense_backend="own")


@settings(max_examples=8)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 12), (20, 12), (70, 20)]),
    st.sampled_from([None, (99,), (41,), (-1,)]),
    st.booleans(),
    st.sampled_from([None, 1, 16]),
    st.integers(0, 99),
)
def test_the_bits_are_those_of_a_window_in_one_piece(dtype, sizes, used, causal, bank, seed):
    """Out, LSE and all gradients; entries out of range are clamped. bank: its query group."""
    torch.manual_seed(seed)
    queries, page = sizes
    page = 12 if bank else page  # window and bank have frames of one size
    table = [[4, -7, 99, 2]] if page == 12 else [[4, -7, 99]]
    inputs, options, window_of = make_paged(
        queries, table, used, page=page, bank=bank is not None, query_group=bank or 16, seed=seed, causal=causal
    )
    weights = torch.randn(inputs["q"].shape), torch.randn(1, 2, queries)
    given = narrowed(inputs, dtype)
    alone, rest = as_one({name: x.detach() for name, x in given.items()}, options, window_of)
    found = with_gradients(lambda x: run(x, options), given, weights)
    right = with_gradients(lambda x: run(x, rest), narrowed(alone, dtype), weights)
    for name, ours, same in zip(("out", "lse", *inputs), found, right, strict=True):
        assert torch.equal(window_of(ours) if name in ("k", "v") else ours, same), name
        if name in ("k", "v"):  # what no frame of the window is has no gradient
            assert ours.count_nonzero() == window_of(ours).count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_that_is_in_the_window_twice_gets_both_gradients(dtype):
    inputs, options, window_of = make_paged(20, [[3, 1, 3]], (31,), seed=5)
    weights = torch.randn(inputs["q"].shape).to(dtype).double(), torch.randn(1, 2, 20)
    given = {name: x.to(dtype).double() for name, x in inputs.items()}

    def plain(of):
        return lambda x: expected(*as_one(x, options, window_of), of)

    exact = with_gradients(plain(torch.float64), narrowed(given, torch.float64), weights)
    yardstick = with_gradients(plain(dtype), narrowed(given, dtype), weights)
    found = with_gradients(lambda x: run(x, options), narrowed(given, dtype), weights)
    for name, ours, theirs, right in zip(("out", "lse", *inputs), found, yardstick, exact, strict=True):
        if name != "lse":
            assert_within_tolerance(ours, theirs, right, name)


def test_a_table_may_have_any_strides():
    """That of the window, and that of the bank in selection, attention and gradients."""
    inputs, options, _ = make_paged(9, [[4, 1, 0]], bank=True, causal=False)
    options["memory_slots"] = torch.tensor([[1, 0]], dtype=torch.int32)
    wide = {name: options[name].repeat_interleave(2, 1)[:, ::2] for name in ("window_slots", "memory_slots")}
    weights = torch.randn(inputs["q"].shape), torch.randn(1, 2, 9)
    assert all(x.stride(1) == 2 for x in wide.values())
    for group in (1, 16):
        results = [
            with_gradients(lambda x, given=given, group=group: run(x, {**options, **given, "query_group": group}),
                           narrowed(inputs, torch.float32), weights)
            for given in ({}, wide)
        ]  # fmt: skip
        assert all(map(torch.equal, *results))


class Made(TorchDispatchMode):
    """Counts the elements of all tensors that operators make."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.startswith(("aten::empty", "aten::zeros", "aten::clone", "aten::index", "aten::_to_copy")):
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("paged", [False, True])
def test_nothing_is_copied(paged):
    """What a plan allocates: out and LSE, and backwards the gradients, those of the window before those of the pool."""
    q, keys, pool = (torch.empty(1, n, 2, 16, device="meta") for n in (32, 48, 96))
    slots = torch.empty(1, 3, dtype=torch.int32, device="meta") if paged else None
    geometry = Geometry(16, 16, 32, 0.25, window_slots=slots)
    k = pool if paged else keys
    with Made() as made:
        plan_attend(q, k, k, None, None, None, geometry, capability=90)
    assert made.elements == q.numel() + q[..., 0].numel()
    lse, none = torch.empty(1, 2, 32, device="meta"), torch.empty(1, 2, 1, 0, dtype=torch.int32, device="meta")
    wanted = [True, True, True, False, False]
    with Made() as made:
        plan_attend_backward(q, None, q, k, k, None, None, none, q, lse, geometry, wanted, capability=90)
    gradients = q.numel() + 2 * keys.numel() + (2 * pool.numel() if paged else 0)
    assert made.elements == gradients + lse.numel()
