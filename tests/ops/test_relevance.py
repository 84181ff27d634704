"""frame_relevance against the formulas written out."""

import pytest
import torch

import memflow_ops as ops


def inputs(heads: int = 4, kv_heads: int = 2, blocks: int = 3):
    return torch.randn(2, 5, heads, 8, dtype=torch.float64), torch.randn(2, 6, blocks, kv_heads, 8, dtype=torch.float64)


def scores(text_q, frame_keys):
    """q . k / sqrt(D): (B, Lt, H, F, n)."""
    keys = frame_keys.repeat_interleave(text_q.shape[2] // frame_keys.shape[3], 3)
    return torch.einsum("bthd,bfnhd->bthfn", text_q, keys) / text_q.shape[-1] ** 0.5


def test_linear_is_the_mean_of_all_products():
    text_q, frame_keys = inputs()
    lengths = (4, 4, 2)
    tokens = torch.cat([frame_keys[:, :, i : i + 1].expand(-1, -1, n, -1, -1) for i, n in enumerate(lengths)], 2)
    expected = scores(text_q, tokens).mean((1, 2, 4))
    torch.testing.assert_close(ops.frame_relevance(text_q, frame_keys, block_lengths=lengths), expected)


def test_softmax_is_normalised_over_all_frames_jointly():
    text_q, frame_keys = inputs()
    lengths = (4, 4, 2)
    # a block of n tokens is n equal keys
    tokens = torch.cat([frame_keys[:, :, i : i + 1].expand(-1, -1, n, -1, -1) for i, n in enumerate(lengths)], 2)
    mass = scores(text_q, tokens).flatten(3).softmax(-1).unflatten(3, (6, 10)).sum(-1)
    actual = ops.frame_relevance(text_q, frame_keys, score="softmax", block_lengths=lengths)
    torch.testing.assert_close(actual, mass.mean((1, 2)))
    torch.testing.assert_close(actual.sum(1), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_padding_takes_no_part(score):
    text_q, frame_keys = inputs()
    expected = torch.cat(
        [ops.frame_relevance(text_q[b : b + 1, :n], frame_keys[b : b + 1], score=score) for b, n in enumerate((2, 5))]
    )
    text_q[0, 2:] = torch.nan
    lengths = torch.tensor([2, 5], dtype=torch.int32)
    torch.testing.assert_close(ops.frame_relevance(text_q, frame_keys, score=score, text_lengths=lengths), expected)


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_gradients_and_precision(score):
    text_q, frame_keys = (x.requires_grad_() for x in inputs())
    run = lambda *x: ops.frame_relevance(*x, score=score)  # noqa: E731
    assert torch.autograd.gradcheck(run, (text_q, frame_keys), fast_mode=True)
    low = run(text_q.bfloat16(), frame_keys.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(
        low.double(), run(text_q.bfloat16().double(), frame_keys.bfloat16().double()), rtol=1e-5, atol=1e-6
    )
