"""retrieve_frames: against float64, ties, padding, what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieve_cases import assert_retrieves, make_case, retrieve_cases
from torch.library import opcheck

import memflow_ops as ops

SCORES = ["linear", "softmax", "coverage"]


@settings(max_examples=80)
@given(retrieve_cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_torch_retrieves_as_the_reference(case, dtype):
    assert_retrieves(*case, dtype, "torch")


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("score", SCORES)
def test_equal_frames_go_to_the_lower_index(score, impl):
    case = make_case(stored=4, whole_numbers=True)
    case["means"] = case["means"].repeat(1, 1, 3, 1, 1, 1)  # every frame three times
    indices, scores = ops.retrieve_frames(**case, count=12, score=score, impl=impl)
    for row, of in zip(indices.tolist(), scores, strict=True):
        assert sorted(row) == list(range(12))
        for frame in range(4):
            copies = [row.index(frame + 4 * i) for i in range(3)]
            assert copies == sorted(copies), f"{row}: copies of {frame} in another order"
            assert len(set(of[copies].tolist())) == 1


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("score", SCORES)
def test_padding_rows_and_other_stories_do_not_matter(score, impl):
    case = make_case(words=6, stored=10, candidates=5)
    case["text_lengths"] = torch.tensor([2, 4], dtype=torch.int32)
    expected = ops.retrieve_frames(**case, count=3, score=score, impl=impl)
    for story, length in enumerate((2, 4)):
        case["text_keys"][:, story, length:] = torch.nan
    unused = torch.ones(2, 10, dtype=torch.bool)
    unused[torch.arange(2)[:, None], case["candidates"].long()] = False
    case["means"][:, unused] = torch.nan
    for got, want in zip(ops.retrieve_frames(**case, count=3, score=score, impl=impl), expected, strict=True):
        assert torch.equal(got, want)
    alone = {name: x[:, 1:] if name in ("text_keys", "means") else x for name, x in case.items()}
    alone |= {name: case[name][1:] for name in ("candidates", "text_lengths")}
    assert torch.equal(ops.retrieve_frames(**alone, count=3, score=score, impl=impl)[0], expected[0][1:])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_broken_frame_ranks_last(impl):
    case = make_case(stored=6)
    case["means"][:, :, 2] = torch.nan
    for score in ("linear", "coverage"):
        indices, _ = ops.retrieve_frames(**case, count=6, score=score, impl=impl)
        assert score == "coverage" or indices[:, -1].tolist() == [2, 2]
        assert all(sorted(row) == list(range(6)) for row in indices.tolist())


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("score", SCORES)
def test_opcheck(score, impl):
    case = make_case(parts=2, candidates=4)
    weights = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    redundancy = None if score == "coverage" else 0.5
    arguments = (
        *(case[n] for n in ("text_keys", "means", "candidates", "text_lengths")),
        weights,
        3,
        score,
        redundancy,
    )
    result = opcheck(torch.ops.memflow_ops.retrieve_frames.default, (*arguments, 0.4, impl))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"score": "cosine"}, ValueError, "score must be one of linear, softmax, coverage, got 'cosine'"),
        ({"count": 0}, ValueError, "count must be at least 1, got 0"),
        ({"redundancy": 2.0}, ValueError, "redundancy is a cosine, -1 to 1, or None, got 2.0"),
        ({"redundancy": 0.5, "score": "coverage"}, ValueError, "coverage has no redundancy limit"),
        ({"means": torch.zeros(3, 2, 9, 1, 2, 8)}, ValueError, "means must have the 2 layers of text_keys, got 3"),
        ({"means": torch.zeros(2, 2, 0, 1, 2, 8)}, ValueError, "nothing must be empty"),
        ({"means": torch.zeros(2, 2, 9, 1, 3, 8)}, ValueError, "2 heads of q must be a multiple of the heads of means"),
        ({"candidates": torch.zeros(2, 3)}, TypeError, "candidates must be int32, got torch.float32"),
        ({"candidates": torch.zeros(2, 0, dtype=torch.int32)}, ValueError, "candidates must name a frame at least"),
        ({"block_lengths": [1, 2]}, ValueError, "block_lengths must name the 1 blocks of a frame, got 2"),
        ({"text_lengths": torch.ones(3, dtype=torch.int32)}, ValueError, r"text_lengths must have shape \(2\)"),
    ],
)
def test_bad_arguments_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        ops.retrieve_frames(**{**make_case(), "count": 2, **changes})
