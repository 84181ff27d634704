"""Stories that are streamed together, from the first chunk to their files, however they end."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from memflow_ops.files import write_atomically, write_picture
from memflow_ops.model.stories.fragments import FragmentWriter
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.video import VideoWriter


class StoryPlan(Protocol):
    """A story that is to be streamed."""

    @property
    def folder(self) -> Path:
        """The folder that its files go to."""

    @property
    def prompts_by_chunk(self) -> Sequence[str]:
        """The prompt of every chunk."""


class StoryRun(Protocol):
    """What has been made of a story so far."""

    interrupted: bool
    """Whether it ended before its last chunk."""
    error: str | None
    """The error that ended it, in words."""
    problems: list[str]
    """The pictures that could not be drawn, each in words."""

    @property
    def plan(self) -> StoryPlan: ...
    @property
    def chunks(self) -> Sequence[Any]:
        """Its finished chunks."""


RunType = TypeVar("RunType", bound=StoryRun)


def write_stories(
    runs: Sequence[RunType],
    writers: Sequence[VideoWriter | FragmentWriter],
    rounds: Callable[[Interrupts], Iterator[None]],
    files: Callable[[RunType], dict[str, bytes]],
    report: Callable[[RunType], None] | None = None,
    pictures: Mapping[str, Callable[[RunType], bytes]] | None = None,
    snapshot: Callable[[bool], None] | None = None,
) -> None:
    """Makes stories that are streamed together, chunk by chunk, and writes the files of each.

    rounds: an iterator that makes one chunk at each step and adds it to every run and video. It calls
        `Interrupts.allowed` around whatever may be interrupted.
    files: name -> content of every file of a story beside its video.
    report: is called with the first of the runs after every chunk.
    pictures: name -> what draws a picture of a story. One that cannot be drawn becomes one of the run's `problems`, and
        costs no other file; `files` is called afterwards.
    snapshot: is called after every chunk, and with True where the stories are interrupted, before their files are
        written.

    A story's files appear under their names when all of them are complete. Until then its video grows under another
    name. Ctrl-C, SIGTERM, SIGHUP or an error ends all stories early. The chunks that were finished are still written,
    and the runs are marked `interrupted`; a story without a finished chunk leaves no file. An error is raised
    again afterwards.
    """
    lost: Exception | None = None
    with Interrupts() as interrupts, ExitStack() as opened:
        for writer in writers:
            opened.enter_context(writer)
        try:
            for _ in rounds(interrupts):
                if report is not None:
                    report(runs[0])
                if snapshot is not None:
                    snapshot(False)
        except KeyboardInterrupt:
            for run in runs:
                run.interrupted = True
            if snapshot is not None and runs[0].chunks:
                lost = _failure(snapshot)
        except BaseException as error:
            for run in runs:
                run.interrupted, run.error = True, f"{type(error).__name__}: {error}"
            _publish(runs, writers, files, pictures or {})
            raise
        _publish(runs, writers, files, pictures or {})
        if lost is not None:
            raise lost
    if interrupts.waiting and not runs[0].interrupted:
        raise KeyboardInterrupt  # the signal came after the last chunk


def _failure(snapshot: Callable[[bool], None]) -> Exception | None:
    """Takes a snapshot. What keeps it from being taken is returned, so that the other files can be written first."""
    try:
        snapshot(True)
    except Exception as error:
        return error
    return None


def _publish(
    runs: Sequence[RunType],
    writers: Sequence[VideoWriter | FragmentWriter],
    files: Callable[[RunType], dict[str, bytes]],
    pictures: Mapping[str, Callable[[RunType], bytes]],
) -> None:
    """Writes the files of every story. If those of one cannot be written, the others are still written, and the first
    error is raised at the end."""
    errors = []
    for run, writer in zip(runs, writers, strict=True):
        try:
            if run.chunks:
                lost = [write_picture(run.plan.folder / name, partial(draw, run)) for name, draw in pictures.items()]
                run.problems += [words for words in lost if words]
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
    """Creates the folders. A ValueError where a folder cannot be created, or files of these names cannot be written to
    it, so that this is known before anything is generated."""
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
