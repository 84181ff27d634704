"""Measures the registry's cases and keeps the results of each device.

`Session` is what `make bench` (pytest-benchmark) and `memflow bench` have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memflow_ops.allocator import keep_freed_memory
from memflow_ops.bench.cases.registry import GROUPS, chosen
from memflow_ops.bench.cases.streams import GROWING, HISTORY_ROUNDS
from memflow_ops.bench.harness.case import Case
from memflow_ops.bench.harness.ceilings import copy_ceiling, product_ceiling
from memflow_ops.bench.harness.contest import Contest
from memflow_ops.bench.harness.results import bench_file, comparable, compared, keep, load_bench
from memflow_ops.environment import environment, pick_device, version
from memflow_ops.files import check_folder

RESULTS = Path(__file__).resolve().parent / "results"
DEFAULT_GROUPS = tuple(group for group in GROUPS if not group.startswith("tiny"))


class Session:
    """Some cases on a device, and the file that every finished case is kept in at once.

    device: as `pick_device` takes it. groups: of the registry; none stands for all but the tiny ones. named: part of
    the names of the cases. rounds: of timing; None for each case's own. out: the folder of the results. compare: the
    stored results are going to be compared with, and not replaced. contenders: only those with one of these in their
    name are timed, beside ours and the baseline; none stands for all. Raises ValueError for what cannot be measured,
    compared or written, before anything is measured.
    """

    def __init__(
        self,
        device: str = "auto",
        groups: Sequence[str] = (),
        named: str = "",
        rounds: int | None = None,
        out: Path = RESULTS,
        compare: bool = False,
        contenders: Sequence[str] = (),
    ):
        self.device = pick_device(device)
        self.cases = chosen(self.device.type, groups or DEFAULT_GROUPS, named)
        self.contenders = contenders
        self.rounds = self._checked(rounds)
        # For all contenders, because page faults would be half of the spread.
        kept = keep_freed_memory()
        self.about = {**environment(self.device), "triton": version("triton"), "keeps_freed_memory": kept}
        self.target = bench_file(out, self.about)
        if compare:
            comparable(self.target, {case.name: case.all_settings() for case in self.cases})
        else:
            load_bench(self.target)
            check_folder(out)
        self.ceilings: dict[str, float] = {}

    def _checked(self, rounds: int | None) -> int | None:
        if rounds is None:
            return None
        if rounds < 1:
            raise ValueError(f"rounds must be positive, got {rounds}")
        grow = [case for case in self.cases if case.level == "stream" and self._times(GROWING)]
        room = min((HISTORY_ROUNDS // 2 * case.rounds for case in grow), default=rounds)
        if rounds > room:
            raise ValueError(f"the history of a stream has room for {room} rounds, got {rounds}; see --case for others")
        return rounds

    def _times(self, contender: str) -> bool:
        return not self.contenders or any(part in contender for part in self.contenders)

    def rounds_of(self, case: Case) -> int:
        return self.rounds or case.rounds

    def contest(self, case: Case) -> Contest:
        """Build and check a case, and measure the ceilings of its dtype where that has not been done."""
        if "gbs" not in self.ceilings:
            self.ceilings["gbs"] = copy_ceiling(self.device)
        if (product := f"tflops_{case.dtype}") not in self.ceilings:
            self.ceilings[product] = product_ceiling(self.device, case.dtype)
        return Contest(case, self.device, self._times)

    def rows(self, contest: Contest, more: Mapping[str, object] | None = None) -> list[dict[str, Any]]:
        """The rows of results of what has been timed. more: what else they say, such as the clock."""
        return contest.rows(self.ceilings, {**self.about, **(more or {})})

    def finish(self, contest: Contest, more: Mapping[str, object] | None = None) -> list[dict[str, Any]]:
        """Keep a case's rows in the device's file, and return them. more: as for `rows`."""
        rows = self.rows(contest, more)
        keep(self.target, rows, self.ceilings, self.about, some=bool(self.contenders))
        return rows

    def worse(self, contest: Contest) -> str:
        """Say how ours is worse than the stored result of this device; empty where it is not.

        Where the two spreads overlap, the case is measured once more and judged by that alone: with twice the rounds,
        or as many as a stream has room for.
        """
        (ours, *_) = self.rows(contest)
        found = compared(ours, self.target)
        if found is not None and found.in_doubt:
            case, rounds = contest.case, 2 * contest.round
            if case.level == "stream" and self._times(GROWING):
                rounds = min(rounds, HISTORY_ROUNDS * case.rounds - contest.round)
            contest.start_over()
            for _ in range(rounds):
                contest.run_round()
            (ours, *_) = self.rows(contest)
            found = compared(ours, self.target)
        return "" if found is None else found.words


@torch.no_grad()
def measure(session: Session, report: Callable[[Case, int, int], None]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure all of a session's cases.

    Returns the rows of results, and the errors by case: one that fails is no reason to lose the others.
    report(case, done, total) is called before each.
    """
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
    """The stored results of a device. Raises ValueError where there are none."""
    about = environment(pick_device(device))
    target = bench_file(out, about)
    if not target.is_file():
        raise ValueError(
            f"no results of {about['device']} in {out}: run `memflow bench`, or `make bench` in a checkout"
        )
    return load_bench(target)
