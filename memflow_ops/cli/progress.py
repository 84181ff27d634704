"""What commands share: stories behind a progress bar, and errors that are one line on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

import typer


class StoryPlan(Protocol):
    """A story that is to be streamed."""

    @property
    def folder(self) -> Any: ...
    @property
    def spoken(self) -> list[str]: ...


class StoryRun(Protocol):
    """A story as far as it has been streamed."""

    @property
    def chunks(self) -> Sequence[Any]: ...
    @property
    def interrupted(self) -> bool: ...


PlanType = TypeVar("PlanType", bound=StoryPlan)
RunType = TypeVar("RunType", bound=StoryRun)


@contextmanager
def mistakes(code: int = 2) -> Iterator[None]:
    """What the user can mend becomes one line and an exit code."""
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        fail(str(error), code=code)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the end."""
    typer.echo(f"memflow: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def run_stories(
    streams: Sequence[Sequence[PlanType]],
    generate: Callable[[Sequence[PlanType], Callable[[RunType], None]], Sequence[RunType]],
    speed: Callable[[RunType], str],
    made: Callable[[RunType], str],
) -> Iterator[Sequence[RunType]]:
    """Makes one stream of stories after another behind a progress bar; yields each when its files are written.

    generate: streams plans together and calls back after every chunk. speed, made: words for the bar and for what was
    written.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text, fast = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[speed]}")
    columns = (text, TextColumn("chunk"), MofNCompleteColumn(), BarColumn(bar_width=24), fast, TimeRemainingColumn())
    stories = sum(map(len, streams))
    for plans in streams:
        spoken = plans[0].spoken
        with Progress(*columns, console=Console(stderr=True)) as bar:
            more = f" and {len(plans) - 1} more" if len(plans) > 1 else ""
            which = f"{plans[0].folder.name}{more}: " if stories > 1 else ""
            task = bar.add_task(which + spoken[0], total=len(spoken), speed="")

            def report(run: RunType) -> None:
                done = len(run.chunks)
                prompt = spoken[min(done, len(spoken) - 1)]  # noqa: B023
                bar.update(task, completed=done, description=which + prompt, speed=speed(run))  # noqa: B023

            try:
                runs = generate(plans, report)
            except OSError as error:
                folders = " and ".join(str(plan.folder) for plan in plans)
                fail(f"{error}; what was made is in {folders}", code=1)
        done = len(runs[0].chunks)
        if runs[0].interrupted and not done:
            fail("interrupted before the first chunk was made; nothing was written", code=130)
        if runs[0].interrupted:
            for run in runs:
                typer.echo(made(run))
            fail(f"interrupted after chunk {done} of {len(spoken)}; what was made is kept", code=130)
        yield runs
