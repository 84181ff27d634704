"""frame_relevance against the formulas written out; retrieve_frames against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import assert_retrieves, make_case, retrieve_cases
from torch.utils._python_dispatch import TorchDispatchMode

import memflow_ops
from memflow_ops.impl.torch import retrieval

SCORES = ["linear", "softmax", "coverage"]


def relevance_inputs(heads: int = 4, kv_heads: int = 2, blocks: int = 3):
    return torch.randn(2, 5, heads, 8, dtype=torch.float64), torch.randn(2, 6, blocks, kv_heads, 8, dtype=torch.float64)


def products(text_q, frame_keys):
    """The products q . k / sqrt(D), (B, Lt, H, F, n)."""
    keys = frame_keys.repeat_interleave(text_q.shape[2] // frame_keys.shape[3], 3)
    return torch.einsum("bthd,bfnhd->bthfn", text_q, keys) / text_q.shape[-1] ** 0.5


def test_linear_relevance_is_the_mean_of_all_products():
    text_q, frame_keys = relevance_inputs()
    lengths = (4, 4, 2)
    tokens = torch.cat([frame_keys[:, :, i : i + 1].expand(-1, -1, n, -1, -1) for i, n in enumerate(lengths)], 2)
    expected = products(text_q, tokens).mean((1, 2, 4))
    torch.testing.assert_close(memflow_ops.frame_relevance(text_q, frame_keys, block_lengths=lengths), expected)


def test_softmax_relevance_is_normalised_over_all_frames_jointly():
    text_q, frame_keys = relevance_inputs()
    lengths = (4, 4, 2)
    # A block of n tokens counts like n equal keys.
    tokens = torch.cat([frame_keys[:, :, i : i + 1].expand(-1, -1, n, -1, -1) for i, n in enumerate(lengths)], 2)
    mass = products(text_q, tokens).flatten(3).softmax(-1).unflatten(3, (6, 10)).sum(-1)
    actual = memflow_ops.frame_relevance(text_q, frame_keys, score="softmax", block_lengths=lengths)
    torch.testing.assert_close(actual, mass.mean((1, 2)))
    torch.testing.assert_close(actual.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_padding_takes_no_part_in_relevance(score):
    text_q, frame_keys = relevance_inputs()
    expected = torch.cat(
        [
            memflow_ops.frame_relevance(text_q[b : b + 1, :n], frame_keys[b : b + 1], score=score)
            for b, n in enumerate((2, 5))
        ]
    )
    text_q[0, 2:] = torch.nan
    lengths = torch.tensor([2, 5], dtype=torch.int32)
    torch.testing.assert_close(
        memflow_ops.frame_relevance(text_q, frame_keys, score=score, text_lengths=lengths), expected
    )


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_gradients_and_precision_of_relevance(score):
    text_q, frame_keys = (x.requires_grad_() for x in relevance_inputs())
    run = lambda *x: memflow_ops.frame_relevance(*x, score=score)  # noqa: E731
    assert torch.autograd.gradcheck(run, (text_q, frame_keys), fast_mode=True)
    low = run(text_q.bfloat16(), frame_keys.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(
        low.double(), run(text_q.bfloat16().double(), frame_keys.bfloat16().double()), rtol=1e-5, atol=1e-6
    )


@settings(max_examples=80)
@given(retrieve_cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_torch_retrieves_as_the_reference(case, dtype):
    assert_retrieves(*case, dtype, "torch")


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("score", SCORES)
def test_equal_frames_go_to_the_lower_index(score, impl):
    case = make_case(stored=4, whole_numbers=True)
    case["means"] = case["means"].repeat(1, 1, 3, 1, 1, 1)  # every frame three times
    indices, scores = memflow_ops.retrieve_frames(**case, count=12, score=score, impl=impl)
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
    expected = memflow_ops.retrieve_frames(**case, count=3, score=score, impl=impl)
    for story, length in enumerate((2, 4)):
        case["text_keys"][:, story, length:] = torch.nan
    unused = torch.ones(2, 10, dtype=torch.bool)
    unused[torch.arange(2)[:, None], case["candidates"].long()] = False
    case["means"][:, unused] = torch.nan
    for got, want in zip(memflow_ops.retrieve_frames(**case, count=3, score=score, impl=impl), expected, strict=True):
        assert torch.equal(got, want)
    alone = {name: x[:, 1:] if name in ("text_keys", "means") else x for name, x in case.items()}
    alone |= {name: case[name][1:] for name in ("candidates", "text_lengths")}
    assert torch.equal(memflow_ops.retrieve_frames(**alone, count=3, score=score, impl=impl)[0], expected[0][1:])


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_broken_frame_ranks_last(impl):
    case = make_case(stored=6)
    case["means"][:, :, 2] = torch.nan
    for score in ("linear", "coverage"):
        indices, _ = memflow_ops.retrieve_frames(**case, count=6, score=score, impl=impl)
        assert score == "coverage" or indices[:, -1].tolist() == [2, 2]
        assert all(sorted(row) == list(range(6)) for row in indices.tolist())


@pytest.mark.parametrize("score", ["linear", "coverage"])
def test_a_long_history_is_compared_in_pieces_of_one_size(score, monkeypatch):
    case = make_case(stored=40, candidates=23, parts=2, whole_numbers=True)
    whole = memflow_ops.retrieve_frames(**case, count=5, score=score, impl="torch")
    monkeypatch.setattr(retrieval, "PIECE", 4 * case["means"][0, :, 0].numel())
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.index.Tensor, torch.ops.aten.new_empty.default):
                made.append(out.numel())
            return out

    with Made():
        pieces = retrieval.retrieve_frames(
            case["text_keys"],
            case["means"],
            case["candidates"],
            case["text_lengths"],
            torch.tensor([2 / 3, 1 / 3], dtype=torch.float64),
            count=5,
            score=score,
            redundancy=None,
            softmax_scale=8**-0.5,
        )
    room = case["means"][0, :, :, 0].numel()  # for all frames that are stored, whatever their number is now
    assert made.count(room) == 1
    assert max(numbers for numbers in made if numbers != room) == retrieval.PIECE
    for got, want in zip(pieces, whole, strict=True):
        torch.testing.assert_close(got, want)
