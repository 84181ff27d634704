"""`make gpu-bench`: the benchmarks on a GPU, part by part, each within its minutes.

    python -m memflow_ops.bench.gpu_bench [--part first] [--minutes 8] [--out FOLDER]

What a contender computes is checked before it is timed. Every case is kept in FOLDER as soon as it is measured, its
rows in bench-<device>.json and what became of it in gpu-bench.jsonl. A case that breaks the device, or that takes
longer than it may, ends its process alone: another one measures the cases after it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from memflow_ops.bench.harness.case import Case
from memflow_ops.bench.harness.clock import Clock
from memflow_ops.bench.harness.outcomes import ENDED, append, first_line, limited, lines, why_lost
from memflow_ops.bench.parts import MINUTES, PARTS, cases_of
from memflow_ops.bench.run import RESULTS, Session, stored

OUTCOMES = "gpu-bench.jsonl"
_CASE_SECONDS = 180.0
"""What a case may take, with its checks."""
_TIMED_SECONDS = 1.5
"""A case is timed at least so long, in more rounds than its own where it needs them: clocks settle, and are sampled."""
_MOST_ROUNDS = 1000


@torch.no_grad()
def measure(session: Session, cases: Sequence[Case], outcomes: Path, until: float) -> int:
    """Measure cases one after the other and write what becomes of each. Returns 0, or ENDED if the device is lost.

    until: the reading of time.monotonic() from which on no other case is begun.
    """
    with Clock(session.device.index or 0) as clock:
        for case in cases:
            if time.monotonic() >= until:
                append(outcomes, case=case.name, outcome="late")
                continue
            append(outcomes, case=case.name, outcome="begun")
            began, result = time.monotonic(), {"outcome": "measured"}
            hung = lambda name=case.name: append(outcomes, case=name, outcome="hung", words="took too long")  # noqa: E731
            with limited(_CASE_SECONDS, hung):
                try:
                    result |= _measure_one(session, case, clock, until)
                except Exception as error:  # One that fails is no reason to lose the others.
                    result = {"outcome": "failed", "words": first_line(error)}
            seconds = round(time.monotonic() - began, 1)
            append(outcomes, case=case.name, seconds=seconds, **result)
            if result["outcome"] == "failed" and (lost := why_lost(session.device)):
                append(outcomes, case=case.name, outcome="lost", words=lost)
                return ENDED
    return 0


def _measure_one(session: Session, case: Case, clock: Clock, until: float) -> dict[str, Any]:
    contest, rounds = session.contest(case), session.rounds_of(case)
    start = time.perf_counter()
    while contest.round < rounds or (
        # The history of a stream has room for its own rounds alone.
        case.level != "stream" and time.perf_counter() < start + _TIMED_SECONDS and contest.round < _MOST_ROUNDS
    ):
        contest.run_round()
        if time.monotonic() >= until and contest.round >= 3:
            break
    clocked = clock.between(start, time.perf_counter())
    session.finish(contest, clocked)
    return {"rounds": contest.round, **clocked}


def run_part(part: str, out: Path, minutes: float, command: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Measure a part in a process of its own, and in another one where that ends early. Returns the outcomes by case.

    command: the process, in tests; it gets the names of the cases that are not to be measured again.
    """
    outcomes, until = out / OUTCOMES, time.monotonic() + 60 * minutes
    before, done = len(lines(outcomes)), {}  # type: tuple[int, dict[str, dict[str, Any]]]
    while (left := until - time.monotonic()) > 0:
        words = command or (sys.executable, "-m", "memflow_ops.bench.gpu_bench", "--measure", "--out", str(out))
        process = subprocess.Popen(
            [*words, "--part", part, "--minutes", str(left / 60), "--without", *done], start_new_session=True
        )
        try:
            # A case that is begun in time may finish.
            code = process.wait(left + _CASE_SECONDS)
        finally:
            process.kill()
        done = outcomes_of(lines(outcomes)[before:])
        begun = [name for name, outcome in done.items() if outcome["outcome"] == "begun"]
        for name in begun:
            words_of_end = f"its process ended with status {code}"
            append(outcomes, case=name, outcome="died", words=words_of_end)
            done[name] = {"case": name, "outcome": "died", "words": words_of_end}
        if code != ENDED and not begun:
            break
    return done


def outcomes_of(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last line of each case."""
    return {line["case"]: line for line in found}


def show(part: str, out: Path, done: dict[str, dict[str, Any]], seconds: float) -> None:
    """Print what was measured, the ratio over each contender, and what was not measured."""
    measured = {name for name, outcome in done.items() if outcome["outcome"] == "measured"}
    print(f"\npart {part}: {len(measured)} of {len(done)} cases in {seconds:.0f} s; {PARTS[part].says}")
    for row in stored(out, "cuda")["rows"] if measured else ():
        if row["case"] in measured:
            rate = f"{row['tflops']:7.1f} TFLOP/s" if "tflops" in row else " " * 15
            clock = f"{row['sm_mhz']:5.0f} MHz" if "sm_mhz" in row else ""
            name = f"{row['case']}, {row['contender']}"
            print(f"{row['seconds']['p50'] * 1e6:10.1f} us {rate} {clock}  x{row['ours_over_this']['p50']:.3f}  {name}")
    for name, outcome in done.items():
        if outcome["outcome"] != "measured":
            print(f"{outcome['outcome']:>10}: {name} {outcome.get('words', '')}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PARTS), help="one part; all of them, if it is left out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of a part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--without", nargs="*", default=[], help=argparse.SUPPRESS)
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    if options.measure:
        session = Session("cuda", out=options.out)
        cases = [case for case in cases_of(options.part, session.cases) if case.name not in options.without]
        return measure(session, cases, options.out / OUTCOMES, until)
    try:
        Session("cuda", out=options.out)
    except ValueError as error:
        parser.exit(2, f"gpu-bench: {error}\n")
    failed = 0
    for part in [options.part] if options.part else list(PARTS):
        began = time.monotonic()
        done = run_part(part, options.out, options.minutes)
        show(part, options.out, done, time.monotonic() - began)
        failed += sum(outcome["outcome"] not in ("measured", "late") for outcome in done.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
