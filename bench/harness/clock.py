"""The clock of a GPU while something is measured, as nvidia-smi tells it."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
import time
from typing import Any

_EVERY = 50
"""Milliseconds from one sample to the next."""

_ASKED = "clocks.sm,power.draw,temperature.gpu"


class Clock:
    """Samples of a GPU's clock (MHz), power (W) and temperature (degrees Celsius); none where nvidia-smi is not.

    with Clock() as clock: ...
    """

    def __init__(self, index: int = 0):
        self._index = index
        self._samples: list[tuple[float, tuple[float, ...]]] = []
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Clock:
        program = shutil.which("nvidia-smi")
        if program is not None:
            options = [f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits", f"-lms={_EVERY}", f"-i={self._index}"]
            self._process = subprocess.Popen(
                [program, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            try:
                clock, power, temperature = (float(word) for word in line.split(","))
            except ValueError:
                continue  # Some GPUs do not tell their power.
            self._samples.append((time.perf_counter(), (clock, power, temperature)))

    def between(self, start: float, end: float) -> dict[str, Any]:
        """What a row of results says of the time between two readings of time.perf_counter()."""
        found = [sample for at, sample in list(self._samples) if start <= at <= end]
        if not found:
            return {}
        clocks, powers, temperatures = zip(*found, strict=True)
        return {
            "sm_mhz": statistics.median(clocks),
            "sm_mhz_least": min(clocks),
            "watts": statistics.median(powers),
            "degrees": max(temperatures),
        }
