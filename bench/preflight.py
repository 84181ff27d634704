"""`make gpu-preflight`: what `make gpu-test` and `make gpu-bench` will ask of the compiler, found out without a GPU.

    python -m memflow_ops.bench.preflight [--gpu H100] [--jobs 2] [--only first] [--no-compile]

All of their Python runs on a stand-in for the GPU (bench/stand_in), every launch is recorded, and each kernel is
compiled ahead of time into Triton's cache. It lists kernels and seconds for the tests and for each part of the
benchmarks, and fails where Python or the compiler does. So no test and no benchmark meets the compiler for the first
time on a rented GPU. What torch's own compiler makes (FlexAttention, compiled layers) is not among it: the stand-in
calls those eagerly.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from memflow_ops.bench.parts import PARTS
from memflow_ops.bench.stand_in.gpu import GPUS
from memflow_ops.bench.stand_in.launches import Compiled, Kernel, Recorded, compile_all, read
from memflow_ops.environment import ROOT

TESTS = "gpu-test"
"""The name of the tests, beside those of the parts of the benchmarks."""
CACHE = ROOT / "build" / "gpu" / "triton"
"""Triton's cache: of this command, and of everything that runs on a GPU (see the Makefile)."""


@dataclass(frozen=True)
class Ran:
    """What a run on the stand-in left."""

    recorded: Recorded
    seconds: float
    error: str
    """What it said, if it failed."""


def command_of(what: str, gpu: str, target: Path, jobs: int = 1) -> list[str]:
    """The command that runs the tests, or a part of the benchmarks, on the stand-in and writes what it records."""
    if what != TESTS:
        return [sys.executable, "-m", "memflow_ops.bench.stand_in.cases", "--gpu", gpu, what, str(target)]
    several = ["-n", str(jobs)] if jobs > 1 else []
    return [
        *(sys.executable, "-m", "pytest", "-p", "memflow_ops.bench.stand_in.plugin", "--stand-in", gpu),
        *("--recorded", str(target), "--assert=plain", "-o", "addopts=", "-q", "--strict-markers", "--tb=short"),
        *("--import-mode=importlib", "-p", "no:cacheprovider", *several, "tests/gpu"),
    ]


def run_on_stand_in(what: str, gpu: str, jobs: int = 1) -> Ran:
    """Run the tests, or a part of the benchmarks, on the stand-in, in a process of its own."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "recorded"
        # Python without assertions has bytecode of its own, which is worth keeping where other bytecode is not kept.
        bytecode = str(ROOT / "build" / "gpu" / "bytecode")
        environment = {**os.environ, "PYTHONOPTIMIZE": "1", "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = command_of(what, gpu, target, jobs)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        recorded = read(*sorted(Path(folder).glob("recorded*")))
    error = "" if done.returncode == 0 else (done.stdout[-6000:] + done.stderr[-3000:]).strip()
    return Ran(recorded, time.monotonic() - began, error)


def run_all(names: Sequence[str], gpu: str, jobs: int) -> dict[str, Ran]:
    """Run several of them beside one another."""
    with ThreadPoolExecutor(max(1, jobs)) as pool:
        test_jobs = max(1, jobs - len(PARTS))
        return dict(zip(names, pool.map(lambda name: run_on_stand_in(name, gpu, test_jobs), names), strict=True))


def table(ran: dict[str, Ran], compiled: dict[str, Compiled]) -> list[str]:
    """A line for each: its launches, its kernels, those that nothing before it needs, and their compile seconds."""
    said = [f"{'':12}{'launches':>9}{'kernels':>9}{'new':>6}{'compile s':>11}{'python s':>10}"]
    seen: set[str] = set()
    for name, of in ran.items():
        new = set(of.recorded.kernels) - seen
        seen |= new
        seconds = sum(compiled[key].seconds for key in new if key in compiled)
        said.append(
            f"{name:12}{of.recorded.launches:9}{len(of.recorded.kernels):9}{len(new):6}{seconds:11.1f}{of.seconds:10.1f}"
        )
    return said


def kernels_of(ran: dict[str, Ran]) -> dict[str, Kernel]:
    """All kernels, by key."""
    return {key: kernel for of in ran.values() for key, kernel in of.recorded.kernels.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=list(GPUS), default="H100", help="the GPU that is pretended to be here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--only", choices=[TESTS, *PARTS], help="the tests, or one part of the benchmarks")
    parser.add_argument("--no-compile", action="store_true", help="run the Python alone")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    names = [options.only] if options.only else [TESTS, *PARTS]
    ran = run_all(names, options.gpu, options.jobs)
    compiled = {} if options.no_compile else compile_all(kernels_of(ran), options.jobs)
    print("\n".join(table(ran, compiled)))
    wrong = [f"{name} does not run:\n{of.error}" for name, of in ran.items() if of.error]
    wrong += [f"{of.kernel.module}.{of.kernel.name}: {of.error}" for of in compiled.values() if of.error]
    print("\n".join(wrong) or f"gpu-preflight: {len(kernels_of(ran))} kernels are known for {options.gpu}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
