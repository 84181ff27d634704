"""Which bytes a launch may touch, and which count as written."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import problems
from ptx_emulator.memory import Written, elements, pieces, stretches


def test_elements_of_a_strided_tensor():
    x = torch.zeros(3, 4, 5, dtype=torch.int16)[:, ::2, 1:3]
    marked = elements(x)
    assert len(marked) == 2 * (2 * 20 + 1 * 10 + 1 + 1)
    expected = np.zeros_like(marked)
    for i in range(3):
        for j in range(2):
            for k in range(2):
                at = 2 * (20 * i + 10 * j + k)
                expected[at : at + 2] = 1
    assert (marked == expected).all()


def test_tensors_that_overlap_are_one_stretch():
    x = torch.zeros(10, 4)
    (stretch,) = stretches([("a", x[:5, :2]), ("b", x[3:, 1:])], Written())
    assert stretch.names == "a+b" and stretch.base == x.data_ptr()
    marked = stretch.allowed.reshape(-1, 4)[:, 0]
    expected = torch.zeros(10, 4)
    expected[:5, :2] = expected[3:, 1:] = 1
    assert (marked == expected.flatten().numpy()[: len(marked)]).all()


def test_elements_far_apart_are_stretches_of_their_own():
    pool = torch.empty_strided((2, 8), (1 << 24, 1))
    assert [piece.shape for piece in pieces(pool)] == [(8,), (8,)]
    assert len(stretches([("pool", pool)], Written())) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_what_the_host_writes_is_written(dtype):
    written = Written()
    x = written.poison(torch.empty(8, dtype=dtype))
    x[2:4] = 0
    (stretch,) = stretches([("x", x)], written)
    expected = np.repeat(np.array([0, 0, 1, 1, 0, 0, 0, 0], np.uint8), x.element_size())
    assert (stretch.defined == expected).all()
    (other,) = stretches([("y", torch.zeros(3))], written)
    assert other.defined.all()


def test_a_launch_that_reads_a_key_too_many(compiling):
    """What it reads there is undefined, and so is what follows from it."""
    assert "out_of_bounds" in compiling(problems.faults_of_a_key_too_many, 80)
