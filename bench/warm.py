"""`make gpu-warm`: compiles what `make gpu-test` and `make gpu-bench` need before they start, and measures nothing.

    python -m memflow_ops.bench.warm [--jobs 16]

Their Python runs on a stand-in for this GPU, which records every launch, and the kernels are compiled in several
processes into the cache on disk, with the C code that launches them. What torch's own compiler makes, and the cases of
a part whose Python does not run on the stand-in, are called on the GPU instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict

import torch

from memflow_ops.bench.cases.registry import chosen
from memflow_ops.bench.parts import PARTS, cases_of
from memflow_ops.bench.preflight import CACHE, TESTS, Ran, kernels_of, run_all, table
from memflow_ops.bench.run import DEFAULT_GROUPS
from memflow_ops.bench.stand_in.gpu import Gpu
from memflow_ops.bench.stand_in.launches import Compiled, compile_all
from memflow_ops.environment import ROOT, pick_device

TORCH_COMPILES = ("op/memory_attention/wan-1.3b/bfloat16",)
"""Cases with a contender that torch compiles: FlexAttention."""
TESTS_TORCH_COMPILES = "compiled"
"""Part of the names of the tests that call torch.compile."""


def this_gpu(device: torch.device) -> Gpu:
    """The GPU that is here."""
    about = torch.cuda.get_device_properties(device)
    return Gpu(
        about.name, about.major, about.minor, about.multi_processor_count, about.L2_cache_size, about.total_memory
    )


@torch.no_grad()
def call_contenders(name: str, device: str, groups: tuple[str, ...] = DEFAULT_GROUPS) -> str:
    """Call every contender of the case of that name once; return what went wrong, or an empty string."""
    (case,) = (case for case in chosen(torch.device(device).type, groups, name) if case.name == name)
    try:
        for contender in case.build(torch.device(device), 0).contenders.values():
            contender.call()
    except Exception as error:  # Whatever it is, the other cases are to be compiled.
        return f"{type(error).__name__}: {error}"
    return ""


def call(names: Sequence[str], device: str, jobs: int, report: Callable[[str, str], None]) -> None:
    """Call the contenders of these cases in so many processes. report(name, error) is called after each case."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {name: pool.submit(call_contenders, name, device) for name in names}
        for name, future in running.items():
            report(name, future.result())


def to_be_called(ran: dict[str, Ran]) -> list[str]:
    """The cases that torch compiles, and those of parts whose Python did not run. Streams do not fit beside others."""
    cases = chosen("cuda", DEFAULT_GROUPS)
    failed = [
        case.name for part in PARTS if ran[part].error for case in cases_of(part, cases) if case.level != "stream"
    ]
    return sorted({*failed, *TORCH_COMPILES})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    options = parser.parse_args()
    try:
        device = pick_device("cuda")
    except ValueError as error:
        parser.exit(2, f"gpu-warm: {error}\n")
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))
    began = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {words}", flush=True)

    ran = run_all([TESTS, *PARTS], json.dumps(asdict(this_gpu(device))), options.jobs)
    for name, of in ran.items():
        if of.error:
            say(f"{name} does not run on the stand-in, so the GPU compiles for it:\n{of.error}")
    kernels = kernels_of(ran)
    say(f"{len(kernels)} kernels are recorded")

    def failed(of: Compiled) -> None:
        if of.error:
            say(f"{of.kernel.module}.{of.kernel.name}: {of.error}")

    compiled = compile_all(kernels, options.jobs, stubs=True, report=failed)
    say(f"{sum(not of.error for of in compiled.values())} kernels are compiled")
    print("\n".join(table(ran, compiled)))
    # These use the GPU, so only a few do so at a time. Their outcome is for gpu-test and gpu-bench to tell.
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
    ]
    several = subprocess.Popen([*tests, "-n", "4", "tests/gpu", "-k", TESTS_TORCH_COMPILES], cwd=ROOT)
    call(to_be_called(ran), "cuda", 4, lambda name, error: say(f"{name}: {error or 'called'}"))
    several.wait()
    say("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
