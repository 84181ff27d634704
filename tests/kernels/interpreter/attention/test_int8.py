"""Attention to an int8 bank by the kernels, against the reference in float64 over the numbers that it stands for.

Half precisions may be off by twice the error of PyTorch's dense attention over these numbers in the same dtype, plus
two roundings of the largest output; float32 by 1e-5. Scales of what no group has selected are NaN.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from memflow_ops import describe_blocks, quantise_memory
from memflow_ops.geometry import Geometry, Int8Bank
from memflow_ops.impl.reference import attention as reference
from memflow_ops.kernels import configs
from memflow_ops.kernels.attention.plan import attend, plan_attend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(dtype, *, batch=1, heads=(2, 1), head_dim=16, queries=(8, 20), dense=0, bank=(3, 37, 16), top_k=4,
         slots=False, moments=1, unused=0.2):  # fmt: skip
    """Arguments of `attend`: q, k, v, int8 keys and values, indices and geometry."""
    (group, length), (frames, frame_tokens, block_size), (q_heads, kv_heads) = queries, bank, heads
    blocks, stored = -(-frame_tokens // block_size), frames + 2 if slots else frames
    make = lambda tokens, count: torch.randn(batch, tokens, count, head_dim).to(dtype)  # noqa: E731
    keys, values = make(stored * frame_tokens, kv_heads), make(stored * frame_tokens, kv_heads)
    keys[..., 0] += 5  # what all keys have in common
    descriptors = describe_blocks(keys, block_size, frame_tokens, moments=moments)
    made = quantise_memory(keys, values, descriptors, block_size=block_size, frame_tokens=frame_tokens)
    chosen = torch.rand(batch, q_heads, -(-length // group), frames * blocks).argsort(-1)[..., :top_k]
    chosen[torch.rand(chosen.shape) < unused] = frames * blocks
    chosen = chosen.sort(-1).values
    indices = torch.where(chosen == frames * blocks, -1, chosen).to(torch.int32)
    table = torch.randint(-1, stored + 1, (batch, frames), dtype=torch.int32) if slots else None
    window = (make(dense, kv_heads), make(dense, kv_heads)) if dense else (None, None)
    geometry = Geometry(block_size, frame_tokens, group, head_dim**-0.5, table)
    q = make(length, q_heads)
    k_scale, v_scale = hidden(q, made, indices, geometry)
    geometry = Geometry(
        block_size, frame_tokens, group, head_dim**-0.5, table, int8=Int8Bank(descriptors, k_scale, v_scale)
    )
    return [q, *window, *made[:2], indices, geometry]


def hidden(q, made, indices, geometry):
    """The scales, NaN where no group of their batch element and head has selected."""
    k_seen = torch.zeros(made.memory_k_scale.shape[:3], dtype=torch.bool)
    v_seen = torch.zeros(made.memory_v_scale.shape, dtype=torch.bool)
    for tile in reference.tiles(q, None, made.memory_k, indices, geometry):
        for token in tile.tokens:
            frame, within = divmod(token, geometry.frame_tokens)
            k_seen[tile.batch, frame * geometry.blocks_per_frame + within // geometry.block_size, tile.kv_head] = True
            v_seen[tile.batch, token, tile.kv_head] = True
    return (
        made.memory_k_scale.masked_fill(~k_seen.unsqueeze(-1), torch.nan),
        made.memory_v_scale.masked_fill(~v_seen, torch.nan),
    )


def widened(arguments):
    q, k, v, *bank, indices, geometry = arguments
    q, k, v = (None if x is None else x.double() for x in (q, k, v))
    sizes = (geometry.block_size, geometry.frame_tokens, geometry.query_group, geometry.softmax_scale)
    int8 = Int8Bank(*(x.double() for x in geometry.int8))
    return [q, k, v, *bank, indices, Geometry(*sizes, geometry.memory_slots, int8=int8)]


def dense_error(arguments, out):
    """The largest error of PyTorch's dense attention, group by group over the same numbers in the dtype of q."""
    q, worst = arguments[0], 0.0
    exact = widened(arguments)
    for tile in reference.tiles(q, exact[1], exact[3], exact[5], exact[6]):
        b, rows, h = tile[:3]
        keys, values = (x.to(q.dtype) for x in reference.keys_and_values(*exact[1:5], tile, exact[6]))
        if len(keys):
            scale = exact[6].softmax_scale
            got = F.scaled_dot_product_attention(q[b, rows, h][None], keys[None], values[None], scale=scale)[0]
            worst = max(worst, (got.double() - out[b, rows, h]).abs().max().item())
    return worst


def check(arguments, got=None, resume=None):
    out, lse = attend(*arguments, resume) if got is None else got
    wide = None if resume is None else (resume[0].double(), resume[1].double())
    expected_out, expected_lse = reference.attend(*widened(arguments), wide)
    dtype, limit = arguments[0].dtype, 1e-5
    assert out.dtype == dtype and lse.dtype == torch.float32
    if dtype != torch.float32:
        rounding = torch.finfo(dtype).eps / 2 * expected_out.abs().max().item()
        limit = 2 * dense_error(arguments, reference.attend(*widened(arguments))[0]) + 2 * rounding
    error = (out.double() - expected_out).abs().max().item()
    assert error <= limit, f"error {error:.2e}, allowed {limit:.2e}"
    # In a half precision the keys of the kernel are rounded once more than those of the reference.
    tolerance = 2e-5 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)


@settings(max_examples=16)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([16, 40, 72, 128]),
    st.sampled_from([(1, 3), (4, 6), (16, 33), (20, 50), (63, 63)]),
    st.sampled_from([0, 1, 15, 64]),
    st.sampled_from([(1, 20, 20), (3, 37, 16), (2, 100, 64), (4, 10, 3), (2, 7, 100), (1, 130, 65)]),
    st.integers(1, 9),
    st.booleans(),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_odd_shapes(dtype, batch, heads, head_dim, queries, dense, bank, top_k, slots, moments, seed):
    torch.manual_seed(seed)
    if queries[0] == 1:  # one program per query: slow here
        heads, batch = (1, 1), 1
    check(case(dtype, batch=batch, heads=heads, head_dim=head_dim, queries=queries, dense=dense, bank=bank, top_k=top_k,
               slots=slots, moments=moments))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_size_of_the_shipped_tiles(dtype):
    torch.manual_seed(0)
    check(case(dtype, head_dim=128, queries=(128, 140), dense=70, bank=(2, 136, 64), top_k=4, slots=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_continues_over_a_window(dtype):
    torch.manual_seed(1)
    arguments = case(dtype, head_dim=40)
    state = torch.randn(1, 20, 2, 40).to(dtype), torch.randn(1, 2, 20)
    check(arguments, resume=state)


@pytest.mark.parametrize("group", [1, 16], ids=["rows with lists of their own", "a list for all rows"])
def test_indices_out_of_range_are_skipped(group):
    torch.manual_seed(3)
    arguments = case(torch.float32, queries=(group, 20), top_k=6, slots=True, heads=(1, 1))
    expected = attend(*arguments)
    wild = torch.tensor([-5, 9, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(*arguments[5].shape[:3], 4)
    arguments[5] = torch.cat([wild, arguments[5], wild], -1)
    for ours, theirs in zip(attend(*arguments), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_without_a_table_blocks_beyond_the_bank_are_not_read():
    torch.manual_seed(4)
    arguments = case(torch.float32, unused=0.0)
    arguments[5] = torch.full_like(arguments[5], 9)  # one past the last
    out, lse = attend(*arguments)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_wave_split(dtype, monkeypatch):
    monkeypatch.setitem(configs.ATTEND_TILES, 90, {256: (16, 16, 8, 2)})
    monkeypatch.setattr(configs, "SPLIT_ROWS", 16)
    monkeypatch.setattr(configs, "SPLIT_SAVES_KEYS", 1)
    torch.manual_seed(5)
    arguments = case(dtype, batch=2, queries=(16, 33), bank=(4, 10, 3), top_k=6, slots=True)
    launches, *got = plan_attend(*arguments, multiprocessors=9)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["attend_kernel", "merge_splits_kernel"]
    for launch in launches:
        launch.run()
    check(arguments, got)


def test_any_strides():
    torch.manual_seed(6)
    arguments = case(torch.bfloat16, batch=2, heads=(2, 2), dense=17, queries=(8, 12), slots=True)
    plain = attend(*arguments)

    def scattered(x):
        """The same values with every stride different; the last dimension of what has four is contiguous."""
        room = torch.zeros((x.shape[2] + 1, x.shape[1] + 2, x.shape[0], *(3 * n for n in x.shape[3:])), dtype=x.dtype)
        view = room.permute(2, 1, 0, *range(3, x.dim()))[:, 1:-1, 1:]
        view = view[..., x.shape[3] : 2 * x.shape[3]] if x.dim() == 4 else view
        return view.copy_(x)

    *tensors, indices, geometry = arguments
    sizes = (geometry.block_size, geometry.frame_tokens, geometry.query_group, geometry.softmax_scale)
    int8 = Int8Bank(*map(scattered, geometry.int8))
    moved = attend(*map(scattered, tensors), indices, Geometry(*sizes, geometry.memory_slots, int8=int8))
    assert torch.equal(moved[0], plain[0]) and torch.equal(moved[1], plain[1])


def test_a_second_query_reads_it():
    torch.manual_seed(7)
    arguments = case(torch.float32, dense=17, slots=True, queries=(8, 12))
    q, k, v, *bank, indices, geometry = arguments
    memory_q = torch.randn_like(q)
    got = attend(*arguments, None, memory_q)
    state = attend(q, k, v, None, None, indices, geometry)
    check([memory_q, None, None, *bank, indices, geometry], got, resume=state)


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tile_is_of_one_block(capability, dtype):
    """All of its keys share a mean and a scale, whatever the head size and the query group."""
    for head_dim, group, block in product((16, 64, 128, 256), (1, 16, 64, 128, 4680), (16, 32, 64)):
        tiles, _, _ = configs.attend_config(capability, dtype, head_dim, group, 4680, int8_block=block)
        assert tiles["BLOCK_N"] <= block, (head_dim, group, block)
