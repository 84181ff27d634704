"""Tests for test_gpu_test.py that end in every way there is; `make gpu-test` is to survive all of them."""

import os
import time

import pytest
import torch


@pytest.mark.parametrize("number", range(4))
def test_right(number):
    assert number < 4


def test_wrong():
    assert 1 == 2, "one is not two"


def test_skipped():
    pytest.skip("for a reason")


def test_that_hangs():
    time.sleep(100)


def test_that_breaks_the_device():
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more words")

    # Its process ends before any other test could meet this.
    torch.cuda.synchronize = broken
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize()


def test_that_ends_its_process():
    os._exit(9)


@pytest.mark.alone
def test_that_needs_another_ptxas():
    assert "PYTEST_XDIST_WORKER" not in os.environ
    if not {"TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"} <= set(os.environ):
        os._exit(11)


@pytest.mark.alone
@pytest.mark.report_only
def test_whose_failure_is_only_reported():
    raise AssertionError("as the sanitizer says")
