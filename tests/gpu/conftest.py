"""On a GPU: memory that nobody has written reads as NaN, and what becomes of every test is on disk as soon as it ends.

A test that breaks the device, with an illegal access for example, leaves a process in which every other test would
fail. So that process ends, and whoever started it (bench/gpu_test.py) goes on in another one.
"""

import contextlib
import os
from pathlib import Path

import pytest
import torch

CUDA = torch.device("cuda")


def pytest_addoption(parser):
    parser.addoption("--outcomes", type=Path, help="the file that gets a line for each test as soon as it ends")
    parser.addoption("--limit", type=float, default=240.0, help="seconds that a test may take; then its process ends")


def pytest_configure(config):
    config.addinivalue_line("markers", "alone: make gpu-test gives this test a process of its own")
    config.addinivalue_line("markers", "report_only: what this test finds is reported, and fails nothing")


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        for item in session.items:
            tell(session.config, item.nodeid, "collected", marks=[mark.name for mark in item.iter_markers()])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """As in ../conftest.py, but strict determinism would keep torch from using cuDNN's attention."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def tell(config, nodeid, outcome, **more):
    """Add a line to the file of outcomes, if there is one."""
    from memflow_ops.bench.harness.outcomes import append

    if target := config.getoption("--outcomes"):
        append(target, test=nodeid, outcome=outcome, **more)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that hangs ends its process."""
    from memflow_ops.bench.harness.outcomes import limited

    limit = item.config.getoption("--limit")
    here = limited(limit, lambda: tell(item.config, item.nodeid, "hung", words=f"it took more than {limit:.0f} s"))
    with here if item.config.getoption("--outcomes") else contextlib.nullcontext():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and torch.cuda.is_available():
        from memflow_ops.bench.harness.outcomes import ENDED, why_lost

        if lost := why_lost(CUDA):
            tell(item.config, item.nodeid, "lost", words=f"{lost}\n{report.longreprtext[-1500:]}")
            os._exit(ENDED)
    return report


@pytest.hookimpl
def pytest_sessionstart(session):
    session.config.pluginmanager.register(Outcomes(session.config))


class Outcomes:
    """Writes a line for each test in the process that hears of all of them, which is not one of xdist's workers."""

    def __init__(self, config):
        self.config, self.writes = config, not hasattr(config, "workerinput")

    def pytest_runtest_logreport(self, report):
        if not self.writes or (report.when != "call" and report.passed):
            return
        words = ""
        if report.skipped:
            words = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        elif report.failed:
            words = report.longreprtext[-1500:]
        outcome = "error" if report.failed and report.when in ("setup", "teardown") else report.outcome
        tell(self.config, report.nodeid, outcome, seconds=round(getattr(report, "duration", 0.0), 2), words=words)
