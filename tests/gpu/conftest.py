"""On a GPU: memory that nobody has written reads as NaN, and `--record` puts the outcome beside the benchmarks."""

import time
from pathlib import Path

import pytest
import torch

STARTED = time.perf_counter()


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FOLDER", help="write the outcome to <device>-<date>.json in this folder")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """As in ../conftest.py, but strict determinism would keep torch from using cuDNN's attention."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter, config):
    folder = config.getoption("--record", default=None)
    if not folder or not torch.cuda.is_available():
        return
    from memflow_ops.bench.harness.results import record

    reports = terminalreporter.stats
    skips = sorted({str(report.longrepr[2]) for report in reports.get("skipped", [])})
    outcome = {
        **{name: len(reports.get(name, [])) for name in ("passed", "failed", "error", "skipped")},
        "skip_reasons": skips,
        "failures": [report.nodeid for name in ("failed", "error") for report in reports.get(name, [])],
        "seconds": round(time.perf_counter() - STARTED),
    }
    target = record(Path(folder), torch.device("cuda"), "gpu_test", outcome)
    terminalreporter.write_line(f"written to {target}")
    for reason in skips:
        terminalreporter.write_line(f"skipped: {reason}")
