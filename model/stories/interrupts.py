"""Signals that stop a command between two chunks instead of in the middle of one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """While this context is open, Ctrl-C, SIGTERM (by which schedulers end a job) and SIGHUP (by which a terminal that
    is closed ends one) raise a KeyboardInterrupt only inside `allowed`. A signal that comes elsewhere is raised when
    `allowed` is entered next.

    So a chunk is in all files or in none, and no file is left half written. A signal that was ignored before stays
    ignored, as `nohup` asks for. Outside the main thread, where Python handles no signals, the context does nothing.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._raise = False
        self.waiting = False
        """Whether a signal has come that has not been raised."""
        self._mine = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Interrupts":
        if self._mine:
            heard = [number for number in self._SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = [(number, signal.signal(number, self._handle)) for number in heard]
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
        """The code in this context may be interrupted at any point."""
        if self.waiting:
            self.waiting = False
            raise KeyboardInterrupt
        try:
            self._raise = True
            yield
        finally:
            self._raise = False
