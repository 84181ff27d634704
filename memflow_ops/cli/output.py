"""What a command prints never costs its work: where stdout or stderr cannot take a message, only that is lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO, cast


class PatientStream:
    """A text stream that is written to like the one it stands for, and raises no error.

    A character that the encoding does not have is written as an escape. After the first error, such as a full disk or a
    terminal that is gone, what is written goes nowhere, and `error` keeps the reason.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # Typer would write to it directly where the encoding is ASCII.
            raise AttributeError(name)
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self.error is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.error = error
        try:  # Python writes what waits in the stream once more at its end, and would end with an error.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass


@contextmanager
def patient_output() -> Iterator[list[PatientStream]]:
    """Put a `PatientStream` in the place of stdout and stderr, as far as the process has them.

    Gives that of stdout in a list, which is empty where stdout is closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Otherwise the next file gets this number, and what others print.
    with ExitStack() as replaced:
        out = [] if sys.stdout is None else [PatientStream(sys.stdout)]
        for stream in out:
            replaced.enter_context(redirect_stdout(cast(TextIO, stream)))
        if sys.stderr is not None:
            replaced.enter_context(redirect_stderr(cast(TextIO, PatientStream(sys.stderr))))
        yield out
