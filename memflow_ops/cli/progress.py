"""The progress bar behind which commands stream stories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memflow_ops.cli.errors import fail
from memflow_ops.model.stories.run import StoryPlan, StoryRun

PlanType = TypeVar("PlanType", bound=StoryPlan)
RunType = TypeVar("RunType", bound=StoryRun)


def run_stories(
    streams: Sequence[Sequence[PlanType]],
    generate: Callable[[Sequence[PlanType], Callable[[RunType], None]], Sequence[RunType]],
    speed: Callable[[RunType], str],
    written: Callable[[RunType], str],
) -> Iterator[Sequence[RunType]]:
    """Generate one stream of stories after another behind a progress bar. Yield each when its files are written.

    A picture that could not be drawn is told when all stories are made, and ends the command with exit code 1.

    streams: the plans of the stories that are streamed together, for every stream. generate: streams such plans and
    calls back after every chunk. speed: the words that the bar shows beside the time that is left. written: the words
    that say which files a run has left, printed where a stream is interrupted.
    """
    stories = sum(map(len, streams))
    lost: list[str] = []
    for plans in streams:
        runs = _run_stream(plans, generate, speed, several=stories > 1)
        done, chunks = len(runs[0].chunks), len(plans[0].prompts_by_chunk)
        if runs[0].interrupted and not done:
            fail("interrupted before the first chunk was made; nothing was written", code=130)
        if runs[0].interrupted:
            for run in runs:
                typer.echo(written(run))
                for problem in run.problems:
                    typer.echo(problem, err=True)
            fail(f"interrupted after chunk {done} of {chunks}; what was made is kept", code=130)
        lost += [f"{run.plan.folder}: {problem}" for run in runs for problem in run.problems]
        yield runs
    if lost:
        fail("; ".join(lost), code=1)


def _run_stream(
    plans: Sequence[PlanType],
    generate: Callable[[Sequence[PlanType], Callable[[RunType], None]], Sequence[RunType]],
    speed: Callable[[RunType], str],
    several: bool,
) -> Sequence[RunType]:
    """Generate one stream. several: the command has more than one story, so the bar names the folder."""
    prompts = plans[0].prompts_by_chunk
    more = f" and {len(plans) - 1} more" if len(plans) > 1 else ""
    which = f"{plans[0].folder.name}{more}: " if several else ""
    columns = (
        TextColumn("{task.description}", markup=False),
        TextColumn("chunk"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(which + prompts[0], total=len(prompts), speed="")

        def report(run: RunType) -> None:
            done = len(run.chunks)
            prompt = prompts[min(done, len(prompts) - 1)]
            bar.update(task, completed=done, description=which + prompt, speed=speed(run))

        try:
            return generate(plans, report)
        except OSError as error:
            folders = " and ".join(str(plan.folder) for plan in plans)
            fail(f"{error}; what was made is in {folders}", code=1)
