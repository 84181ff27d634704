"""Block means against the reference in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moment_cases import moment_cases

from memflow_ops.impl.reference import selection
from memflow_ops.kernels.selection.describe import describe_blocks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@settings(max_examples=25)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from([1, 5, 16, 64, 100]),
    st.integers(1, 3),
    st.sampled_from([16, 40, 72, 96, 128, 256]),
    st.integers(0, 99),
)
def test_means_of_odd_shapes(dtype, batch, frames, frame_tokens, block_size, heads, head_dim, seed):
    torch.manual_seed(seed)
    k = torch.randn(batch, frames * frame_tokens, heads, head_dim).to(dtype)
    got = describe_blocks(k, block_size, frame_tokens)
    exact = selection.describe_blocks(k.double(), block_size, frame_tokens)
    assert got.dtype == dtype and got.shape == exact.shape
    # one rounding to the dtype, after a float32 mean
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-20
    assert ((got.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integers_are_exact(dtype):
    torch.manual_seed(0)
    k = torch.randint(-8, 9, (2, 3 * 37, 2, 24)).to(dtype)
    got = describe_blocks(k, 16, 37)
    assert torch.equal(got, selection.describe_blocks(k, 16, 37))


def test_any_strides_and_nan_stays_in_its_block():
    torch.manual_seed(0)
    k = torch.randn(2, 4, 3, 74, 40).permute(0, 3, 2, 1, 4)[:, :, 1, ::2]  # (2, 74, 2, 40), nothing contiguous
    k[1, 20, 1, 7] = torch.nan  # frame 0, block 1
    got = describe_blocks(k, 16, 37)
    expected = selection.describe_blocks(k.double(), 16, 37)
    assert got.isnan().nonzero().tolist() == [[1, 1, 1, 7]]
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6, equal_nan=True)


@settings(max_examples=15)
@given(moment_cases(head_dims=(16, 40)), st.sampled_from(DTYPES))
def test_variances_of_odd_shapes(case, dtype):
    low = case.to(dtype)
    got = low.descriptors("triton")
    exact = low.to(torch.float64).descriptors("reference")
    limit = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-20
    assert got.dtype == dtype and ((got.double() - exact).abs() <= limit).all()
    assert torch.equal(got[..., : low.keys.shape[-1]], describe_blocks(low.keys, case.block_size, case.frame_tokens))


def test_variances_far_from_zero_limited_and_of_nan():
    torch.manual_seed(0)
    far = 1000.0 + torch.randn(1, 74, 2, 16)
    got = describe_blocks(far, 16, 37, 2)[..., 16:].double()
    exact = selection.describe_blocks(far.double(), 16, 37, 2)[..., 16:]
    assert (got / exact - 1).abs().max() < 2**-14
    wide = torch.tensor([-3e4, 3e4, 1.0, torch.nan], dtype=torch.float16).view(1, 4, 1, 1)
    got = describe_blocks(wide, 2, 4, 2)[0, :, 0]
    assert got[0].tolist() == [0.0, 65504.0] and got[1].isnan().all()


def test_no_frames():
    assert describe_blocks(torch.zeros(2, 0, 3, 16), 16, 37, 2).shape == (2, 0, 3, 32)
    assert describe_blocks(torch.zeros(2, 0, 3, 16), 16, 37).shape == (2, 0, 3, 16)
