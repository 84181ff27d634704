"""The history on disk: a folder of append-only files, and what one story has stored in them.

Every prototype is appended once, right after its chunk, by a thread of its own. What has been written is never changed,
so two streams can share a past by naming the same records (`Streamer.fork`), and a stream that goes back to an earlier
state begins a new file. Reading is by frame: `stage` starts it ahead of use, `take` waits for it. Which frames are
staged is a guess about the next bank and decides nothing: a frame is always looked up by its index, and its bytes must
have the checksum that the manifest states.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from torch import Tensor

from memflow_ops.cache.segment import Buffer, RecordLayout, Segment, StoreError, cut_back
from memflow_ops.files import check_folder, locked_folders

WRITES_AHEAD = 2
"""Records that wait for the disk at most; then the stream waits too."""
READERS = 4
"""Records that are read at a time."""
_NAME = re.compile(r"history-(\d+)-(\d+)\.bin")


class HistoryFolder:
    """A folder of histories, which has one user at a time: a second one, in this process or another, gets a ValueError.

    path: is created. notes: what was dropped when files were opened, in words.
    """

    _open_here: ClassVar[WeakValueDictionary[Path, "HistoryFolder"]] = WeakValueDictionary()
    """The folders that this process has open, so that it is not told to wait for itself. One that was lost without
    `close`, as after an error, has given up its lock."""

    def __init__(self, path: Path | str):
        self.path, self.notes = Path(path), list[str]()
        check_folder(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._resolved = self.path.resolve()
        if self._resolved in self._open_here:
            raise ValueError(
                f"the folder {self.path} holds the history of another stream of this process: close that one, let it "
                f"fork, or name another folder"
            )
        self._open = ExitStack()
        self._open.enter_context(locked_folders([self.path]))
        self._open_here[self._resolved] = self
        # One writer, so that the lines of a manifest come in the order of the records.
        self.writer = ThreadPoolExecutor(1, "history-writer")
        self.readers = ThreadPoolExecutor(READERS, "history-reader")
        self._segments: dict[str, Segment] = {}
        self._users = 0

    def open_segment(self, name: str, about: Mapping[str, Any], layout: RecordLayout) -> Segment:
        """An existing file, opened once however many stories read it."""
        if name not in self._segments:
            if not _NAME.fullmatch(name):
                raise StoreError(f"{name!r} is not the name of a file of a history")
            self._segments[name], note = Segment.open(self.path / name, about, layout)
            self.notes += [note] if note else []
        return self._segments[name]

    def new_segment(self, story: int, about: Mapping[str, Any], layout: RecordLayout) -> Segment:
        """A new file for a story, under the next number that is free."""
        taken = [int(found[2]) for name in os.listdir(self.path) if (found := _NAME.fullmatch(name))]
        name = f"history-{story}-{max(taken, default=-1) + 1}.bin"
        self._segments[name] = Segment.create(self.path / name, about, layout)
        return self._segments[name]

    def keep_only(self, stories: Sequence[Mapping[str, Any]]) -> None:
        """Drops every record that these saved stories (`FrameStore.saved`) do not name. Before any file is opened.

        For a process that goes on from its only snapshot: what came after it is made again.
        """
        named = {name: count for saved in stories for name, _, count in saved["segments"]}
        for name in sorted(filter(_NAME.fullmatch, os.listdir(self.path))):
            if name in named:
                note = cut_back(self.path / name, named[name])
                self.notes += [note] if note else []
            else:
                (self.path / name).with_suffix(".jsonl").unlink(missing_ok=True)
                (self.path / name).unlink()

    def add_user(self) -> None:
        """One more cache uses the folder."""
        self._users += 1

    def remove_user(self) -> None:
        """A cache is done with the folder. After the last one it is closed."""
        self._users -= 1
        if self._users <= 0:
            self.close()

    def close(self) -> None:
        """Waits for what is being written, and gives up files, threads and the lock. Further calls do nothing."""
        self.writer.shutdown()
        self.readers.shutdown()
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()
        self._open.close()
        self._open_here.pop(self._resolved, None)


class FrameStore:
    """What one story of a cache has on disk, and the room in host memory through which it goes there and comes back.

    hits, misses: how many of the frames that were needed had been staged before, and how many had not.
    """

    def __init__(
        self, folder: HistoryFolder, story: int, about: Mapping[str, Any], tensors: Mapping[str, Tensor], room: int
    ):
        """story: number in the batch. about: of the header, see `Segment`. tensors: one frame's by name, the means
        first. room: frames that are staged at a time at most."""
        self.folder, self.story, self.about = folder, story, {**about, "story": story}
        self.layout, self.device, self.room = RecordLayout(tensors), next(iter(tensors.values())).device, room
        self.hits = self.misses = 0
        # The files whose records are this story's, in order, and how many of each; the last one may be its own.
        self._shared: list[tuple[Segment, int]] = []
        self._own: Segment | None = None
        self._index: dict[int, tuple[Segment, int | Future[int]]] = {}
        self._writing: dict[int, tuple[Future[int], Buffer]] = {}
        self._staged: dict[int, tuple[Future[None], Buffer]] = {}
        self._dropped: list[tuple[Future[None], Buffer]] = []  # reads that nobody waits for any more
        self._free: list[Buffer] = []

    def __contains__(self, frame: int) -> bool:
        return frame in self._index

    def append(self, frame: int, tensors: Sequence[Tensor]) -> None:
        """Copies a frame's tensors, in the order of the layout, and writes them in the background.

        A StoreError where an earlier frame could not be written. Waits where the disk is slower than the stream.
        """
        while len(self._writing) >= WRITES_AHEAD:
            next(iter(self._writing.values()))[0].exception()
            self._settle()
        if self._own is None:
            self._own = self.folder.new_segment(self.story, self.about, self.layout)
            self._own.writer = self
        buffer = self._buffer()
        for target, source in zip(buffer.tensors, tensors, strict=True):
            target.copy_(source, non_blocking=True)
        buffer.note_copy()
        written = self.folder.writer.submit(self._own.write, frame, buffer)
        self._writing[frame] = written, buffer
        self._index[frame] = self._own, written

    def stage(self, frames: Iterable[int]) -> None:
        """Begins to read these frames, and gives up what has been staged beside them."""
        wanted = list(frames)[: self.room]
        self._give_up_all_but(wanted)
        self._staged |= {frame: self._read(frame) for frame in wanted if frame not in self._staged}

    def hold(self, frame: int, tensors: Sequence[Tensor]) -> None:
        """Stages a frame from its tensors, all but the means, without reading it."""
        buffer, held = self._buffer(), Future[None]()
        for target, source in zip(buffer.tensors[1:], tensors, strict=True):
            target.copy_(source, non_blocking=True)
        buffer.note_copy()
        held.set_result(None)
        self._staged[frame] = held, buffer

    def begin(self, frames: Iterable[int]) -> None:
        """Begins to read all of these frames, which are needed now, that have not been staged; gives up the others."""
        needed = list(frames)
        self._give_up_all_but(needed)
        for frame in needed:
            if frame in self._staged:
                self.hits += 1
            else:
                self.misses += 1
                self._staged[frame] = self._read(frame)

    def take(self, frame: int) -> Buffer:
        """The tensors of a frame, in a room that `give_back` takes. Waits for the disk; a StoreError where the record
        is damaged, missing or of another frame."""
        if frame not in self._staged:
            self._staged[frame] = self._read(frame)
        done, buffer = self._staged[frame]
        try:
            done.result()
        finally:
            if done.done():
                del self._staged[frame]
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        """The room may be used again, as soon as the copy that `Buffer.note_copy` noted is done."""
        self._free.append(buffer)

    def means(self, frame: int, target: Tensor) -> None:
        """Reads the means of a frame alone."""
        buffer = self._buffer()
        segment, number = self._index[frame]
        segment.read(number if isinstance(number, int) else number.result(), buffer, means_only=True)
        target.copy_(buffer.tensors[0])
        buffer.note_copy()
        self.give_back(buffer)

    def forget(self, frame: int) -> None:
        """The frame will not be asked for again. Its record stays, for other streams may name it."""
        del self._index[frame]
        if frame in self._staged:
            self._dropped.append(self._staged.pop(frame))

    def saved(self) -> dict[str, Any]:
        """The records of this story by name, when all of them are on the disk."""
        self._finish_writing()
        parts = list(self._shared)
        if self._own is not None:
            self._own.sync()
            parts.append((self._own, len(self._own.frames)))
        return {"segments": [[segment.path.name, segment.identity, count] for segment, count in parts]}

    def opened(self, saved: Mapping[str, Any]) -> list[tuple[Segment, int]]:
        """The files that a saved story names, for `go_on`. A StoreError where they do not hold what it says."""
        parts = []
        for name, identity, count in saved["segments"]:
            segment = self.folder.open_segment(name, self.about, self.layout)
            if segment.identity != identity:
                raise StoreError(f"{segment.path} is of another run than the state that is loaded")
            if len(segment.frames) < count:
                raise StoreError(
                    f"{segment.path} has {len(segment.frames)} records, and the state that is loaded needs {count}"
                )
            parts.append((segment, count))
        return parts

    def go_on(self, parts: Sequence[tuple[Segment, int]], remembered: Iterable[int]) -> None:
        """Goes on after these records. remembered: the frames that may still be asked for.

        A file that has grown since, or that another story of this process writes, is read and a new one begun.
        """
        self._finish_writing()
        self.stage(())
        self._shared, self._own = list(parts), None
        everything: dict[int, tuple[Segment, int | Future[int]]] = {}
        for segment, count in parts:
            everything |= {frame: (segment, i) for i, frame in enumerate(segment.frames[:count])}
        missing = [frame for frame in remembered if frame not in everything]
        if missing:
            raise StoreError(f"the history in {self.folder.path} does not have frames {missing}")
        self._index = {frame: everything[frame] for frame in remembered}
        if parts:
            segment, count = parts[-1]
            if segment.writer in (None, self) and count == len(segment.frames):
                self._own = segment
                segment.writer = self
                self._shared.pop()

    def _read(self, frame: int) -> tuple[Future[None], Buffer]:
        segment, number = self._index[frame]
        buffer = self._buffer()

        def read() -> None:
            segment.read(number if isinstance(number, int) else number.result(), buffer)

        return self.folder.readers.submit(read), buffer

    def _give_up_all_but(self, frames: Sequence[int]) -> None:
        for frame in [frame for frame in self._staged if frame not in frames]:
            self._dropped.append(self._staged.pop(frame))

    def _finish_writing(self) -> None:
        for written, _ in list(self._writing.values()):
            written.exception()
        self._settle()

    def _settle(self) -> None:
        """Takes back the room of what has been written or read in vain; a StoreError where a write has failed."""
        for frame, (written, buffer) in list(self._writing.items()):
            if written.done():
                number = written.result()
                if frame in self._index and self._index[frame][1] is written:
                    self._index[frame] = self._index[frame][0], number
                del self._writing[frame]
                self._free.append(buffer)
        for entry in [entry for entry in self._dropped if entry[0].done()]:
            self._dropped.remove(entry)
            self._free.append(entry[1])

    def _buffer(self) -> Buffer:
        """Room for a record. None is made anew while a read in vain holds some."""
        self._settle()
        while self._dropped and not self._free:
            self._dropped[0][0].exception()
            self._settle()
        return self._free.pop() if self._free else Buffer(self.layout, self.device)
