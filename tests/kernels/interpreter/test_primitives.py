"""The small device functions, one by one."""

import pytest
import torch
import triton
import triton.language as tl

from memflow_ops.kernels.primitives import cast, online_softmax_update
from memflow_ops.kernels.selection.ranking import sortable_key


@triton.jit
def keys_kernel(scores, keys, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(keys + places, sortable_key(tl.load(scores + places)).to(tl.int64))


def test_sortable_keys_order_every_kind_of_float():
    inf, nan, tiny = torch.inf, torch.nan, 1e-42
    ascending = [-inf, -3e38, -1.5, -1.0, -1e-38, -tiny, 0.0, tiny, 1e-38, 1.0, 1.5, 3e38, inf]
    scores = torch.tensor([*ascending, -0.0, nan, -nan])
    keys = torch.full((16,), -1, dtype=torch.int64)
    keys_kernel[(1,)](scores, keys, SIZE=16)
    assert keys[:13].diff().min() > 0
    assert keys[13] == keys[6], "-0 equals +0"
    assert keys[14:].tolist() == [1, 1], "NaN is below -inf and above the 0 of blocks that are not there"
    assert keys[0] > 1
    assert keys.max() < 2**32


@triton.jit
def cast_kernel(x, y, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(y + places, cast(tl.load(x + places), y.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cast_rounds_to_nearest_even(dtype):
    torch.manual_seed(0)
    halfway = 1 + torch.arange(64) / 256  # every second one lies between two bfloat16 numbers
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 1.0, -2.5])
    x = torch.cat([halfway, -halfway, torch.randn(512 - 128 - 8), special])
    y = torch.zeros(512, dtype=dtype)
    cast_kernel[(1,)](x, y, SIZE=512)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))


@triton.jit
def softmax_kernel(scores, state, COLUMNS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for first in range(0, COLUMNS, TILE):
        tile = tl.load(scores + rows[:, None] * COLUMNS + first + tl.arange(0, TILE)[None, :])
        _weights, _correction, row_max, row_sum = online_softmax_update(tile, 0.5, None, row_max, row_sum)
    tl.store(state + rows, row_max)
    tl.store(state + ROWS + rows, row_sum)


def test_online_softmax_meets_tiles_without_keys():
    torch.manual_seed(0)
    scores = 16 * torch.randn(4, 64)
    scores[0] = -torch.inf
    scores[1, :48] = -torch.inf
    scores[2, 16:] = -torch.inf
    state = torch.full((2, 4), torch.nan)
    softmax_kernel[(1,)](scores, state, COLUMNS=64, TILE=16, ROWS=4)
    row_max, row_sum = state
    assert row_max[0] == -torch.inf and row_sum[0] == 0
    ln_2 = torch.log(torch.tensor(2.0).double())
    expected = (scores[1:].double() / 2 * ln_2).logsumexp(1) / ln_2
    torch.testing.assert_close((row_max + row_sum.log2())[1:].double(), expected, atol=1e-5, rtol=1e-6)
