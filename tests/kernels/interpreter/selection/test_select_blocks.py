"""Selections against the reference in float64: equal as sets, and listed ascending with -1 at the end."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_cases import MomentCase, assert_selected, moment_cases, normalised_cases

import memflow_ops
from memflow_ops.geometry import Geometry
from memflow_ops.impl.reference import selection
from memflow_ops.kernels.selection.groups import select_blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def geometry_of(query_group, memory_frames, memory_slots, blocks_per_frame):
    """Blocks of one token, so that a frame has as many tokens as blocks."""
    return Geometry(1, blocks_per_frame, query_group, 1.0, memory_slots, memory_frames)


def select(q, descriptors, top_k, *sizes):
    return select_blocks(q, descriptors, top_k, geometry_of(*sizes))


def expected_selection(q, descriptors, top_k, *sizes):
    return selection.select_blocks(q.double(), descriptors.double(), top_k, geometry_of(*sizes))


@settings(max_examples=25)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.sampled_from([16, 24, 40]),
    st.sampled_from([(1, 5), (1, 18), (8, 8), (8, 20), (16, 17), (32, 4)]),
    st.sampled_from([(1, 1), (2, 3), (5, 4), (3, 25)]),
    st.integers(1, 30),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_ties_on_integers(dtype, batch, heads, head_dim, queries, bank, top_k, partly, slots, seed):
    torch.manual_seed(seed)
    (group, length), (frames, blocks_per_frame), physical = queries, bank, bank[0] + 2
    q = torch.randint(-1, 2, (batch, length, heads[0], head_dim)).to(dtype)
    descriptors = torch.randint(-1, 2, (batch, physical * blocks_per_frame, heads[1], head_dim)).to(dtype)
    valid = torch.randint(-1, frames + 2, (batch,), dtype=torch.int32) if partly else None
    table = torch.randint(-2, physical + 2, (batch, frames), dtype=torch.int32) if slots else None
    arguments = (top_k, group, valid, table, blocks_per_frame)
    got = select(q, descriptors, *arguments)
    assert got.dtype == torch.int32
    assert torch.equal(got, expected_selection(q, descriptors, *arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 7, 33], ids="group{}".format)
def test_real_scores_agree_beyond_the_margin(dtype, group):
    torch.manual_seed(1)
    q = torch.randn(1, 33, 2, 80).to(dtype)
    descriptors = torch.randn(1, 150, 1, 80).to(dtype)
    top_k = 20
    got = select(q, descriptors, top_k, group, None, None, 25)
    expected = expected_selection(q, descriptors, top_k, group, None, None, 25)
    means = torch.stack([part.mean(1) for part in q.double().split(group, 1)], 2)  # (B, H, G, D)
    keys = descriptors.double().repeat_interleave(2, 2)
    best = torch.einsum("bhgd,bnhd->bhgn", means, keys).sort(-1, descending=True).values
    noise = 2.0**-18 * torch.einsum("bhgd,bnhd->bhgn", means.abs(), keys.abs()).amax(-1)
    clear = best[..., top_k - 1] - best[..., top_k] > noise
    assert clear.float().mean() > 0.9
    assert torch.equal(got[clear], expected[clear])


@settings(max_examples=15)
@given(moment_cases(head_dims=(16, 24)), st.sampled_from(DTYPES))
def test_ranking_by_moments(case, dtype):
    """Single queries, groups, several tiles, ragged frames, slot tables and any scale, through both kinds of kernel."""
    low = case.to(dtype)
    described = low.descriptors("torch")
    assert_selected(low, described, low.select(described, "triton"))


@settings(max_examples=12)
@given(normalised_cases(head_dims=(16, 24)), st.sampled_from(DTYPES))
def test_ranking_by_normalised_moments(case, dtype):
    """Groups of several parts, the last ones short, and all else as by moments."""
    low = case.to(dtype)
    described = low.descriptors("torch")
    assert_selected(low, described, low.select(described, "triton"))


@pytest.mark.parametrize("top_k", [12, 200])
def test_normalised_moments_over_many_spans(top_k):
    """Totals are of several tiles of blocks; 200 of 300 blocks are more than registers hold."""
    torch.manual_seed(7)
    case = MomentCase(
        3 * torch.randn(1, 90, 2, 16), torch.randn(1, 60 * 18, 1, 16), top_k, 4, 18, 70, None, score="normalised"
    )
    case.memory_frames = torch.tensor([59], dtype=torch.int32)
    described = case.descriptors("torch")
    assert assert_selected(case, described, case.select(described, "triton")) >= 3


def test_equal_blocks_tie_in_normalised_moments_and_nan_has_no_vote():
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 2, 16).repeat(1, 6, 1, 1)
    keys[:, 2] = torch.nan
    case = MomentCase(3 * torch.randn(1, 80, 2, 16), keys, 3, 2, 12, 40, None, score="normalised")
    described = case.descriptors("torch")
    assert case.select(described, "triton").view(-1, 3).tolist() == [[0, 2, 3]] * 4
    by_group = torch.tensor([[1, 0]], dtype=torch.int32)
    chosen = memflow_ops.select_blocks(
        case.q, described, 3, query_group=40, block_size=2, frame_tokens=12, memory_frames=by_group,
        score="normalised", impl="triton",
    )  # fmt: skip
    assert chosen[0].tolist() == [[[0, 2, 3], [-1, -1, -1]]] * 2


@pytest.mark.parametrize("group", [1, 5], ids="group{}".format)
def test_ranking_by_moments_over_many_spans(group):
    """More blocks than a program ranks in registers, so that groups play a last round; frames have a short block."""
    torch.manual_seed(6)
    case = MomentCase(torch.randn(1, 10, 2, 16), torch.randn(1, 60 * 18, 1, 16), 12, 4, 18, group, None)
    described = case.descriptors("torch")
    assert assert_selected(case, described, case.select(described, "triton")) > 10 // group


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("top_k", [1, 2, 3, 6, 8, 11, 13, 14, 15, 20])
def test_every_kind_of_score(top_k):
    inf, nan = torch.inf, torch.nan
    scores = [0.0, nan, -inf, -0.0, inf, 1.0, nan, -1e-40, 1e-40, -inf, inf, -5.0, 1.0, -0.0, 3e38]
    q = torch.zeros(1, 2, 1, 16)
    q[..., 0] = 1.0
    descriptors = torch.zeros(1, 15, 1, 16)
    descriptors[0, :, 0, 0] = torch.tensor(scores)
    got = select(q, descriptors, top_k, 1, None, None, 15)
    assert torch.equal(got, expected_selection(q, descriptors, top_k, 1, None, None, 15))


@pytest.mark.parametrize("top_k", [1, 129, 299, 300, 999])
def test_large_k_over_many_tiles(top_k):
    torch.manual_seed(2)
    q, descriptors = torch.randint(-3, 4, (1, 2, 1, 16)).float(), torch.randint(-3, 4, (1, 300, 1, 16)).float()
    got = select(q, descriptors, top_k, 1, None, None, 25)
    assert got.shape[-1] == min(top_k, 300)
    assert torch.equal(got, expected_selection(q, descriptors, top_k, 1, None, None, 25))


@pytest.mark.parametrize("top_k", [5, 12], ids=["ranked", "all"])
def test_frames_that_are_not_valid_do_not_matter(top_k):
    torch.manual_seed(3)
    q, descriptors = torch.randn(3, 9, 2, 16), torch.randn(3, 12, 2, 16)
    valid = torch.tensor([0, 1, 2], dtype=torch.int32)
    clean = select(q, descriptors, top_k, 4, valid, None, 4)
    for b, frames in enumerate(valid):
        descriptors[b, 4 * frames :] = torch.inf
    assert torch.equal(clean, select(q, descriptors, top_k, 4, valid, None, 4))
    assert (clean[0] == -1).all()
    expected = torch.tensor([0, 1, 2, 3] + [-1] * (top_k - 4), dtype=torch.int32)
    assert torch.equal(clean[1], expected.expand_as(clean[1]))


def test_any_strides_and_the_same_bits_twice():
    torch.manual_seed(4)
    qkv = torch.randn(2, 21, 3, 4, 24)
    q = qkv[:, ::2, 1]  # (2, 11, 4, 24)
    descriptors = torch.randn(2, 2, 18, 48).transpose(1, 2)[..., :24]
    valid = torch.tensor([9, 3, 9, 2], dtype=torch.int32)[1::2]
    table = torch.randint(0, 6, (2, 8), dtype=torch.int32)[:, :6]
    got = select(q, descriptors, 7, 3, valid, table, 3)
    assert torch.equal(got, expected_selection(q, descriptors, 7, 3, valid, table, 3))
    assert torch.equal(got, select(q, descriptors, 7, 3, valid, table, 3))
