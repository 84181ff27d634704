"""Offsets beyond 2^31 elements: views with large strides over memory that is committed only where it is written."""

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.plan import attend
from memflow_ops.kernels.selection.describe import describe_blocks
from memflow_ops.kernels.selection.groups import select_blocks

FAR = 2**31 + 2**20  # elements, 4 GiB of bfloat16


@pytest.fixture(autouse=True)
def tensors_in_place(monkeypatch):
    """The interpreter copies each argument back onto itself, which would commit all of its memory."""
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)


def far_copy(x, dimension):
    """x (two or more long in `dimension`) with its last index there more than 2^31 elements from the first."""
    memory = torch.from_numpy(np.empty(FAR + x.numel() * 2, np.int16)).view(torch.bfloat16)
    strides = list(x.stride())
    strides[dimension] = FAR // (x.shape[dimension] - 1)
    return memory.as_strided(x.shape, strides).copy_(x)


DIMENSIONS = pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "token", "head"])


@DIMENSIONS
def test_describe(dimension):
    torch.manual_seed(0)
    k = torch.randn(2, 40, 2, 16).bfloat16()
    assert torch.equal(describe_blocks(far_copy(k, dimension), 16, 40), describe_blocks(k, 16, 40))


@DIMENSIONS
def test_select(dimension):
    torch.manual_seed(1)
    q, descriptors = torch.randn(2, 2, 20, 2, 16).bfloat16()
    geometry = Geometry(block_size=1, frame_tokens=4, query_group=1, softmax_scale=1.0)
    expected = select_blocks(q, descriptors, 5, geometry)
    assert torch.equal(select_blocks(far_copy(q, dimension), descriptors, 5, geometry), expected)
    assert torch.equal(select_blocks(q, far_copy(descriptors, dimension), 5, geometry), expected)


@DIMENSIONS
@pytest.mark.parametrize("names", ["q", "kv", "memory", "resume_out"])
def test_attend(names, dimension):
    torch.manual_seed(2)
    q, k, memory, state = torch.randn(4, 2, 40, 2, 16).bfloat16()
    lse = torch.randn(2, 2, 40)
    indices = torch.tensor([0, 2], dtype=torch.int32).expand(2, 2, 2, 2)

    def run(q, k, memory, state):
        geometry = Geometry(block_size=16, frame_tokens=40, query_group=20, softmax_scale=0.25)
        return attend(q, k, k, memory, memory, indices, geometry, (state, lse))

    tensors = dict(q=q, kv=k, memory=memory, resume_out=state)
    expected = run(*tensors.values())
    out, lse_out = run(*{**tensors, names: far_copy(tensors[names], dimension)}.values())
    assert torch.equal(out, expected[0]) and torch.equal(lse_out, expected[1])
