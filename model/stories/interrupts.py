"""Signals that end a run between two chunks instead of in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
