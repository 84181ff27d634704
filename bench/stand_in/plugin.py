"""A pytest plugin: tests for a GPU run on the stand-in, without assertions, and their launches are recorded.

PYTHONOPTIMIZE=1 python -m pytest -p memflow_ops.bench.stand_in.plugin --recorded FILE --assert=plain tests/gpu
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memflow_ops.bench.stand_in.gpu import gpu_of, install
from memflow_ops.bench.stand_in.launches import Recorder

_RECORDER = pytest.StashKey[Recorder]()


def pytest_addoption(parser):
    group = parser.getgroup("stand-in for a GPU")
    group.addoption("--stand-in", default="H100", help="the GPU that is pretended to be here, as `gpu_of` takes it")
    group.addoption("--recorded", type=Path, required=True, help="the file, or start of files, of the launches")


def pytest_load_initial_conftests(early_config, parser, args):
    """Before the tests' own conftest.py asks whether there is a GPU."""
    if __debug__:
        raise pytest.UsageError(
            "the stand-in computes no values that an assertion could hold for: set PYTHONOPTIMIZE=1"
        )
    gpu = gpu_of(early_config.known_args_namespace.stand_in)
    early_config.stash[_RECORDER] = Recorder(gpu)
    install(gpu)
    torch.library.opcheck = _called_once  # type: ignore[assignment]


def _called_once(operator, arguments, *_, **__):
    """In the place of opcheck, which compares values."""
    operator(*arguments)
    return {"test_schema": "SUCCESS"}


def pytest_sessionstart(session):
    session.config.stash[_RECORDER].start()


def pytest_runtest_setup(item):
    item.config.stash[_RECORDER].now = item.nodeid


def pytest_sessionfinish(session):
    """Each of xdist's workers writes a file of its own."""
    target, worker = session.config.getoption("--recorded"), getattr(session.config, "workerinput", None)
    if worker is not None:
        target = target.with_name(f"{target.name}-{worker['workerid']}")
    session.config.stash[_RECORDER].write(target)
