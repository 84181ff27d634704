"""Selection and the attention to what it chose, against the reference in float64.

Queries and descriptors are integers and the lengths of groups powers of two, so that means and scores are exact and
selections are equal, ties included; keys and values are not integers. What the reference does not select is NaN.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import memflow_ops as ops
from memflow_ops.geometry import Geometry
from memflow_ops.impl import reference, triton
from memflow_ops.impl.reference import attention
from memflow_ops.kernels import configs
from memflow_ops.kernels.attention.plan import attend, plan_attend
from memflow_ops.kernels.launch import run_all
from memflow_ops.kernels.selection import groups
from memflow_ops.kernels.selection.groups import plan_select

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def short_spans(monkeypatch):
    """A bank of a few dozen blocks is large: several spans, and candidates from each."""
    for module in (configs, groups):
        monkeypatch.setattr(module, "SPAN_BLOCKS", 32)


def arguments_of(dtype, *, batch=1, heads=(2, 1), head_dim=16, queries=(16, 40), bank=(3, 37, 16), top_k=4,
                 dense=0, partly=False, slots=False, resume=False):  # fmt: skip
    (group, length), (frames, frame_tokens, block_size), (q_heads, kv_heads) = queries, bank, heads
    blocks_per_frame, physical = -(-frame_tokens // block_size), frames + 2 if slots else frames
    make = lambda tokens: torch.randn(batch, tokens, kv_heads, head_dim).to(dtype)  # noqa: E731
    arguments = dict(
        q=torch.randint(-1, 2, (batch, length, q_heads, head_dim)).to(dtype),
        k=make(dense) if dense else None,
        v=make(dense) if dense else None,
        memory_k=make(physical * frame_tokens),
        memory_v=make(physical * frame_tokens),
        descriptors=torch.randint(-2, 3, (batch, physical * blocks_per_frame, kv_heads, head_dim)).to(dtype),
        top_k=top_k,
        memory_frames=torch.randint(-1, frames + 2, (batch,), dtype=torch.int32) if partly else None,
        memory_slots=torch.randint(-1, physical + 1, (batch, frames), dtype=torch.int32) if slots else None,
        block_size=block_size,
        frame_tokens=frame_tokens,
        query_group=group,
        softmax_scale=head_dim**-0.5,
        resume_out=torch.randn(batch, length, q_heads, head_dim).to(dtype) if resume else None,
        resume_lse=torch.randn(batch, q_heads, length) if resume else None,
    )
    indices = exact(arguments)[2]
    used = torch.zeros(batch, physical * frame_tokens, kv_heads, dtype=torch.bool)
    tiles = attention.tiles(arguments["q"], None, arguments["memory_k"], indices, geometry_of(arguments))
    for b, _rows, _head, kv_head, tokens, *_ in tiles:
        used[b, tokens, kv_head] = True
    for name in ("memory_k", "memory_v"):
        arguments[name][~used] = torch.nan
    return arguments


def geometry_of(arguments):
    names = ("block_size", "frame_tokens", "query_group", "softmax_scale", "memory_slots", "memory_frames")
    return Geometry(**{name: arguments[name] for name in names})


def exact(arguments):
    """out, lse and indices of the reference."""
    return call(reference, arguments)


def call(implementation, arguments):
    indices = select(implementation.select_blocks, arguments)
    return (*over(indices, implementation.attend, arguments), indices)


def select(run, arguments):
    return run(arguments["q"], arguments["descriptors"], arguments["top_k"], geometry_of(arguments))


def over(indices, run, arguments, **more):
    resume = None if arguments["resume_out"] is None else (arguments["resume_out"], arguments["resume_lse"])
    tensors = (arguments[name] for name in ("q", "k", "v", "memory_k", "memory_v"))
    return run(*tensors, indices, geometry_of(arguments), resume, **more)


def check(arguments, got=None):
    out, lse, indices = call(triton, arguments) if got is None else got
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in arguments.items()}
    expected_out, expected_lse, expected_indices = exact(wide)
    assert torch.equal(indices, expected_indices)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[out.dtype]
    torch.testing.assert_close(out.double(), expected_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@settings(max_examples=8)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([16, 24, 64]),
    st.sampled_from([(1, 20), (2, 33), (32, 40), (64, 96), (200, 64)]),
    st.sampled_from([(1, 20, 20), (3, 37, 16), (4, 10, 3), (20, 9, 4), (2, 7, 100)]),
    st.integers(1, 9),
    st.sampled_from([0, 33]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_odd_shapes(dtype, batch, heads, head_dim, queries, bank, top_k, dense, partly, slots, resume, seed):
    torch.manual_seed(seed)
    arguments = arguments_of(
        dtype, batch=batch, heads=heads, head_dim=head_dim, queries=(min(queries), queries[1]),
        bank=(bank[0], bank[1], min(bank[1:])), top_k=top_k, dense=dense, partly=partly, slots=slots, resume=resume,
    )  # fmt: skip
    check(arguments)


@pytest.mark.parametrize(("frames", "rounds"), [(4, []), (9, ["merge_kernel"])])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bank_of_several_spans_takes_another_round(dtype, frames, rounds):
    torch.manual_seed(1)
    arguments = arguments_of(
        dtype, batch=2, heads=(2, 1), queries=(64, 80), bank=(frames, 37, 8), top_k=7, dense=20, partly=True, slots=True
    )
    launches, indices = select(plan_select, arguments)
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == ["block_means_kernel", "span_kernel", *rounds]
    run_all(launches)
    check(arguments, (*over(indices, attend, arguments), indices))


def test_every_split_of_a_tile_reads_the_same_selection(monkeypatch):
    """Ties and an empty bank are among what was selected."""
    monkeypatch.setattr(configs, "SPLIT_ROWS", 64)
    monkeypatch.setattr(configs, "SPLIT_SAVES_KEYS", 1)
    torch.manual_seed(2)
    arguments = arguments_of(
        torch.bfloat16, batch=2, heads=(1, 1), queries=(64, 150), bank=(5, 37, 8), top_k=9, partly=True, slots=True,
        resume=True,
    )  # fmt: skip
    assert arguments["memory_frames"].clamp(min=0).tolist() == [0, 4]
    indices = select(triton.select_blocks, arguments)
    planned, *got = over(indices, plan_attend, arguments, multiprocessors=20)
    assert planned[-1].kernel.fn.__name__ == "merge_splits_kernel" and planned[-1].arguments["SPLITS"] == 3
    run_all(planned)
    check(arguments, (*got, indices))


def test_a_tie_between_means_of_a_group_of_120():
    """Sums of 360 and 120 over 120 queries are means of exactly 3 and 1: both blocks score 3, and the first one wins.

    360 times the rounded reciprocal of 120 would be 3.0000002.
    """
    arguments = arguments_of(torch.bfloat16, heads=(1, 1), queries=(120, 120), bank=(1, 32, 16), top_k=1)
    arguments["q"].zero_()[..., 0] = 3
    arguments["q"][..., 1] = 1
    arguments["descriptors"].zero_()[0, :, 0, :2] = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    for name in ("memory_k", "memory_v"):
        arguments[name] = torch.randn_like(arguments[name])
    assert select(triton.select_blocks, arguments).flatten().tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_neighbour_chose_does_not_matter(dtype):
    """Rows of a tile walk over the blocks of all of them: what is not finite stays with the rows that chose it."""
    torch.manual_seed(2)
    q, memory = torch.randn(1, 40, 1, 16).to(dtype), torch.randn(1, 128, 1, 16).to(dtype)
    indices = torch.rand(1, 1, 40, 7).argsort(-1)[..., :3].sort(-1).values.to(torch.int32)
    geometry = Geometry(block_size=16, frame_tokens=128, query_group=1, softmax_scale=0.25)
    clean, _ = attend(q, None, None, memory, memory, indices, geometry)
    indices[0, 0, 11, 2] = 7  # the only row that chooses the last block
    for poison in (torch.nan, torch.inf):
        k, v = memory.clone(), memory.clone()
        v[:, 112:, :, 3] = poison
        got, lse = attend(q, None, None, k, v, indices, geometry)
        others = torch.arange(40) != 11
        assert torch.equal(got[:, others], clean[:, others])
        assert not got[0, 11, 0, 3].isfinite() and got[0, 11, 0, :3].isfinite().all()
        k[:, 112:] = poison
        got, lse = attend(q, None, None, k, v, indices, geometry)
        assert torch.equal(got[:, others], clean[:, others]) and lse[:, :, others].isfinite().all()


def test_lists_of_rows_in_any_order():
    torch.manual_seed(3)
    q, memory = torch.randn(1, 20, 1, 16), torch.randn(1, 96, 1, 16)
    indices = torch.randint(-3, 9, (1, 1, 20, 6), dtype=torch.int32)  # twice, out of range, in no order
    indices[..., 2] = 2**31 - 1
    geometry = Geometry(block_size=16, frame_tokens=48, query_group=1, softmax_scale=0.25)
    got = attend(q, None, None, memory, memory, indices, geometry)
    expected = attention.attend(q, None, None, memory, memory, indices, geometry)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "cpu", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_continues_a_dense_backend(dtype, backend):
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, 20, heads, 16).to(dtype) for heads in (4, 2, 2))
    memory_k, memory_v = torch.randn(2, 2, 60, 2, 16).to(dtype)
    descriptors = torch.randint(-2, 3, (2, 4, 2, 16)).to(dtype)
    options = dict(memory_descriptors=descriptors, top_k=3, block_size=16, frame_tokens=30, query_group=20,
                   return_lse=True)  # fmt: skip
    got = ops.memory_attention(q, k, v, memory_k, memory_v, impl="triton", dense_backend=backend, **options)
    expected = ops.memory_attention(q, k, v, memory_k, memory_v, impl="reference", **options)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(got[0], expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=1e-5)
    window = ops.memory_attention(q, k, v, impl="triton", dense_backend=backend, return_lse=True)
    expected = ops.memory_attention(q, k, v, impl="reference", return_lse=True)
    torch.testing.assert_close(window[0], expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(window[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 9])
def test_the_op_is_registered_rightly(group):
    q, k = torch.randn(1, 9, 1, 16), torch.randn(1, 24, 1, 16)
    descriptors, frames = torch.randn(1, 6, 1, 16), torch.tensor([1], dtype=torch.int32)
    slots = torch.tensor([[1, 0]], dtype=torch.int32)
    used = torch.tensor([20], dtype=torch.int32)
    sizes = (2, 4, 12, group, 0.25, True)
    bank = (k, k, None, descriptors, None, None)  # neither a second query nor int8
    arguments = (q, k, k, *bank, frames, slots, used, slots, *sizes, "mean", "triton", "auto")
    result = opcheck(torch.ops.memflow_ops.memory_attention.default, arguments)
    assert set(result.values()) == {"SUCCESS"}
