"""What selections keep, against cases worked out by hand and against the op itself."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memflow_ops import describe_blocks, memory_attention, select_blocks
from memflow_ops.model.selection_profile import quality
from memflow_ops.model.selection_profile.quality import Choice, SampledCall, budgets, choices_to_compare, measure_call


def random_call(
    heads=2, queries=11, window=5, frames=3, tokens=7, size=4, rows=None, seed=0, whole=False
) -> SampledCall:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        x = 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.round() if whole else x

    rows = torch.arange(queries) if rows is None else torch.tensor(rows)
    q, k, v = draw(heads, queries, size), draw(heads, window, size), draw(heads, window, size)
    return SampledCall(q, rows, k, v, draw(heads, frames, tokens, size), draw(heads, frames, tokens, size))


def as_op(x: torch.Tensor) -> torch.Tensor:
    """(H, ..., D) -> (1, tokens, H, D)."""
    return x.flatten(1, -2).transpose(0, 1)[None]


def test_a_case_by_hand():
    """One query 1 in one dimension, so that a key log(w) has weight w: the window 2, frames of three tokens (1, 5, 2)
    and (3, 1, 4); blocks of two, the last of a frame short: 6, 2, 4, 4 of 18. By their mean keys log(5) / 2, log(2),
    log(3) / 2 and log(4) they rank 3, 0, 1, 2."""
    weights = torch.tensor([[[1, 5, 2], [3, 1, 4]]], dtype=torch.float64)
    values = torch.tensor([[[1.0], [1], [9]], [[0], [0], [18]]], dtype=torch.float64)[None]
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    call = SampledCall(
        one, torch.tensor([0]), one * torch.tensor(2.0).double().log(), one * 0, weights.log()[..., None], values
    )
    found = measure_call(call, [Choice(blocks, 2, 1) for blocks in ("top", "oracle")])
    top, oracle = found.values()
    assert top.budgets == oracle.budgets == [0, 1, 2, 3, 4] and top.queries == 1
    expected = {"top": [0, 4, 10, 12, 16], "oracle": [0, 6, 10, 14, 16]}
    for measured, masses in zip((top, oracle), expected.values(), strict=True):
        torch.testing.assert_close(18 * measured.captured[:, 0], torch.tensor(masses, dtype=torch.float64))
        torch.testing.assert_close(18 * measured.bank, torch.tensor([16.0], dtype=torch.float64))
    assert top.keys[:, 0].tolist() == [0, 1, 3, 4, 6] and oracle.keys[:, 0].tolist() == [0, 2, 4, 5, 6]
    dense = (6 + 18 + 72) / 18
    outs = [0, 72 / 6, (72 + 6) / 12, (72 + 6 + 18) / 14, dense]
    torch.testing.assert_close(top.error[:, 0], torch.tensor([(out - dense) ** 2 for out in outs]).double())
    torch.testing.assert_close(top.dense, torch.tensor([dense**2]).double())


def test_a_group_is_judged_as_a_whole():
    """Two queries that want different blocks: alone each gets its own, together they must share one."""
    q = torch.tensor([[[4.0, 0], [0, 3]]], dtype=torch.float64)
    bank = torch.tensor([[[[2.0, 0]], [[0, 2]]]], dtype=torch.float64)
    call = SampledCall(q, torch.arange(2), q[:, :0], q[:, :0], bank, bank)
    alone, together = measure_call(call, [Choice("oracle", 1, 1), Choice("oracle", 1, 2)]).values()
    first, second = (torch.tensor([score, 0.0]).double().softmax(0) for score in (8 / 2**0.5, 6 / 2**0.5))
    torch.testing.assert_close(alone.captured[1], (first[:1] + second[:1]))
    torch.testing.assert_close(together.captured[1], (first[:1] + second[1:]))


sizes = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 2),
        "queries": st.integers(1, 9),
        "window": st.integers(0, 4),
        "frames": st.integers(1, 3),
        "tokens": st.integers(1, 7),
        "seed": st.integers(0, 99),
    }
)


@pytest.mark.parametrize("ranking, score, moments", [("top", "mean", 1), ("moments", "moments", 2)])
@given(sizes=sizes, block=st.integers(1, 7), group=st.one_of(st.none(), st.integers(1, 5)))
def test_what_is_measured_is_what_the_op_does(ranking, score, moments, sizes, block, group):
    """Every budget against the op, its reference in float64; means of whole numbers, so that their scores tie."""
    call = random_call(**sizes, whole=ranking == "top")
    block = min(block, sizes["tokens"])
    (measured,) = measure_call(call, [Choice(ranking, block, group)]).values()
    q, k, v, bank_k, bank_v = (as_op(x) for x in (call.q, call.k, call.v, call.bank_k, call.bank_v))
    options = {"block_size": block, "frame_tokens": sizes["tokens"], "query_group": group, "impl": "reference"}
    options["score"] = score
    out = {n: memory_attention(q, k, v, bank_k, bank_v, top_k=n, **options) for n in measured.budgets[1:]}
    dense = out[measured.budgets[-1]]
    p = torch.softmax(q[0].transpose(0, 1) @ torch.cat([k, bank_k], 1)[0].permute(1, 2, 0) / 2, -1)
    masses = p[..., sizes["window"] :].unflatten(-1, (sizes["frames"], -1)).split(block, -1)
    table = torch.stack([part.sum(-1) for part in masses], -1).flatten(2)  # [H, n, N]
    descriptors = describe_blocks(bank_k, block, sizes["tokens"], moments=moments)
    for i, top_k in enumerate(measured.budgets[1:], 1):
        error = (out[top_k] - dense).square().sum((0, 1, 3))
        torch.testing.assert_close(measured.error[i], error, rtol=1e-9, atol=1e-12)
        chosen = select_blocks(q, descriptors, top_k, **options)[0].long()  # [H, G, K]
        per_query = chosen.repeat_interleave(group or sizes["queries"], 1)[:, : sizes["queries"]]
        captured = table.gather(2, per_query).sum((1, 2))
        torch.testing.assert_close(measured.captured[i], captured, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(measured.dense, dense.square().sum((0, 1, 3)))


@given(sizes=sizes, block=st.integers(1, 7), group=st.one_of(st.none(), st.integers(1, 5)))
def test_nothing_captures_more_than_the_oracle(sizes, block, group):
    call = random_call(**sizes)
    block = min(block, sizes["tokens"])
    compared = [Choice("top", block, group), Choice("oracle", block, group)]
    compared += [Choice("random", block, 1), Choice("oracle", block, 1)]
    found = measure_call(call, compared, torch.Generator().manual_seed(1))
    top, oracle, at_random, finest = (found[choice] for choice in compared)
    assert (oracle.captured >= top.captured - 1e-12).all()
    assert (finest.captured >= at_random.captured - 1e-12).all()
    assert (finest.captured >= oracle.captured - 1e-12).all()
    for measured in (top, oracle, at_random, finest):
        assert (measured.captured.diff(dim=0) >= -1e-12).all() and not measured.captured[0].any()
        # all blocks: everything captured and no error, exactly
        assert torch.equal(measured.captured[-1], measured.bank) and not measured.error[-1].any()
        assert (measured.keys[-1] == len(call.measured) * call.bank_tokens).all()


def test_the_loudest_part_of_a_group_has_one_vote():
    """64 queries give nearly all of their mass to the first of four keys, 32 others to the third, eight times as loud.
    Every query has a mass of 1 to give, so the first key has two thirds of it; by moments the loud part outvotes it."""
    quiet, loud = torch.tensor([4.0, 0, 0, 0]), torch.tensor([0, 0, 32.0, 0])
    bank = 5 * torch.eye(4, dtype=torch.float64)[None, :, None]
    q = torch.stack([quiet] * 64 + [loud] * 32).double()[None]
    call = SampledCall(q, torch.arange(96), q[:, :0], q[:, :0], bank, bank)
    rankings = [Choice(blocks, 1, None) for blocks in ("moments", "normalised", "oracle")]
    moments, normalised, oracle = (found.captured[1, 0].item() for found in measure_call(call, rankings).values())
    assert normalised == oracle == pytest.approx(64, abs=0.1)
    assert moments == pytest.approx(32, abs=0.1)


@pytest.mark.parametrize(("group", "queries"), [(None, 70), (40, 100)])
def test_normalised_choices_are_those_of_the_op(group, queries):
    """Groups of several parts; frames have a short last block."""
    call = random_call(heads=2, queries=queries, window=3, frames=3, tokens=5)
    choice = Choice("normalised", 4, group)
    (measured,) = measure_call(call, [choice]).values()
    descriptors = describe_blocks(as_op(call.bank_k), 4, 5, moments=2)
    p = torch.softmax(call.q @ torch.cat([call.k, call.bank_k.flatten(1, 2)], 1).mT / 2, -1)[..., 3:]
    masses = torch.stack([part.sum(-1) for part in p.split([4, 1] * 3, -1)], -1)  # [H, n, N]
    for i, top_k in enumerate(measured.budgets[1:], 1):
        options = {"query_group": group, "block_size": 4, "frame_tokens": 5, "impl": "reference"}
        chosen = select_blocks(as_op(call.q), descriptors, top_k, score="normalised", **options)[0].long()
        per_query = chosen.repeat_interleave(group or queries, 1)[:, :queries]
        torch.testing.assert_close(measured.captured[i], masses.gather(2, per_query).sum((1, 2)))


def test_the_oracle_is_the_best_choice_there_is():
    """Of all sets of blocks, tried one by one."""
    call = random_call(heads=1, queries=3, frames=2, tokens=4)
    (oracle,) = measure_call(call, [Choice("oracle", 2, None)]).values()
    (alone,) = measure_call(call, [Choice("top", 2, 1)]).values()
    p = torch.softmax(call.q @ torch.cat([call.k, call.bank_k.flatten(1, 2)], 1).mT / 2, -1)
    masses = p[0, :, 5:].unflatten(-1, (4, 2)).sum((0, 2))
    for i, k in enumerate(oracle.budgets):
        best = max(masses[list(some)].sum().item() for some in itertools.combinations(range(4), k))
        assert oracle.captured[i, 0].item() == pytest.approx(best)
    assert oracle.bank.item() == pytest.approx(alone.bank.item())


def test_random_choices_capture_their_share():
    """And are drawn anew for every query: no luck of one draw."""
    call = random_call(heads=4, queries=200, frames=4, tokens=8)
    (measured,) = measure_call(call, [Choice("random", 2, 1)], torch.Generator().manual_seed(0)).values()
    shares = (measured.captured.sum(1) / measured.bank.sum()).tolist()
    assert shares == pytest.approx([k / 16 for k in measured.budgets], abs=0.03)


def test_a_part_of_the_queries(monkeypatch):
    """Only their sums, whatever the step; the groups' means are of all queries."""
    every, some = random_call(), random_call(rows=[4, 5, 6, 7])
    compared = [Choice("top", 3, 4), Choice("oracle", 3, 4), Choice("top", 3, 1), Choice("top", 7, None)]
    whole, part = measure_call(every, compared), measure_call(some, compared)
    rest = measure_call(random_call(rows=[0, 1, 2, 3, 8, 9, 10]), compared)
    monkeypatch.setattr(quality, "ELEMENTS", 1)
    by_one = measure_call(some, compared)
    for choice in compared:
        for name in ("captured", "bank", "error", "dense", "keys"):
            torch.testing.assert_close(getattr(by_one[choice], name), getattr(part[choice], name))
            both = getattr(part[choice], name) + getattr(rest[choice], name)
            torch.testing.assert_close(both, getattr(whole[choice], name))


def test_half_precisions_are_measured_in_float32():
    call = random_call()
    half = SampledCall(*(x if x.dtype == torch.int64 else x.bfloat16() for x in vars(call).values()))
    rounded = SampledCall(*(x if x.dtype == torch.int64 else x.bfloat16().double() for x in vars(call).values()))
    choice = Choice("oracle", 2, 1)
    torch.testing.assert_close(
        measure_call(half, [choice])[choice].error, measure_call(rounded, [choice])[choice].error, rtol=1e-3, atol=0
    )


def test_budgets_run_from_nothing_to_all():
    assert budgets(1) == [0, 1] and budgets(6) == [0, 1, 2, 3, 4, 6]
    assert budgets(25) == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 25]


def test_what_is_compared():
    found = choices_to_compare([4, 8], [1, None], 8)
    assert len(set(found)) == len(found) == 2 + 4 * 3 + 2  # normalised for the chunk alone
    assert Choice("top", 8, None) in found, "frames by their means for the whole chunk"
    assert choices_to_compare([4], [2], 8)[-5:] == [
        Choice("random", 8, 1),
        Choice("top", 8, None),
        Choice("moments", 8, None),
        Choice("normalised", 8, None),
        Choice("oracle", 8, None),
    ]


@pytest.mark.parametrize(
    ("blocks", "groups", "says"),
    [
        ([], [1], "at least one block_size"),
        ([4], [], "at least one query_group"),
        ([0], [1], "block_size must be a positive number, got 0"),
        ([4], [-2], "query_group must be a positive number, got -2"),
        ([4, 9], [1], "inside a frame of 8 tokens, got block_size=9"),
        ([2.5], [1], "positive number"),
    ],
)
def test_impossible_sizes_are_refused(blocks, groups, says):
    with pytest.raises(ValueError, match=says):
        choices_to_compare(blocks, groups, 8)
