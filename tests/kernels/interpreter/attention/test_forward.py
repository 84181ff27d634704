"""Attention over a dense segment and selected blocks against the reference in float64.

Half precisions may be off by twice the error of PyTorch's dense attention in the same dtype over the same keys, plus
two roundings of the largest output; float32 by 1e-5. Whatever is not selected is NaN.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from memflow_ops.geometry import Geometry
from memflow_ops.impl.reference import attention as reference_attention
from memflow_ops.kernels import configs
from memflow_ops.kernels.attention.plan import attend, plan_attend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ascending_selection(shape, top_k, blocks):
    """A random subset of the blocks for each group, at most top_k, ascending, then -1."""
    chosen = torch.rand(*shape, blocks).argsort(-1)[..., :top_k]
    chosen[torch.rand(chosen.shape) < 0.2] = blocks  # out of the selection
    chosen = chosen.sort(-1).values
    return torch.where(chosen == blocks, -1, chosen).to(torch.int32)


def case(
    dtype, *, batch=1, heads=(2, 1), head_dim=16, queries=(8, 20), dense=0, bank=(3, 37, 16), top_k=4, slots=False
):
    """Arguments of a launch, with NaN in each batch and key head wherever no group of its heads has selected."""
    (group, length), (frames, frame_tokens, block_size), (q_heads, kv_heads) = queries, bank, heads
    blocks_per_frame = -(-frame_tokens // block_size) if frames else 0
    physical = frames + 2 if slots else frames
    arguments = dict(
        q=torch.randn(batch, length, q_heads, head_dim).to(dtype),
        k=torch.randn(batch, dense, kv_heads, head_dim).to(dtype) if dense else None,
        v=torch.randn(batch, dense, kv_heads, head_dim).to(dtype) if dense else None,
        memory_k=torch.randn(batch, physical * frame_tokens, kv_heads, head_dim).to(dtype) if frames else None,
        memory_v=torch.randn(batch, physical * frame_tokens, kv_heads, head_dim).to(dtype) if frames else None,
        indices=ascending_selection((batch, q_heads, -(-length // group)), top_k, frames * blocks_per_frame),
        block_size=block_size,
        frame_tokens=frame_tokens,
        query_group=group,
        softmax_scale=head_dim**-0.5,
        memory_slots=torch.randint(-1, physical + 1, (batch, frames), dtype=torch.int32) if slots else None,
        resume_out=None,
        resume_lse=None,
    )
    if frames:
        used = torch.zeros(batch, physical * frame_tokens, kv_heads, dtype=torch.bool)
        for b, _rows, _head, kv_head, tokens, *_ in groups(arguments):
            used[b, tokens, kv_head] = True
        for name in ("memory_k", "memory_v"):
            arguments[name][~used] = torch.nan
    return arguments


def groups(arguments):
    names = ("q", "k", "memory_k", "indices")
    return reference_attention.tiles(*(arguments[name] for name in names), geometry_of(arguments))


def geometry_of(arguments):
    names = ("block_size", "frame_tokens", "query_group", "softmax_scale", "memory_slots")
    return Geometry(**{name: arguments[name] for name in names})


def tensors_of(arguments):
    return [arguments[name] for name in ("q", "k", "v", "memory_k", "memory_v")]


def resume_of(arguments):
    return None if arguments["resume_out"] is None else (arguments["resume_out"], arguments["resume_lse"])


def launch(arguments):
    return attend(*tensors_of(arguments), arguments["indices"], geometry_of(arguments), resume_of(arguments))


def exact(arguments):
    """out and lse in float64."""
    widened = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in arguments.items()}
    indices, geometry = widened["indices"], geometry_of(widened)
    return reference_attention.attend(*tensors_of(widened), indices, geometry, resume_of(widened))


def dense_error(arguments, out):
    """The largest error of PyTorch's dense attention in this dtype, group by group over the same keys."""
    q, scale, worst = arguments["q"], arguments["softmax_scale"], 0.0
    for tile in groups(arguments):
        b, rows, h = tile[:3]
        keys = reference_attention.gather(arguments["k"], arguments["memory_k"], tile)
        values = reference_attention.gather(arguments["v"], arguments["memory_v"], tile)
        if len(keys):
            got = F.scaled_dot_product_attention(q[b, rows, h][None], keys[None], values[None], scale=scale)[0]
            worst = max(worst, (got.double() - out[b, rows, h]).abs().max().item())
    return worst


def check(arguments, got=None, extra_roundings=0):
    out, lse = launch(arguments) if got is None else got
    expected_out, expected_lse = exact(arguments)
    dtype = arguments["q"].dtype
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.shape == expected_out.shape and lse.shape == expected_lse.shape
    limit = 1e-5
    if dtype != torch.float32:
        rounding = torch.finfo(dtype).eps / 2 * expected_out.abs().max().item()
        limit = 2 * dense_error(arguments, expected_out) + (2 + extra_roundings) * rounding
    error = (out.double() - expected_out).abs().max().item()
    assert error <= limit, f"error {error:.2e}, allowed {limit:.2e}"
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)


@settings(max_examples=40)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.sampled_from([16, 40, 64, 72, 80, 96, 128, 256]),
    st.sampled_from([(1, 3), (4, 6), (16, 33), (20, 50), (63, 63), (128, 140), (200, 200)]),
    st.sampled_from([0, 1, 15, 64, 100]),
    st.sampled_from([(1, 20, 20), (3, 37, 16), (2, 100, 64), (4, 10, 3), (2, 7, 100), (1, 130, 65), (0, 1, 16)]),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 99),
)
def test_odd_shapes(dtype, batch, heads, head_dim, queries, dense, bank, top_k, slots, seed):
    torch.manual_seed(seed)
    if queries[0] == 1:  # one program per query: slow here
        heads, batch = (1, 1), 1
    check(case(dtype, batch=batch, heads=heads, head_dim=head_dim, queries=queries, dense=dense, bank=bank, top_k=top_k,
               slots=slots))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_size_of_the_shipped_tiles(dtype):
    torch.manual_seed(0)
    check(case(dtype, head_dim=128, queries=(128, 200), dense=70, bank=(2, 136, 64), top_k=5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_resume_continues_over_other_keys(dtype):
    torch.manual_seed(1)
    whole = case(dtype, head_dim=40, dense=50)
    none = dict(k=None, v=None)
    out, lse = launch({**whole, "memory_k": None, "memory_v": None})
    continued = launch({**whole, **none, "resume_out": out, "resume_lse": lse})
    check(whole, continued, extra_roundings=1)
    # in the other order, and with the state in float32
    out, lse = launch({**whole, **none})
    continued = launch({**whole, "memory_k": None, "memory_v": None, "resume_out": out.float(), "resume_lse": lse})
    check(whole, continued, extra_roundings=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "window", "launches"), [(4, 70, 2), (64, 1, 2), (64, 2, 1)])
def test_a_window_beside_short_blocks_or_of_one_key_takes_a_launch_of_its_own(dtype, group, window, launches):
    """The state between the two launches is float32: no rounding more than in one."""
    torch.manual_seed(12)
    arguments = case(dtype, queries=(group, 70), dense=window, bank=(2, 40, 8), slots=True, head_dim=40)
    arguments |= dict(resume_out=torch.randn(1, 70, 2, 40), resume_lse=torch.randn(1, 2, 70))
    steps, *got = plan_attend(
        *tensors_of(arguments), arguments["indices"], geometry_of(arguments), resume_of(arguments), multiprocessors=0
    )
    attending = [step.arguments for step in steps if step.kernel.fn.__name__ == "attend_kernel"]
    parts = [(x["memory"].k is not None, x["window"].k is not None) for x in attending]
    assert parts == ([(True, False), (False, True)] if launches == 2 else [(True, True)])
    assert attending[0]["out"].pointer.dtype == (torch.float32 if launches == 2 else dtype)
    run(steps)
    check(arguments, got)


def test_resume_from_nothing_and_into_nothing():
    torch.manual_seed(2)
    arguments = case(torch.float32, batch=2)
    fresh = launch(arguments)
    nothing = dict(resume_out=torch.full((2, 20, 2, 16), torch.nan), resume_lse=torch.full((2, 2, 20), -torch.inf))
    resumed = launch({**arguments, **nothing})
    assert torch.equal(resumed[0], fresh[0]) and torch.equal(resumed[1], fresh[1])
    state = dict(resume_out=torch.randn(2, 20, 2, 16), resume_lse=torch.randn(2, 2, 20))
    out, lse = launch({**arguments, **state, "indices": torch.full_like(arguments["indices"], -1)})
    torch.testing.assert_close(out, state["resume_out"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(lse, state["resume_lse"], atol=1e-6, rtol=1e-6)


def test_rows_without_a_key():
    arguments = case(torch.float32, queries=(8, 20))
    arguments["indices"][0, 1, 1] = -1
    out, lse = launch(arguments)
    assert (out[0, 8:16, 1] == 0).all() and (lse[0, 1, 8:16] == -torch.inf).all()
    check(arguments)
    for absent in ({"memory_k": None, "memory_v": None}, {"indices": arguments["indices"][..., :0]}):
        out, lse = launch({**arguments, **absent})
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_no_queries():
    out, lse = launch(case(torch.float32, queries=(8, 0), dense=5))
    assert out.shape == (1, 0, 2, 16) and lse.shape == (1, 2, 0)


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float64, 16), (torch.float32, 257)], ids=str)
def test_what_the_kernels_do_not_take_is_refused(dtype, head_dim):
    with pytest.raises(ValueError, match=f"head sizes up to 256, got {dtype} and {head_dim}"):
        launch(case(dtype, head_dim=head_dim))


def test_indices_out_of_range_are_skipped():
    torch.manual_seed(3)
    arguments = case(torch.float32, top_k=6, slots=True)
    wild = torch.tensor([-5, 9, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(1, 2, 3, 4)
    expected = launch(arguments)
    got = launch({**arguments, "indices": torch.cat([wild, arguments["indices"], wild], -1)})
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_selecting_everything_is_dense_attention():
    torch.manual_seed(4)
    arguments = case(torch.float32, batch=2, bank=(3, 37, 16), top_k=9)
    keys, values = torch.randn(2, 2, 111, 1, 16)
    everything = torch.arange(9, dtype=torch.int32).expand(2, 2, 3, 9)
    bank = launch({**arguments, "memory_k": keys, "memory_v": values, "indices": everything})
    dense = launch({**arguments, "memory_k": None, "memory_v": None, "k": keys, "v": values})
    torch.testing.assert_close(bank, dense, atol=2e-6, rtol=2e-6)


def test_large_scores_do_not_overflow():
    torch.manual_seed(5)
    arguments = case(torch.float32, dense=30)
    arguments["q"] = arguments["q"] * 300
    out, lse = launch(arguments)
    expected_out, expected_lse = exact(arguments)
    torch.testing.assert_close(out.double(), expected_out, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-6)
    assert lse.abs().max() > 500


@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_that_are_not_positive(dtype, scale):
    torch.manual_seed(7)
    check({**case(dtype, dense=20), "softmax_scale": scale})


def test_any_strides_and_the_same_bits_twice():
    torch.manual_seed(6)
    arguments = case(torch.bfloat16, batch=2, heads=(4, 2), dense=33, queries=(8, 21), slots=True)
    plain = launch(arguments)

    def scattered(x):
        """The same values with every stride different, the last dimension contiguous."""
        room = torch.full((x.shape[2] + 1, x.shape[1] + 2, x.shape[0], 3 * x.shape[3]), torch.nan, dtype=x.dtype)
        view = room.permute(2, 1, 0, 3)[:, 1:-1, 1:, x.shape[3] : 2 * x.shape[3]]
        view.copy_(x)
        return view

    moved = {name: scattered(arguments[name]) for name in ("q", "k", "v", "memory_k", "memory_v")}
    moved["indices"] = arguments["indices"].repeat_interleave(2, -1)[..., ::2]
    moved["memory_slots"] = arguments["memory_slots"].repeat(1, 2)[:, :3]
    got = launch({**arguments, **moved})
    assert torch.equal(got[0], plain[0]) and torch.equal(got[1], plain[1])


# The last wave of tiles split along their keys (kernels/attention/split.py).


@pytest.fixture
def small_tiles_split_too(monkeypatch):
    """A handful of tiles has a last wave to split, if few multiprocessors are asked for."""
    monkeypatch.setitem(configs.ATTEND_TILES, 90, {256: (16, 16, 8, 2)})
    monkeypatch.setattr(configs, "SPLIT_ROWS", 16)
    monkeypatch.setattr(configs, "SPLIT_SAVES_KEYS", 1)


splitting = pytest.mark.usefixtures("small_tiles_split_too")


def planned(arguments, multiprocessors):
    inputs = (*tensors_of(arguments), arguments["indices"], geometry_of(arguments), resume_of(arguments))
    return plan_attend(*inputs, multiprocessors=multiprocessors)


def run(launches):
    for launch in launches:
        launch.run()


def splits_of(launches):
    """Programs per tile of the last wave, 1 if nothing is split."""
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names in (["attend_kernel"], ["attend_kernel", "merge_splits_kernel"])
    return launches[-1].arguments["SPLITS"] if len(names) == 2 else 1


@splitting
@settings(max_examples=12)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.sampled_from([16, 40, 128]),
    st.sampled_from([(16, 33), (20, 50), (63, 63), (40, 40)]),
    st.sampled_from([(3, 37, 16), (4, 10, 3), (2, 100, 64), (2, 7, 100), (1, 130, 65)]),
    st.integers(2, 6),
    st.booleans(),
    st.integers(5, 40),
    st.booleans(),
    st.integers(0, 99),
)
def test_odd_shapes_split(dtype, batch, heads, head_dim, queries, bank, top_k, slots, multiprocessors, resume, seed):
    torch.manual_seed(seed)
    arguments = case(dtype, batch=batch, heads=heads, head_dim=head_dim, queries=queries, bank=bank, top_k=top_k,
                     slots=slots)  # fmt: skip
    if resume:
        arguments["resume_out"] = torch.randn(arguments["q"].shape).to(dtype)
        arguments["resume_lse"] = torch.randn(batch, heads[0], queries[1])
        arguments["resume_lse"][..., ::3] = -torch.inf
    launches, *got = planned(arguments, multiprocessors)
    attending = launches[0]
    tiles = attending.grid[1] * attending.grid[2] * attending.grid[0]
    if splits_of(launches) > 1:
        whole, splits = attending.arguments["partial"].whole_tiles, attending.arguments["SPLITS"]
        tiles = (attending.grid[0] - whole) // splits + whole
        assert whole % multiprocessors == 0 and 2 <= splits <= configs.MAX_SPLITS
        assert (tiles - whole) * splits <= multiprocessors, "the last wave is one"
    else:
        keys = top_k * arguments["block_size"]
        assert 2 * (tiles % multiprocessors) > multiprocessors or not tiles % multiprocessors or keys < 2
    run(launches)
    check(arguments, got)


@splitting
@pytest.mark.parametrize(("multiprocessors", "splits"), [(0, 1), (6, 1), (7, 2), (9, 8), (10, 1), (32, 3)])
def test_how_often_the_last_wave_of_ten_tiles_is_split(multiprocessors, splits):
    torch.manual_seed(1)
    arguments = case(torch.bfloat16, heads=(2, 2), queries=(16, 80), bank=(3, 37, 16), top_k=8, slots=True)
    launches, *got = planned(arguments, multiprocessors)
    assert splits_of(launches) == splits
    run(launches)
    check(arguments, got)


def test_no_split_where_it_does_not_pay(monkeypatch):
    monkeypatch.setattr(configs, "SPLIT_SAVES_KEYS", 512)
    monkeypatch.setattr(configs, "SPLIT_ROWS", 128)
    assert configs.splits_config(444, 1536, 128, 132) == (396, 2)
    assert configs.splits_config(444, 1536, 128, 108) == (432, 8)
    for tiles, keys, rows, multiprocessors in [
        (444, 1536, 128, 148),  # three whole waves
        (444, 1023, 128, 132),  # short lists
        (444, 1536, 64, 132),  # two programs to a multiprocessor
        (470, 1536, 128, 132),  # 74 in the last wave
        (444, 1536, 128, 0),  # no GPU
        (0, 1536, 128, 132),
        (444, 0, 128, 132),
    ]:
        assert configs.splits_config(tiles, keys, rows, multiprocessors) == (tiles, 1)
    monkeypatch.setattr(configs, "MAX_SPLITS", 1)
    assert configs.splits_config(444, 1536, 128, 132) == (444, 1)


@splitting
def test_what_cannot_be_split_is_not():
    torch.manual_seed(2)
    window = case(torch.bfloat16, dense=20, queries=(16, 80), top_k=8)
    rows = case(torch.bfloat16, queries=(2, 80), top_k=8)
    for arguments in (window, rows, {**window, "memory_k": None, "memory_v": None}):
        launches, *got = planned(arguments, 100)
        assert "merge_splits_kernel" not in [launch.kernel.fn.__name__ for launch in launches]
        run(launches)
        check(arguments, got)


@splitting
def test_fewer_blocks_than_splits_and_rows_without_a_key():
    """Programs that find nothing to do leave no trace, whether they have the state to continue or not."""
    torch.manual_seed(3)
    arguments = case(torch.float32, heads=(2, 2), queries=(16, 80), bank=(3, 37, 16), top_k=8)
    arguments["indices"][0, 0] = -1
    arguments["indices"][0, 1, 1, 1:] = -1
    arguments["indices"][0, 1, 2, :-1] = -1
    launches, out, lse = planned(arguments, 100)
    assert splits_of(launches) == 8
    run(launches)
    assert (out[:, :, 0] == 0).all() and (lse[:, 0] == -torch.inf).all()
    check(arguments, (out, lse))
    state = dict(resume_out=torch.randn(1, 80, 2, 16), resume_lse=torch.randn(1, 2, 80))
    launches, out, lse = planned({**arguments, **state}, 100)
    run(launches)
    torch.testing.assert_close(out[:, :, 0], state["resume_out"][:, :, 0], atol=1e-6, rtol=1e-6)
    check({**arguments, **state}, (out, lse))


@splitting
def test_splits_give_the_same_bits_twice_and_from_any_strides():
    torch.manual_seed(4)
    arguments = case(torch.bfloat16, batch=2, queries=(16, 20), top_k=6, slots=True)
    results = []
    for memory in ("memory_k", "memory_v", None):
        launches, *got = planned(arguments, 26)
        assert splits_of(launches) == 3
        for _ in range(2):  # as a graph replays them
            run(launches)
        results.append([x.clone() for x in got])
        if memory is not None:
            x = arguments[memory]
            arguments[memory] = torch.stack([torch.full_like(x, torch.nan), x], 2)[:, :, 1]
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@splitting
@pytest.mark.parametrize("block_size", [8, 48], ids="blocks{}".format)
def test_splits_of_blocks_shorter_and_longer_than_a_tile_of_keys(block_size):
    torch.manual_seed(6)
    arguments = case(torch.bfloat16, queries=(16, 40), head_dim=40, bank=(3, 136, block_size), top_k=7)
    launches, *got = planned(arguments, 15)
    assert splits_of(launches) == 2
    run(launches)
    check(arguments, got)


@pytest.mark.parametrize(
    ("dtype", "group", "length"), [(torch.bfloat16, 1, 9), (torch.bfloat16, 64, 80), (torch.float32, 64, 70)], ids=str
)
def test_absent_blocks_in_the_middle_of_a_list(dtype, group, length):
    """Lists with ragged blocks and entries that are no block, and head dimensions below the tile's."""
    torch.manual_seed(8)
    bank = (2, 150, 64) if dtype == torch.bfloat16 else (2, 50, 16)
    arguments = case(dtype, batch=2, heads=(2, 1), head_dim=24, queries=(group, length), bank=bank, top_k=4, slots=True)
    arguments["indices"][..., 1:3] = torch.tensor([-1, 99])
    check(arguments)


def test_memory_at_odd_addresses_and_of_odd_strides():
    torch.manual_seed(9)
    odd = case(torch.float32, head_dim=17)
    shifted = case(torch.float32)
    for name in ("memory_k", "memory_v"):
        moved = torch.cat([torch.zeros(1), shifted[name].flatten()])[1:]
        shifted[name] = moved.view_as(shifted[name])
    check(odd)
    check(shifted)
