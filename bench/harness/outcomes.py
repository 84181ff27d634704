"""What became of each test or case, line by line as it comes, so that nothing is lost where a process ends."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ENDED = 70
"""The exit status of a process that gives up, because its device is lost or because something took too long."""


def append(target: Path, **outcome: Any) -> None:
    """Add a line of JSON to a file, in one write, so that several processes can do so at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, (json.dumps(outcome) + "\n").encode())
    finally:
        os.close(file)


def lines(target: Path) -> list[dict[str, Any]]:
    """All lines of such a file; none where there is no file. A line that was cut off is left out."""
    found = []
    for line in target.read_text().splitlines() if target.is_file() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def why_lost(device: torch.device) -> str:
    """The error of CUDA after which no more calls of this process work, such as an illegal access; "" if there is none.

    It waits for the device.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """The type of an error and the first line of what it says."""
    words = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {words[:300]}"


@contextlib.contextmanager
def limited(seconds: float, then: Callable[[], None]) -> Iterator[None]:
    """End this process where what is inside takes longer: call `then`, show where every thread is, exit with ENDED.

    A wait for a device that never answers cannot be interrupted in any other way.
    """

    def end() -> None:
        try:
            then()
            faulthandler.dump_traceback(file=sys.__stderr__ or 2)
        finally:
            os._exit(ENDED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # The timer needs Python's lock, which a call may hold; this does not.
    faulthandler.dump_traceback_later(seconds + 15, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()
