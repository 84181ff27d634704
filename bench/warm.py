"""`make gpu-warm`: compiles what the cases for a GPU need, in several processes at a time, and measures nothing.

    python -m memflow_ops.bench.warm [--jobs 8] [--case NAME]

Triton and torch keep what they compiled on disk, so that `make gpu-bench` has the GPU for the measurements. Streams are
left out, because several do not fit the GPU together and a layer compiles most of what they need.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from memflow_ops.bench.cases.registry import chosen
from memflow_ops.bench.run import DEFAULT_GROUPS
from memflow_ops.environment import pick_device


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


def warm(names: list[str], device: str, jobs: int, report: Callable[[str, str], None]) -> None:
    """Call the contenders of these cases in so many processes. report(name, error) is called after each case."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {name: pool.submit(call_contenders, name, device) for name in names}
        for name, future in running.items():
            report(name, future.result())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--case", default="", help="part of a case's name")
    arguments = parser.parse_args()
    try:
        pick_device("cuda")
        cases = chosen("cuda", DEFAULT_GROUPS, arguments.case)
    except ValueError as error:
        parser.exit(2, f"gpu-warm: {error}\n")
    names = [case.name for case in cases if case.level != "stream"]
    warm(names, "cuda", arguments.jobs, lambda name, error: print(f"{name}: {error or 'compiled'}", flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
