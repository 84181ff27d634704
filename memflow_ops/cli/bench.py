"""What `memflow bench` does: measures, prints the table, writes the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from memflow_ops.cli.options import given, named
from memflow_ops.cli.progress import fail, mistakes

if TYPE_CHECKING:
    from memflow_ops.bench.harness.case import Case


def bench(sizes: Sequence[str], case: str, rounds: int | None, device: str, out: Path | None, stored: bool) -> None:
    """Errors that the user can mend are one line; what was finished before Ctrl-C is kept."""
    from rich.console import Console
    from rich.progress import Progress

    from memflow_ops.bench import run
    from memflow_ops.bench.report.html import write_plot, write_report
    from memflow_ops.bench.report.table import show
    from memflow_ops.environment import ROOT
    from memflow_ops.files import check_folder

    folder = out or (run.RESULTS if (ROOT / "setup.py").is_file() else Path("out") / "bench")
    interrupted = False
    failed: dict[str, str] = {}
    unused = given(size=sizes or None, case=case or None, rounds=rounds) if stored else {}
    with mistakes():
        if unused:
            raise ValueError(f"{named(unused)} would change nothing with --stored, which measures nothing")
    if not stored:
        with mistakes():
            session = run.Session(device, sizes, case, rounds, folder)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("", total=len(session.cases))

            def report(coming: Case, done: int, total: int) -> None:
                bar.update(task, completed=done, description=coming.name)
                if not bar.console.is_terminal:
                    bar.console.print(f"[{done + 1}/{total}] {coming.name}", markup=False)

            try:
                _, failed = run.measure(session, report)
            except KeyboardInterrupt:
                interrupted = True
        if not session.target.is_file():  # not a case was finished
            _tell(failed, interrupted)
    with mistakes():
        results = run.stored(folder, device)
        check_folder(folder)
    show(results)
    write_report(results, folder / "report.html")
    made = ["report.html"]
    if write_plot(results, folder / "overhead.svg"):
        made.append("overhead.svg")
    typer.echo(f"written to {folder}: {', '.join(made)}")
    _tell(failed, interrupted)


def _tell(failed: dict[str, str], interrupted: bool) -> None:
    """Ends the command where not everything was measured."""
    if interrupted:
        raise KeyboardInterrupt
    if failed:
        fail("; ".join(f"{name} failed: {error}" for name, error in failed.items()), code=1)
