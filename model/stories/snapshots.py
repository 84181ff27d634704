"""Snapshots of a run, from which it goes on after Ctrl-C, SIGTERM, a kill or a reboot, as if it had never stopped.

A folder holds the history of one stream (`HistoryFolder`) and

    run.json                what the run is: settings, prompts, seeds; and whether it is finished
    snapshot.safetensors    all of it between two chunks, but for the history, which it names; where several processes
                            make a video together, the history too

Both are replaced whole. What is made after a snapshot is made again from it, to the same bits. Without a number of
chunks, a snapshot is taken whenever all of them together have taken less than `SHARE` of the time.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memflow_ops.cache.store import HistoryFolder
from memflow_ops.files import write_atomically
from memflow_ops.model.stories.video import growing
from memflow_ops.state_file import load_state, save_state

FORMAT = "memflow-ops run 1"
RUN_FILE, SNAPSHOT_FILE = "run.json", "snapshot.safetensors"
SHARE = 0.01
"""Of a run's time, for snapshots."""


def run_in(folder: Path) -> dict[str, Any] | None:
    """What the run in a folder is ("run"), and whether it is "finished"; None where there is none. A ValueError where
    the file that says it is damaged."""
    path = folder / RUN_FILE
    try:
        about = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a run: expected the format {FORMAT!r}")
    if not isinstance(about.get("finished"), bool) or not isinstance(about.get("run"), dict):
        raise ValueError(f"{path} is damaged: it does not say what the run is, and whether it is finished")
    return about


@dataclass(frozen=True)
class HistoryOptions:
    """What a command is asked to keep on disk, and to go on with."""

    folder: Path
    device_frames: int | None = None
    """Prototypes on the device at most; None: as many as fit."""
    host_frames: int | None = None
    """Prototypes in host memory at most; None: as many as fit."""
    every: int | None = None
    """As for `Snapshots`."""
    resume: bool = False

    def snapshots(self, below: Path) -> "Snapshots":
        """Of the run whose files go to this path below the folder of all files."""
        return Snapshots(self.folder / below, self.every)

    def is_finished(self, below: Path) -> bool:
        """Whether that run is to go on and is complete, as one may see who has not opened its snapshots."""
        found = run_in(self.folder / below) if self.resume else None
        return found is not None and bool(found["finished"])

    def snapshot(self, below: Path) -> dict[str, Any]:
        """The last snapshot of that run, which another process has opened."""
        return load_state(self.folder / below / SNAPSHOT_FILE)


class Snapshots:
    """The snapshots of one run in a folder, which it has for itself until `close`.

    every: chunks from one snapshot to the next; None: by `SHARE`.
    """

    def __init__(self, folder: Path, every: int | None = None):
        self.folder, self.every, self.path = HistoryFolder(folder), every, folder
        self.folder.add_user()
        self.finished = False
        """Whether the run that `begin` was told of is complete already."""
        self.found: dict[str, Any] | None = None
        """The snapshot from which the run goes on."""
        self._file, self._about = folder / SNAPSHOT_FILE, folder / RUN_FILE
        self._resumed = self._closed = False
        self._started = time.perf_counter()
        self._spent = self._last = 0.0  # seconds, of all and of the last one

    def said(self) -> list[str]:
        """Where the run goes on, and what was damaged on the way, in words; nothing of a run that begins."""
        if self.finished:
            return [f"The run in {self.path} is complete already."]
        if self.found is not None:
            return [*self.folder.notes, f"Going on after chunk {self.found['done']}."]
        return [f"{self.path} has no snapshot yet, so the run begins anew."] if self._resumed else []

    def begin(self, run: Mapping[str, Any], resume: bool) -> None:
        """Begins a run, or with `resume` finds where the one in the folder is to go on, if it has got anywhere.

        run: what the run is, as JSON takes it. A ValueError where the folder has another run, or an unfinished one that
        is not to go on, or a snapshot of which nothing says what it is of.
        """
        found = run_in(self.path)
        if found is None and self._file.exists():
            raise ValueError(
                f"{self._file} is there and {self._about} is not, which says of what run: name another folder, or "
                f"delete what is in this one"
            )
        if found is not None and not found["finished"] and not resume and self._file.exists():
            raise ValueError(
                f"{self.path} holds a run that was not finished: go on with it by --resume, or name another folder"
            )
        self._resumed = resume
        if resume and found is not None:
            other = _differences(found["run"], json.loads(json.dumps(run)))
            if other:
                raise ValueError(f"{self.path} holds another run: {'; '.join(other)}")
            if found["finished"]:
                self.finished = True
                self._delete()  # if it was killed before it had
                return
            if self._file.exists():
                self.found = load_state(self._file)
                self.folder.keep_only(self.found["stores"])
                return
        self._delete()
        self._write_about(run, finished=False)

    def check_made(self, videos: Iterable[Path]) -> None:
        """A ValueError where the run is complete, and these videos of it are not there: they were written to another
        folder, or deleted."""
        made = list(videos) if self.finished else []
        missing = [video for video in made if not video.is_file()]
        if missing:
            raise ValueError(
                f"the run in {self.path} is complete, and {missing[0]} is not there: name the folder that it was "
                f"written to, or another --history-dir to make it again"
            )
        for video in made:
            growing(video).unlink(missing_ok=True)  # if the run was killed before it had

    def is_due(self, chunk: int) -> bool:
        """Whether a snapshot should be taken after so many chunks."""
        if self.every is not None:
            return chunk % self.every == 0
        return self._spent + self._last <= SHARE * (time.perf_counter() - self._started)

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        """Takes a snapshot. state: makes it, with the number of finished chunks under "done" and the saved stories of
        the history under "stores"."""
        started = time.perf_counter()
        save_state(self._file, state())
        self._last = time.perf_counter() - started
        self._spent += self._last

    def take_in(self, found: dict[str, Any]) -> None:
        """Replaces the snapshot that was found by one that holds its history, and deletes the files that it named."""
        save_state(self._file, found)
        self.folder.keep_only([])
        self.found = found

    def finish(self, run: Mapping[str, Any]) -> None:
        """The run is complete: its snapshot and history are deleted, and that it is done is noted."""
        self._write_about(run, finished=True)
        self._delete()

    def close(self) -> None:
        """Gives up the folder, when the caches that use it have too. Further calls do nothing."""
        if not self._closed:
            self._closed = True
            self.folder.remove_user()

    def _delete(self) -> None:
        self._file.unlink(missing_ok=True)
        self.folder.keep_only([])

    def _write_about(self, run: Mapping[str, Any], finished: bool) -> None:
        about = {"format": FORMAT, "finished": finished, "run": run}
        write_atomically(self._about, (json.dumps(about, indent=1) + "\n").encode())


def _differences(found: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """In what a run differs from the one that was found, in words."""
    words = []
    for name, value in own.items():
        before = found.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            words += _differences(before, value)
        elif before != value:
            words.append(f"{name} {_brief(before)}, here {_brief(value)}")
    return words


def _brief(value: object) -> str:
    """A value in a message, which is one line."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
