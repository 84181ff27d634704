"""The run of stories that are streamed together, from the first chunk to their files, whatever ends it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeVar

from memflow_ops.model.checkpoints import write_atomically
from memflow_ops.model.video import VideoWriter


class StoryPlan(Protocol):
    @property
    def folder(self) -> Path: ...


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


class Interrupts:
    """Ctrl-C, and SIGTERM by which schedulers end a job: a KeyboardInterrupt only where it is `allowed`, else it waits.

    So a chunk is in all files or in none, and files are written to the end.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._raise, self.waiting = False, False
        self._mine = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interrupts":
        if self._mine:
            self._before = [(number, signal.signal(number, self._handle)) for number in self._SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        if self._mine:
            for number, handler in self._before:
                signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raise:
            self._raise = False
            raise KeyboardInterrupt
        self.waiting = True

    @contextmanager
    def allowed(self) -> Iterator[None]:
        if self.waiting:
            self.waiting = False
            raise KeyboardInterrupt
        try:
            self._raise = True
            yield
        finally:
            self._raise = False
