"""The kernels with a causal window, valid keys read on the device, and valid frames for each query group."""

import pytest
import torch
from attention_cases import assert_within_tolerance
from hypothesis import given, settings
from hypothesis import strategies as st
from test_frames_by_group import groups_one_by_one, moba_by_query, moba_folded, moba_in_loops
from window_cases import ALL, EMPTY, expected, make_window, narrowed, with_gradients

import memflow_ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(inputs, options):
    return memflow_ops.memory_attention(**inputs, **options, return_lse=True, impl="triton", dense_backend="own")


def check(queries, keys, used, dtype, **options):
    inputs, options = make_window(queries, keys, used, **options)
    batch, heads = inputs["q"].shape[0], inputs["q"].shape[2]
    weights = torch.randn(inputs["q"].shape).to(dtype).double(), torch.randn(batch, heads, queries)
    given = {name: x.to(dtype).double() for name, x in inputs.items()}
    exact = with_gradients(lambda x: expected(x, options, torch.float64), narrowed(given, torch.float64), weights)
    yardstick = with_gradients(lambda x: expected(x, options, dtype), narrowed(given, dtype), weights)
    found = with_gradients(lambda x: run(x, options), narrowed(given, dtype), weights)
    for name, ours, theirs, right in zip(("out", "lse", *inputs), found, yardstick, exact, strict=True):
        if name == "lse":
            torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)
        else:
            assert_within_tolerance(ours, theirs, right, name)


@settings(max_examples=12)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from([(1, 40), (9, 5), (20, 33), (70, 64), (70, 133)]),
    st.sampled_from([None, (EMPTY,), (ALL,), (1,), (60,)]),
    st.booleans(),
    st.sampled_from([None, 1, 16]),
    st.integers(0, 99),
)
def test_odd_sizes(dtype, sizes, used, causal, bank, seed):
    """Queries see what is theirs, forward and backward; keys that are not valid are NaN. bank: its query group."""
    torch.manual_seed(seed)
    check(*sizes, used, dtype, bank=bank is not None, query_group=bank or 16, seed=seed, causal=causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_before_at_and_after_the_diagonal(dtype):
    torch.manual_seed(0)
    check(150, 290, (270,), dtype, heads=(1, 1))


def test_the_walk_ends_where_the_tile_sees_nothing_more():
    """Keys after the diagonal tiles are not read: they may be NaN for the queries before."""
    q, k, v = (torch.randn(1, 256, 1, 16) for _ in range(3))
    clean = memflow_ops.memory_attention(q, k, v, causal=True, impl="triton", dense_backend="own")
    k[:, 128:], v[:, 128:] = torch.nan, torch.nan
    dirty = memflow_ops.memory_attention(q, k, v, causal=True, impl="triton", dense_backend="own")
    assert torch.equal(clean[:, :128], dirty[:, :128])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("group", "blocks"), [(1, 4), (4, 4), (4, 300)])
@pytest.mark.parametrize("top_k", [3, 40])
def test_each_group_selects_as_if_it_were_alone(dtype, group, blocks, top_k):
    torch.manual_seed(1)
    frames, groups = 3, -(-18 // group)
    q = torch.randint(-1, 2, (1, 18, 2, 16)).to(dtype)
    descriptors = torch.randint(-1, 2, (1, frames * blocks, 1, 16)).to(dtype)
    descriptors[:, 1] = torch.nan
    counts = torch.randint(-1, frames + 2, (1, 2 * groups), dtype=torch.int32)[:, ::2]
    options = dict(blocks_per_frame=blocks, top_k=top_k)
    found = memflow_ops.select_blocks(q, descriptors, query_group=group, memory_frames=counts, impl="triton", **options)
    assert torch.equal(found, groups_one_by_one(q, descriptors, counts, group, impl="reference", **options))


@pytest.mark.parametrize("moba", [moba_folded, moba_by_query])
def test_moba(moba):
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 48, heads, 16) for heads in (2, 1, 1))
    right = moba_in_loops(*(x.double() for x in (q, k, v)), 16, 1)
    torch.testing.assert_close(moba(q, k, v, 16, 1, "triton").double(), right, rtol=0, atol=1e-5)
