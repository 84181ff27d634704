"""Retrieval in the interpreter: the choices and scores of the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import assert_retrieves, make_case, retrieve_cases, rounded

import memflow_ops as ops

SCORES = ["linear", "softmax", "coverage"]


@settings(max_examples=20)
@given(retrieve_cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_retrieves_as_the_reference(case, dtype):
    assert_retrieves(*case, dtype, "triton")


@pytest.mark.parametrize("score", SCORES)
def test_equal_frames_go_to_the_lower_index(score):
    case = make_case(stored=4, whole_numbers=True)
    # Means over 4 and 2 words are exact, and so are sums of them in any order: on some CPUs the order in which numpy
    # adds up a product depends on the column.
    case["text_lengths"] = torch.tensor([4, 2], dtype=torch.int32)
    case["means"] = case["means"].repeat(1, 1, 3, 1, 1, 1)  # every frame three times
    options = dict(count=12, score=score)
    indices, _ = ops.retrieve_frames(**rounded(case, torch.bfloat16), **options, impl="triton")
    for row in indices.tolist():
        assert sorted(row) == list(range(12))
        assert all(row.index(f) < row.index(f + 4) < row.index(f + 8) for f in range(4)), row


def test_more_frames_than_a_tile_and_layers_than_a_split(monkeypatch):
    from memflow_ops.kernels.retrieval import relevance

    monkeypatch.setattr(relevance, "PROGRAMS", 8)
    case = make_case(layers=5, batch=1, words=70, stored=150, head_dim=16)
    for score, redundancy in (("linear", 0.05), ("coverage", None)):
        assert_retrieves(case, dict(count=6, score=score, redundancy=redundancy), torch.bfloat16, "triton")


def test_nothing_but_the_candidates_and_the_words_is_read():
    case = rounded(make_case(words=6, stored=10, candidates=5), torch.float32)
    case["text_lengths"] = torch.tensor([2, 4], dtype=torch.int32)
    expected = {score: ops.retrieve_frames(**case, count=3, score=score, impl="triton") for score in SCORES}
    for story, length in enumerate((2, 4)):
        case["text_keys"][:, story, length:] = torch.nan
    unused = torch.ones(2, 10, dtype=torch.bool)
    unused[torch.arange(2)[:, None], case["candidates"].long()] = False
    case["means"][:, unused] = torch.nan
    for score in SCORES:
        for got, want in zip(
            ops.retrieve_frames(**case, count=3, score=score, impl="triton"), expected[score], strict=True
        ):
            assert torch.equal(got, want), score


def test_what_is_out_of_range_is_clamped():
    case = rounded(make_case(words=6, stored=10, candidates=5), torch.float32)
    wild, tame = dict(case), dict(case)
    wild["candidates"], tame["candidates"] = (
        torch.tensor([x] * 2, dtype=torch.int32) for x in ([-3, 4, 99, 2], [0, 4, 9, 2])
    )
    wild["text_lengths"], tame["text_lengths"] = (torch.tensor(x, dtype=torch.int32) for x in ([99, -5], [6, 1]))
    for score in ("linear", "softmax"):
        got, want = (ops.retrieve_frames(**x, count=3, score=score, impl="triton") for x in (wild, tame))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_a_broken_frame_ranks_last():
    case = rounded(make_case(stored=6), torch.float32)
    case["means"][:, :, 2] = torch.nan
    for redundancy in (None, 0.0):
        indices, _ = ops.retrieve_frames(**case, count=6, redundancy=redundancy, impl="triton")
        assert all(sorted(row) == list(range(6)) for row in indices.tolist())
        assert redundancy is not None or indices[:, -1].tolist() == [2, 2]
