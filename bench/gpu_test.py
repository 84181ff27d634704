"""`make gpu-test`: tests/gpu on a GPU, so that no test can take the others with it, and nothing that was seen is lost.

    python -m memflow_ops.bench.gpu_test [--out FOLDER] [--minutes 9] [--missing]

Most tests run in a few processes beside one another. Those that are marked `alone` get a process each, afterwards. What
becomes of a test is a line of FOLDER/gpu-test.jsonl as soon as it ends; a summary is printed, and kept in
<device>-<date>.json. A test that hangs or breaks the device ends its own process; one of the latter is tried a second
time with the ptxas of the system, because the one that comes with Triton may be at fault.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memflow_ops.bench.harness.outcomes import append, lines
from memflow_ops.bench.harness.results import record
from memflow_ops.bench.run import RESULTS
from memflow_ops.environment import ROOT

OUTCOMES = "gpu-test.jsonl"
_PYTEST = (
    "-m",
    "pytest",
    "-o",
    "addopts=",
    "-q",
    "--strict-markers",
    "--import-mode=importlib",
    "-p",
    "no:cacheprovider",
)
_PROCESSES = 4
"""That share the GPU: a test is small, and its host works more than the GPU does."""
_ALONE = 2
"""Of the tests with a process each: some take a third of the GPU's memory."""
BROKEN = ("lost", "died")
"""Outcomes of tests that ended their process: with an error of CUDA after which nothing works, or without a word."""
_BAD = ("failed", "error", "hung", *BROKEN)


@dataclass
class Run:
    """A run of the tests in a folder. Every result is a line of `outcomes`."""

    tests: str
    """The tests, as pytest takes them."""
    outcomes: Path
    until: float
    """The reading of time.monotonic() at which everything ends."""
    limit: float = 240.0
    """Seconds of a test."""
    python: Sequence[str] = (sys.executable,)

    def collected(self) -> dict[str, set[str]]:
        """The tests that pytest finds, and the marks of each."""
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder) / "collected.jsonl"
            command = [*self.python, *_PYTEST, "--collect-only", "--outcomes", str(found), self.tests]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode not in (0, 5):
                raise ValueError(f"the tests cannot be collected:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
            return {line["test"]: set(line["marks"]) for line in lines(found)}

    def together(self, tests: Sequence[str]) -> None:
        """Run tests in a few processes, each of which xdist replaces where a test ends it."""
        if tests:
            more = ["-n", str(_PROCESSES), "--dist", "load", "--max-worker-restart", str(len(tests))]
            self._pytest([*more, *tests], self.until - time.monotonic())

    def alone(self, tests: Sequence[str], environment: dict[str, str] | None = None) -> None:
        """Run each test in a process of its own, two at a time."""
        with ThreadPoolExecutor(_ALONE) as pool:
            list(pool.map(lambda test: self._one(test, environment or {}), tests))

    def _one(self, test: str, environment: dict[str, str]) -> None:
        left = min(self.until - time.monotonic(), self.limit + 60)
        if left <= 0:
            return
        before = len(self._of(test))
        code = self._pytest([test], left, environment)
        if len(self._of(test)) == before:
            ended = "was ended with the run" if code is None else f"ended with status {code}"
            append(self.outcomes, test=test, outcome="hung" if code is None else "died", words=f"its process {ended}")

    def _of(self, test: str) -> list[dict[str, Any]]:
        return [line for line in lines(self.outcomes) if line["test"] == test]

    def _pytest(self, options: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> int | None:
        """The exit status of pytest; None where it took longer than so many seconds and was ended."""
        command = [*self.python, *_PYTEST, "--outcomes", str(self.outcomes), "--limit", str(self.limit), *options]
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, start_new_session=True)
        try:
            return process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # Its workers too.
            except ProcessLookupError:
                process.wait()


def outcomes_of(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The outcome of each test. What a test's own process said of its end explains more than what others saw of it."""
    done: dict[str, dict[str, Any]] = {}
    for line in found:
        if "crashed while running" in line.get("words", ""):
            line = {**line, "outcome": "died"}
        before = done.get(line["test"])
        if before is None or before["outcome"] not in ("lost", "hung") or line["outcome"] not in ("died", "failed"):
            done[line["test"]] = line
    return done


# Triton 3.9 takes the second one from sm_90 on, earlier versions from sm_100 on.
_PTXAS_SETTINGS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def system_ptxas() -> str:
    """The path of a ptxas that does not come with Triton; "" if there is none."""
    return shutil.which("ptxas") or shutil.which("/usr/local/cuda/bin/ptxas") or ""


def run_all(run: Run, missing: bool = False) -> dict[str, Any]:
    """Run all tests, or only those that have not passed in its file yet. Returns what is kept of it."""
    began = time.monotonic()
    every, past = run.collected(), lines(run.outcomes)
    right = {test for test, of in outcomes_of(past).items() if of["outcome"] in ("passed", "skipped")}
    wanted = {test: marks for test, marks in every.items() if not (missing and test in right)}
    run.together([test for test, marks in wanted.items() if "alone" not in marks])
    run.alone([test for test, marks in wanted.items() if "alone" in marks])
    first = outcomes_of(lines(run.outcomes)[len(past) :])
    report_only = {test for test, marks in every.items() if "report_only" in marks}
    broken = [test for test, outcome in first.items() if outcome["outcome"] in BROKEN and test not in report_only]
    ptxas, second = system_ptxas(), {}  # type: tuple[str, dict[str, dict[str, Any]]]
    if broken and ptxas:
        seen = len(lines(run.outcomes))
        run.alone(broken, dict.fromkeys(_PTXAS_SETTINGS, ptxas))
        second = outcomes_of(lines(run.outcomes)[seen:])
    return {
        **{name: sorted(test for test, of in first.items() if of["outcome"] == name) for name in _BAD},
        **{name: sum(of["outcome"] == name for of in first.values()) for name in ("passed", "skipped")},
        "not_run": [test for test in wanted if test not in first],
        "skip_reasons": dict(Counter(of["words"] for of in first.values() if of["outcome"] == "skipped")),
        "report_only": {test: first[test]["outcome"] for test in report_only if test in first},
        "words": {test: of["words"] for test, of in first.items() if of["outcome"] in _BAD},
        "second_try": {"ptxas": ptxas, **{test: of["outcome"] for test, of in second.items()}} if broken else {},
        "seconds": round(time.monotonic() - began),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """The tests that make the run fail."""
    bad = [test for name in _BAD for test in result[name] if test not in result["report_only"]]
    return [*bad, *result["not_run"]]


def summary(result: dict[str, Any]) -> str:
    """What to read after a run."""
    said = [f"gpu-test: {result['passed']} passed, {result['skipped']} skipped, in {result['seconds']} s"]
    for name in _BAD:
        for test in result[name]:
            only = " (reported only)" if test in result["report_only"] else ""
            said.append(f"{name}{only}: {test}\n    {_in_short(result['words'][test])}")
    said += [f"not run, because time was over: {test}" for test in result["not_run"]]
    said += [f"skipped {count} times: {reason}" for reason, count in result["skip_reasons"].items()]
    if result["second_try"]:
        ptxas, *tries = result["second_try"].items()
        said.append(f"tried again with {ptxas[1]}:" if ptxas[1] else "not tried again: the system has no ptxas")
        said += [f"    {outcome}: {test}" for test, outcome in tries]
    said.append("gpu-test: " + (f"{len(bad)} tests are not right" if (bad := failures(result)) else "all is right"))
    return "\n".join(said)


def _in_short(words: str) -> str:
    """The line of pytest's report that names the error, which begins with E; else the last one."""
    told = [line.strip() for line in words.splitlines() if line.strip()] or [""]
    return next((line.removeprefix("E").strip() for line in told if line.startswith("E ")), told[-1])[:200]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take")
    parser.add_argument("--missing", action="store_true", help="run the tests that have not passed in FOLDER yet")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "gpu-test: no CUDA device\n")
    tests = Run("tests/gpu", (options.out / OUTCOMES).resolve(), time.monotonic() + 60 * options.minutes)
    result = run_all(tests, options.missing)
    target = record(options.out, torch.device("cuda"), "gpu_test", result)
    print(f"{summary(result)}\nwritten to {target} and {tests.outcomes}")
    return 1 if failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
