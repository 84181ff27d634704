"""Kernels on CPU tensors in Triton's interpreter."""

import os

import pytest
import torch

# On a machine with a GPU the kernels are compiled, unless TRITON_INTERPRET=1 is asked for.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py", "*/test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, or an absurd integer: whoever does not write all of an output shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        with torch.no_grad():  # torch 2.11's checkpoints ask for memory that requires a gradient
            return tensor.fill_(torch.nan if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def masks_are_booleans(monkeypatch):
    """A mask of integers is refused, as triton 3.9 does; 3.7 takes what is not 0 for true."""
    builder = pytest.importorskip("triton.runtime.interpreter").InterpreterBuilder
    for name, place in (("create_masked_load", 1), ("create_masked_store", 2)):
        plain = getattr(builder, name)

        def checked(self, *args, plain=plain, place=place):
            assert args[place].data.dtype == bool, f"a mask of {args[place].data.dtype}"
            return plain(self, *args)

        monkeypatch.setattr(builder, name, checked)
