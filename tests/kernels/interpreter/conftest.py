"""Kernels on CPU tensors in Triton's interpreter.

Triton decides at its import whether it interprets, and interpreted functions cannot be compiled. So these tests are
collected only where TRITON_INTERPRET=1 is set: ../test_interpreter.py starts such a process.
"""

import os

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETING else ["test_*.py"]

if INTERPRETING:
    from hypothesis import HealthCheck, Phase, settings

    settings.register_profile(
        "interpreter",
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # to shrink an example takes minutes here
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("interpreter")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds NaN, or an absurd integer: whoever does not write all of an output shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)
