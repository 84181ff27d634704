"""Measures the registry's cases and keeps the results of each device.

    python -m memflow_ops.bench.run [--size wan-1.3b --size long] [--case NAME] [--rounds N] [--out bench/results]

`Session` is what `make bench` (pytest-benchmark), `memflow bench` and this command have in common.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from memflow_ops.allocator import keep_freed_memory
from memflow_ops.bench.cases.registry import GROUPS, chosen
from memflow_ops.bench.cases.streams import ROOM
from memflow_ops.bench.harness.case import OURS, Case
from memflow_ops.bench.harness.ceilings import copy_ceiling, product_ceiling
from memflow_ops.bench.harness.contest import Contest
from memflow_ops.bench.harness.results import bench_file, comparable, compared, keep, load_bench
from memflow_ops.bench.report.table import overhead
from memflow_ops.environment import environment, pick_device, version
from memflow_ops.files import check_folder

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT_GROUPS = GROUPS[1:]


class Session:
    """A run over some cases on a device; every finished case is kept at once."""

    def __init__(self, device: str = "auto", groups: Sequence[str] = (), named: str = "", rounds: int | None = None,
                 out: Path = RESULTS, compare: bool = False):  # fmt: skip
        self.device = pick_device(device)
        self.cases = chosen(self.device.type, groups or DEFAULT_GROUPS, named)
        room = min((ROOM // 2 * case.rounds for case in self.cases if case.level == "stream"), default=rounds or 0)
        if rounds and rounds > room:
            raise ValueError(f"the history of a stream has room for {room} rounds, got {rounds}; see --case for others")
        if rounds is not None and rounds < 1:
            raise ValueError(f"rounds must be positive, got {rounds}")
        self.rounds = rounds
        kept = keep_freed_memory()  # for all contenders: page faults would be half of the spread
        self.about = {**environment(self.device), "triton": version("triton"), "keeps_freed_memory": kept}
        self.target = bench_file(out, self.about)
        # what is damaged, cannot be compared or cannot be written shows before anything is measured
        if compare:
            comparable(self.target, {case.name: case.all_settings() for case in self.cases})
        else:
            load_bench(self.target)
            check_folder(out)
        self._ceilings: dict[str, float] = {}

    def rounds_of(self, case: Case) -> int:
        return self.rounds or case.rounds

    def contest(self, case: Case) -> Contest:
        """The case, built and checked; with what the device reaches at the most in its dtype."""
        if "gbs" not in self._ceilings:
            self._ceilings["gbs"] = copy_ceiling(self.device)
        if (product := f"tflops_{case.dtype}") not in self._ceilings:
            self._ceilings[product] = product_ceiling(self.device, case.dtype)
        return Contest(case, self.device)

    def rows(self, contest: Contest) -> list[dict[str, Any]]:
        return contest.rows(self._ceilings, self.about)

    def finish(self, contest: Contest) -> list[dict[str, Any]]:
        """The case's rows, kept in the device's file."""
        rows = self.rows(contest)
        keep(self.target, rows, self._ceilings, self.about)
        return rows

    def worse(self, contest: Contest) -> str:
        """How ours is worse than the stored result of this device; empty where it is not. What is within the spread is
        measured once more, with twice the rounds where a stream has room for them, and judged by that alone."""
        (ours, *_) = self.rows(contest)
        found = compared(ours, self.target)
        if found is not None and found.in_doubt:
            case, done = contest.case, contest.round
            contest.start_over()
            for _ in range(min(2 * done, ROOM * case.rounds - done) if case.level == "stream" else 2 * done):
                contest.run_round()
            (ours, *_) = self.rows(contest)
            found = compared(ours, self.target)
        return "" if found is None else found.words


@torch.no_grad()
def measure(session: Session, report: Callable[[Case, int, int], None]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """All of a session's cases: rows of results, and what went wrong by case, because one that fails is no reason to
    lose the others. report(case, done, total) is called before each."""
    rows, failed = [], {}
    for number, case in enumerate(session.cases):
        report(case, number, len(session.cases))
        try:
            contest = session.contest(case)
            for _ in range(session.rounds_of(case)):
                contest.run_round()
            rows += session.finish(contest)
        except Exception as error:
            failed[case.name] = f"{type(error).__name__}: {error}"
    return rows, failed


def stored(out: Path, device: str = "auto") -> dict[str, Any]:
    """The stored results of a device; a ValueError where there are none."""
    about = environment(pick_device(device))
    target = bench_file(out, about)
    if not target.is_file():
        raise ValueError(
            f"no results of {about['device']} in {out}: run `memflow bench`, or `make bench` in a checkout"
        )
    return load_bench(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", default=[], choices=GROUPS)
    parser.add_argument("--case", default="", help="part of a case's name")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    try:
        session = Session(arguments.device, arguments.size, arguments.case, arguments.rounds, arguments.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    started, finished = time.perf_counter(), 0

    def report(case: Case, done: int, total: int) -> None:
        nonlocal finished
        finished = done
        print(f"[{done + 1}/{total}, {time.perf_counter() - started:.0f} s] {case.name}", flush=True)

    try:
        rows, failures = measure(session, report)
    except KeyboardInterrupt:
        kept = f"; what was finished is in {session.target}" if finished else ""
        print(f"interrupted after {finished} of {len(session.cases)} cases{kept}", file=sys.stderr)
        return 130
    for row in rows:
        if row["contender"] == OURS:
            print(f"{row['case']}: {overhead(row['over_baseline'], row['rounds'])} over {row['baseline']}")
    for name, why in failures.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    where = f"written to {session.target}" if rows else "nothing was measured"
    print(f"{where} after {time.perf_counter() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
