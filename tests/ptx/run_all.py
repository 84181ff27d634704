"""Every case of ptx_cases.py, one line each, and then what taking out barriers, waits and fences is seen as.

    make ptx PTX_OPTIONS="--only window --capabilities 90 --modes plain,hard --mutations --jobs 4"

Ends with status 1 where a result is wrong or a fault was found.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

import mutations
import ptx_cases
import triton
from ptx_emulator.build import core, why_not

MUTATED = (
    "window",
    "bank",
    "per query",
    "backward",
    "selection of groups",
    "selection per query",
    "cache write, clean pass",
    "retrieval, coverage",
    "bank, in Gluon",
)
"""The cases from whose kernels instructions are taken out."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--capabilities", default="80,90")
    parser.add_argument("--modes", default="plain,hard")
    parser.add_argument("--mutations", action="store_true", help="also take out barriers, waits and fences, one by one")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    if why_not():
        print(why_not())
        return 1
    core()
    capabilities = [int(x) for x in options.capabilities.split(",")]
    names = [name for name in ptx_cases.CASES if options.only in name]
    print(f"triton {triton.__version__}: {len(names)} cases on {options.capabilities}, {options.modes}", flush=True)
    # Modes of a case run in one process, one after the other: the second finds its kernels compiled.
    jobs = [(name, capability, options.modes.split(",")) for capability in capabilities for name in names]
    notes: Counter[str] = Counter()
    runs = bad = 0
    for outcomes in in_processes(run_modes, jobs, options.jobs):
        for line, failed, noted in outcomes:
            print(line, flush=True)
            runs += 1
            bad += failed
            notes.update(noted)
    print(f"{runs} runs, {bad} of them bad; noted, and no faults: {dict(notes.most_common())}", flush=True)
    if options.mutations:
        mutate([(name, capability) for name in MUTATED if name in names for capability in capabilities], options.jobs)
    return int(bad > 0)


def in_processes(function: Callable, jobs: Iterable[tuple], count: int) -> Iterable:
    """The results of function(*job), as they come."""
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(function, *job) for job in jobs]):
            yield future.result()


def run_modes(name: str, capability: int, modes: list[str]) -> list[tuple[str, bool, Counter[str]]]:
    """Of each mode: a line to print, whether it failed, and what was noted."""
    results = []
    for mode in modes:
        outcome = ptx_cases.run(name, capability, mode)
        kernels = ", ".join(f"{kernel} {count}" for kernel, count in outcome.kernels.items())
        line = f"sm_{capability} {mode} | {name} | {outcome.error or 'right'} | {len(outcome.faults)} faults | "
        line += f"{outcome.seconds:.1f} s | instructions of warps: {kernels}"
        line += "".join(f"\n    {fault}" for fault in outcome.faults[:6])
        results.append((line, bool(outcome.error or outcome.faults), outcome.notes))
    return results


def mutate(jobs: list[tuple[str, int]], count: int) -> None:
    """Print a table of verdicts by kernel and kind of instruction, and why the unseen ones are harmless."""
    table: dict[tuple[str, str, str], Counter[str]] = {}
    for found in in_processes(all_verdicts, jobs, count):
        for key, verdict in found:
            table.setdefault(key, Counter())[verdict] += 1
    print("\ntaken out of compiled kernels, one at a time: seen / noted / wrong result only / unseen")
    totals: dict[str, Counter[str]] = {}
    for (architecture, kernel, kind), counts in sorted(table.items()):
        totals.setdefault(kind, Counter()).update(counts)
        print(f"{architecture} {kernel:26} {kind:22} {as_row(counts)}")
    print("\nin all, and why the unseen are harmless")
    for kind, counts in totals.items():
        print(f"{kind:22} {as_row(counts)}  {mutations.HARMLESS[kind] if counts['unseen'] else ''}")


def as_row(counts: Counter[str]) -> str:
    return " ".join(f"{counts[verdict]:5}" for verdict in ("seen", "noted", "wrong", "unseen"))


def all_verdicts(name: str, capability: int) -> list[tuple[tuple[str, str, str], str]]:
    found = mutations.verdicts(name, capability)
    return [((f"sm_{capability}", mutation.kernel, mutation.kind), verdict) for mutation, verdict in found]


if __name__ == "__main__":
    sys.exit(main())
