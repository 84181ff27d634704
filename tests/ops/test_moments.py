"""Descriptors with variances, and the scores "moments" and "normalised" that rank by them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_cases import MomentCase, assert_selected, moment_cases, normalised_cases

import memflow_ops

BOTH = pytest.mark.parametrize("impl", ["reference", "torch"])


@given(moment_cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=100)
def test_variances_stand_behind_the_means(case, dtype):
    keys = case.keys.to(dtype)
    blocks = [x for frame in keys.double().split(case.frame_tokens, 1) for x in frame.split(case.block_size, 1)]
    exact = torch.stack([x.var(1, correction=0) for x in blocks], 1)
    for impl in ("reference", "torch"):
        described = case.to(dtype).descriptors(impl)
        means = memflow_ops.describe_blocks(keys, case.block_size, case.frame_tokens, impl=impl)
        assert described.dtype == dtype and torch.equal(described[..., : keys.shape[-1]], means)
        variances = described[..., keys.shape[-1] :].double()
        limit = torch.finfo(dtype).eps * exact + 2.0**-20  # one rounding, after sums in float32
        assert ((variances - exact).abs() <= limit).all(), impl


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_cancels_where_keys_lie_far_from_zero(impl, dtype):
    """The mean is 1000 times the standard deviation, or in bfloat16 as far away as that can tell keys apart."""
    far = 1000.0 if dtype == torch.float32 else 16.0
    keys = (far + torch.randn(2, 60, 2, 8, dtype=torch.float64)).to(dtype)
    exact = keys.double().unflatten(1, (-1, 20)).var(2, correction=0)
    ours = memflow_ops.describe_blocks(keys, 20, 20, moments=2, impl=impl)[..., 8:].double()
    assert (ours / exact - 1).abs().max() < 2**-14 + torch.finfo(dtype).eps


@BOTH
def test_a_variance_that_the_dtype_cannot_hold_is_limited(impl):
    keys = torch.tensor([-3e4, 3e4, 1.0, torch.nan], dtype=torch.float16).view(1, 4, 1, 1)
    described = memflow_ops.describe_blocks(keys, 2, impl=impl, moments=2)
    assert described[0, 0, 0].tolist() == [0.0, 65504.0]
    assert described[0, 1, 0].isnan().all(), "NaN stays NaN"


@BOTH
def test_descriptors_with_variances_have_a_gradient(impl):
    k = torch.randn(2, 10, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: memflow_ops.describe_blocks(x, 4, 5, moments=2, impl=impl), k)


@given(st.one_of(moment_cases(), normalised_cases()))
@settings(max_examples=200)
def test_selections_are_those_of_float64_where_the_margin_is_clear(case):
    exact = case.descriptors("reference")
    assert_selected(case, exact, case.select(exact, "reference"))
    low = case.to(torch.float32)
    described = low.descriptors("torch")
    for impl in ("reference", "torch"):
        assert_selected(low, described, low.select(described, impl))


def test_most_margins_are_clear():
    torch.manual_seed(0)
    case = MomentCase(torch.randn(2, 40, 4, 16), torch.randn(2, 90, 2, 16), 5, 4, 18, 7, None)
    described = case.descriptors("torch")
    assert assert_selected(case, described, case.select(described, "torch")) > 40


@BOTH
def test_the_score_is_the_logarithm_of_a_blocks_weight_to_third_order(impl):
    """The higher the order of what is left out, the faster the error falls with the scale: 8 times for half of it."""
    q = torch.randn(1, 1, 1, 6, dtype=torch.float64)
    keys = torch.randn(1, 12, 1, 6, dtype=torch.float64)
    blocks = keys[0, :, 0].split(4)

    def worst(scale: float) -> float:
        case = MomentCase(q, keys, 1, 4, 12, 1, scale)
        # The channels' covariances are of second order too; here each key has one channel that is not 0.
        scores = case.scores(case.descriptors(impl))[0][0, 0, 0] + math.log(4)
        true = torch.stack([(scale * x @ q[0, 0, 0]).logsumexp(0) for x in blocks])
        return float((scores - true).abs().max())

    keys *= torch.nn.functional.one_hot(torch.zeros(12, dtype=torch.int64), 6).view(1, 12, 1, 6)
    assert worst(0.02) > 7 * worst(0.01) > 0


@BOTH
def test_a_wide_block_beats_a_narrow_one_with_the_same_mean(impl):
    keys = torch.tensor([0.0, 0.0, -3.0, 3.0]).view(1, 4, 1, 1)
    q = torch.ones(1, 1, 1, 1)
    case = MomentCase(q, keys, 1, 2, 4, 1, 1.0)
    assert case.select(case.descriptors(impl), impl).flatten().tolist() == [1]
    means = memflow_ops.describe_blocks(keys, 2)
    assert memflow_ops.select_blocks(q, means, 1, impl=impl).flatten().tolist() == [0], "by means it is a tie"


@BOTH
def test_a_short_block_has_less_weight(impl):
    """All keys are alike, so that a block of two tokens has half the weight of one of four."""
    case = MomentCase(torch.ones(1, 1, 1, 2), torch.ones(1, 12, 1, 2), 3, 4, 6, 1, None)
    described = case.descriptors(impl)
    assert case.select(described, impl).flatten().tolist() == [0, 1, 2], (
        "blocks 0 and 2 are whole, of 1 and 3 the lower"
    )
    unsized = memflow_ops.select_blocks(torch.ones(1, 1, 1, 2), described, 2, score="moments", impl=impl)
    assert unsized.flatten().tolist() == [0, 1], "without lengths all blocks are alike"


@BOTH
def test_equal_scores_and_nan(impl):
    keys = torch.tensor([torch.nan, 1.0, 2.0, 0.0, 1.0, torch.inf, 0.0, 2.0]).view(1, 8, 1, 1)
    case = MomentCase(torch.ones(1, 1, 1, 1), keys, 2, 2, 8, 1, 0.5)
    described = case.descriptors(impl)  # blocks 1 and 3 are alike; those of 0 and 2 have no variance
    assert case.select(described, impl).flatten().tolist() == [1, 3]
    for top_k, chosen in ((1, [1]), (3, [0, 1, 3])):
        case.top_k = top_k
        assert case.select(described, impl).flatten().tolist() == chosen


@given(st.one_of(moment_cases(), normalised_cases()), st.sampled_from(["reference", "torch"]))
@settings(max_examples=60)
def test_attention_is_that_of_its_parts(case, impl):
    size = case.q.shape[-1]
    values = torch.randn_like(case.keys)
    options = {name: x for name, x in vars(case).items() if name not in ("q", "keys")}
    empty = case.keys[:, :0]
    described = case.descriptors(impl)
    attend = lambda **more: memflow_ops.memory_attention(  # noqa: E731
        case.q, empty, empty, case.keys, values, **options, return_lse=True, impl=impl, **more
    )
    chosen = case.select(described, impl)
    sizes = {name: options[name] for name in ("block_size", "frame_tokens", "query_group", "memory_slots")}
    sizes["softmax_scale"] = case.softmax_scale
    expected = memflow_ops.attend_selected(case.q, case.keys, values, chosen, **sizes, impl=impl)
    for got in (attend(), attend(memory_descriptors=described)):
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=rf"memory_descriptors must have shape .*{2 * size}\)"):
        attend(memory_descriptors=described[..., :size])


def test_gradients_do_not_depend_on_how_blocks_were_ranked():
    """All blocks are chosen, so both scores give the same attention and the same gradients."""
    inputs = [torch.randn(1, n, 2, 4, dtype=torch.float64, requires_grad=True) for n in (6, 3, 3, 8, 8)]
    gradients = []
    for score in ("mean", "moments", "normalised"):
        out = memflow_ops.memory_attention(*inputs, block_size=3, frame_tokens=4, score=score)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    for all_three in zip(*gradients, strict=True):
        for other in all_three[1:]:
            torch.testing.assert_close(other, all_three[0], rtol=0, atol=0)


@BOTH
def test_a_group_of_one_part_is_ranked_as_by_moments(impl):
    torch.manual_seed(0)
    case = MomentCase(30 * torch.randn(2, 70, 2, 8), torch.randn(2, 60, 2, 8), 3, 4, 15, 32, None)
    described = case.descriptors(impl)
    expected = case.select(described, impl)
    case.score = "normalised"
    assert torch.equal(case.select(described, impl), expected)


@BOTH
def test_every_part_has_one_vote(impl):
    """Two parts want block 1 and a third block 2, eight times as loud: by moments it outvotes them."""
    q = torch.zeros(1, 96, 1, 4)
    q[0, :64, 0, 1], q[0, 64:, 0, 2] = 4.0, 32.0
    keys = 5 * torch.eye(4).view(1, 4, 1, 4)
    case = MomentCase(q, keys, 1, 1, 4, None, None)
    described = case.descriptors(impl)
    assert case.select(described, impl).flatten().tolist() == [2]
    case.score = "normalised"
    assert case.select(described, impl).flatten().tolist() == [1]


@BOTH
def test_equal_blocks_tie_and_a_block_that_is_no_number_takes_no_votes(impl):
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 2, 8).repeat(1, 6, 1, 1)
    keys[:, 2] = torch.nan
    case = MomentCase(3 * torch.randn(1, 80, 2, 8), keys, 1, 2, 12, 40, None, score="normalised")
    described = case.descriptors(impl)
    for top_k, chosen in ((1, [0]), (3, [0, 2, 3]), (5, [0, 2, 3, 4, 5])):
        case.top_k = top_k
        assert case.select(described, impl).view(-1, top_k).tolist() == [chosen] * 4
    case.q[0, 50] = torch.nan  # in the second group, for which all blocks are alike then
    case.top_k = 2
    assert case.select(described, impl)[0].tolist() == [[[0, 2], [0, 1]]] * 2


@BOTH
def test_normalised_scores_of_any_size(impl):
    """Whatever overflows or vanishes as a mass is still ranked."""
    keys = torch.tensor([3.0, -2.0, 1.0, 0.0]).view(1, 4, 1, 1)
    for factor in (1e4, 1e-30):
        q = torch.full((1, 40, 1, 1), factor)
        case = MomentCase(q, keys, 3, 1, 4, None, 1.0, score="normalised")
        assert case.select(case.descriptors(impl), impl).flatten().tolist() == ([0, 2, 3] if factor > 1 else [0, 1, 2])
    endless = torch.tensor([0.0, torch.inf, 1.0, -torch.inf]).view(1, 4, 1, 1)
    described = torch.cat([endless, torch.zeros_like(endless)], -1)
    case = MomentCase(torch.ones(1, 40, 1, 1), keys, 3, 1, 4, None, 1.0, score="normalised")
    assert case.select(described, impl).flatten().tolist() == [0, 1, 2]


Q, K = torch.randn(1, 4, 2, 8), torch.randn(1, 12, 2, 8)
MEANS = memflow_ops.describe_blocks(K, 4)
BOTH_MOMENTS = memflow_ops.describe_blocks(K, 4, moments=2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: memflow_ops.describe_blocks(K, 4, moments=3), r"moments must be 1 \(means\) or 2 .*, got 3"),
        (lambda: memflow_ops.describe_blocks(K, 4, moments=0), "moments must be at least 1, got 0"),
        (
            lambda: memflow_ops.select_blocks(Q, MEANS, 1, score="max"),
            "score must be one of mean, moments, normalised, got 'max'",
        ),
        (lambda: memflow_ops.select_blocks(Q, MEANS, 1, score="moments"), "must have 16 numbers, got 8"),
        (lambda: memflow_ops.select_blocks(Q, BOTH_MOMENTS, 1), "must have 8 numbers, got 16"),
        (lambda: memflow_ops.select_blocks(Q, MEANS, 1, block_size=4), "together or not at all, got 4 and None"),
        (
            lambda: memflow_ops.select_blocks(Q, MEANS, 1, block_size=4, frame_tokens=12, blocks_per_frame=2),
            "blocks_per_frame must be 3, as block_size=4 and frame_tokens=12 say, or None, got 2",
        ),
        (lambda: memflow_ops.select_blocks(Q, MEANS, 1, block_size=4, frame_tokens=20), "whole frames of 5 blocks"),
        (
            lambda: memflow_ops.memory_attention(Q, K, K, score="top"),
            "score must be one of mean, moments, normalised, got 'top'",
        ),
        (lambda: memflow_ops.memory_attention(Q, K, K, K, K, memory_descriptors=BOTH_MOMENTS), r"must have shape"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
