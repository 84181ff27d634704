"""The run of stories that are streamed together, from the first chunk to their files, whatever ends it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar

from memflow_ops.files import write_atomically
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.video import VideoWriter


class StoryPlan(Protocol):
    """A story that is to be streamed."""

    @property
    def folder(self) -> Path: ...
    @property
    def spoken(self) -> Sequence[str]:
        """The prompt of every chunk."""


class StoryRun(Protocol):
    """A story as far as it has been made."""

    interrupted: bool
    error: str | None

    @property
    def plan(self) -> StoryPlan: ...
    @property
    def chunks(self) -> Sequence[Any]: ...


RunType = TypeVar("RunType", bound=StoryRun)


def make_stories(
    runs: Sequence[RunType],
    writers: Sequence[VideoWriter],
    rounds: "Callable[[Interrupts], Iterator[None]]",
    files: Callable[[RunType], dict[str, bytes]],
    report: Callable[[RunType], None] | None = None,
) -> None:
    """Makes stories that are streamed together, chunk by chunk, and writes the files of each.

    rounds: makes a chunk, its video frames and its part of every run, each time it is asked. files: the content of
    every file of a story beside its video, by name. report: is told the first of the runs after every chunk.

    A story's files appear under their names when all are complete; until then its video grows under a name of its own.
    Ctrl-C, SIGTERM or an error ends all of them early: what was made until then is written all the same (nothing before
    the first chunk), and the runs say `interrupted`; an error is raised afterwards.
    """
    with Interrupts() as interrupts, ExitStack() as opened:
        for writer in writers:
            opened.enter_context(writer)
        try:
            for _ in rounds(interrupts):
                if report is not None:
                    report(runs[0])
        except KeyboardInterrupt:
            for run in runs:
                run.interrupted = True
        except BaseException as error:
            for run in runs:
                run.interrupted, run.error = True, f"{type(error).__name__}: {error}"
            _publish(runs, writers, files)
            raise
        _publish(runs, writers, files)
    if interrupts.waiting and not runs[0].interrupted:
        raise KeyboardInterrupt  # it came after the last chunk


def _publish(
    runs: Sequence[RunType], writers: Sequence[VideoWriter], files: Callable[[RunType], dict[str, bytes]]
) -> None:
    """Makes the content of every file of a story first, and then gives each its name. A story whose files cannot be
    written does not cost the others theirs: the first such error is raised at the end."""
    errors = []
    for run, writer in zip(runs, writers, strict=True):
        try:
            if run.chunks:
                for name, content in files(run).items():
                    write_atomically(run.plan.folder / name, content)
                writer.publish()
            else:
                writer.discard()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def make_folders(folders: Sequence[Path], names: Sequence[str]) -> None:
    """A ValueError where there can be no such folder, or no files of these names in it: rather now than at the end."""
    for folder in folders:
        trial = folder / f".{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise ValueError(f"cannot write to the folder {folder}: {error.strerror}") from error
        for name in names:
            if (folder / name).is_dir():
                raise ValueError(f"cannot write {folder / name}: a folder is in its place")
