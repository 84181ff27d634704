"""The cache write against the reference in float64."""

import pytest
import torch
from cache_write_cases import assert_written, make_case, write_cases
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=10)
@given(write_cases(), st.sampled_from(DTYPES))
def test_every_number_is_rounded_once(case, dtype):
    assert_written(case, dtype, "triton")


def test_wide_heads_and_a_frame_of_many_tiles():
    case = make_case(frames=2, grid=(9, 11), heads=(3, 2), head_dim=128, options={"block_size": 24, "mean_size": 48})
    case.mean_frames, case.moments = 1, 2
    assert_written(case, torch.bfloat16, "triton")


def test_runs_are_alike_to_the_bit():
    case = make_case(frames=2, grid=(7, 8), options={"block_size": 16}).to(torch.bfloat16)
    case.mean_frames = 2
    first, second = case.run("triton"), case.run("triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nan_stays_in_its_token():
    case = make_case(batch=2, frames=2, grid=(4, 5), options={"block_size": 8}).to(torch.float32)
    case.places[:] = torch.tensor([0, 1])
    clean = case.run("triton")
    case.k[1, 22, 0, 3] = torch.nan  # frame 1, block 0: the norm carries it to all heads of the token
    got = case.run("triton")
    token = torch.zeros(got["memory_k"].shape, dtype=torch.bool)
    token[1, 22] = True
    assert torch.equal(got["memory_k"].isnan(), token)
    block = torch.zeros(got["descriptors"].shape, dtype=torch.bool)
    block[1, 3] = True
    assert torch.equal(got["descriptors"].isnan(), block)
    assert torch.equal(got["q"], clean["q"]) and torch.equal(got["memory_v"], clean["memory_v"])


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
def test_what_the_kernel_does_not_take(dtype):
    with pytest.raises(ValueError, match=r"float16, bfloat16 and float32, got torch.float64: use impl='torch'"):
        make_case().to(dtype).run("triton")
