"""`memflow bench`: measure, print the table, write the report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from memflow_ops.bench import run
from memflow_ops.bench.cases.registry import GROUPS
from memflow_ops.bench.harness.case import Case
from memflow_ops.bench.report.table import show
from memflow_ops.bench.report.webpage import write_plot, write_report
from memflow_ops.cli.errors import fail, one_line_errors
from memflow_ops.cli.options import Device, named, typed
from memflow_ops.environment import ROOT
from memflow_ops.files import check_folder


def bench(
    context: typer.Context,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure cases of this size: wan-1.3b, long (banks of 4 to 1000 frames), kernels (our Triton kernels "
            "alone, on a GPU), tiny (takes seconds, and its times mean nothing), or tiny-kernels (with "
            "TRITON_INTERPRET=1 also on a CPU). May be repeated.",
            show_default="all but the tiny ones",
            metavar="NAME",
            autocompletion=lambda: list(GROUPS),
        ),
    ] = None,
    case: Annotated[
        str,
        typer.Option(help="Measure only cases with this in their name, such as stream/ or float32.", metavar="TEXT"),
    ] = "",
    contender: Annotated[
        list[str] | None,
        typer.Option(
            help="Time only contenders with this in their name, beside ours and the baseline. May be repeated.",
            show_default="all",
            metavar="TEXT",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Rounds of timing.", min=1, show_default="each case has its own number", metavar="N"),
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the results.", show_default="bench/results in a checkout, else out/bench", metavar="DIR"
        ),
    ] = None,
    stored: Annotated[
        bool, typer.Option("--stored", help="Measure nothing; show the results that are stored for this device.")
    ] = False,
) -> None:
    """Measure what memory costs against no memory and against every alternative.

    Prints a table and writes report.html. Every finished case is stored at
    once, so Ctrl-C keeps what has been measured.

    Examples:

      memflow bench --size tiny --out out/bench
      memflow bench --case stream/ --device cuda
      memflow bench --stored
    """
    folder = out or (run.RESULTS if (ROOT / "setup.py").is_file() else Path("out") / "bench")
    interrupted = False
    failed: dict[str, str] = {}
    if stored:
        with one_line_errors():
            unused = [name for name in ("size", "case", "contender", "rounds") if name in typed(context)]
            if unused:
                raise ValueError(f"{named(unused)} would change nothing with --stored, which measures nothing")
    else:
        with one_line_errors():
            session = run.Session(device, size or [], case, rounds, folder, contenders=contender or [])
        failed, interrupted = _measure(session)
        if not session.target.is_file():  # not one case was finished
            _end(failed, interrupted)
    with one_line_errors():
        results = run.stored(folder, device)
        check_folder(folder)
    show(results)
    write_report(results, folder / "report.html")
    written = ["report.html"]
    if write_plot(results, folder / "overhead.svg"):
        written.append("overhead.svg")
    typer.echo(f"written to {folder}: {', '.join(written)}")
    _end(failed, interrupted)


def _measure(session: run.Session) -> tuple[dict[str, str], bool]:
    """Measure behind a progress bar. Give what failed, as name of the case -> error, and whether Ctrl-C came."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(session.cases))

        def report(coming: Case, done: int, total: int) -> None:
            bar.update(task, completed=done, description=coming.name)
            if not bar.console.is_terminal:
                bar.console.print(f"[{done + 1}/{total}] {coming.name}", markup=False)

        try:
            _, failed = run.measure(session, report)
        except KeyboardInterrupt:
            return {}, True
    return failed, False


def _end(failed: dict[str, str], interrupted: bool) -> None:
    """End the command with an error where not every case was measured."""
    if interrupted:
        raise KeyboardInterrupt
    if failed:
        fail("; ".join(f"{name} failed: {error}" for name, error in failed.items()), code=1)
