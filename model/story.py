"""A story's run from its first chunk to its files, whatever ends it."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def make_story(
    run: RunType,
    writer: VideoWriter,
    rounds: "Callable[[Interrupts], Iterator[None]]",
    files: Callable[[RunType], dict[str, bytes]],
    report: Callable[[RunType], None] | None = None,
) -> RunType:
    """Makes a story chunk by chunk and writes its files; returns the run.

    rounds: makes a chunk, its video frames and its part of the run, each time it is asked. files: the content of every
    file beside the video, by name. report: is called after every chunk.

    Files appear under their names when all are complete; until then the video grows under a name of its own. Ctrl-C,
    SIGTERM or an error ends the story early: what was made until then is written all the same (nothing before the first
    chunk), and the run says `interrupted`; an error is raised afterwards.
    """
    with Interrupts() as interrupts, writer:
        try:
            for _ in rounds(interrupts):
                if report is not None:
                    report(run)
        except KeyboardInterrupt:
            run.interrupted = True
        except BaseException as error:
            run.interrupted, run.error = True, f"{type(error).__name__}: {error}"
            _publish(run, writer, files)
            raise
        _publish(run, writer, files)
    if interrupts.waiting and not run.interrupted:
        raise KeyboardInterrupt  # it came after the last chunk
    return run


def _publish(run: RunType, writer: VideoWriter, files: Callable[[RunType], dict[str, bytes]]) -> None:
    """Makes the content of every file first, and then gives each its name."""
    if not run.chunks:
        writer.discard()
        return
    for name, content in files(run).items():
        write_atomically(run.plan.folder / name, content)
    writer.publish()


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
