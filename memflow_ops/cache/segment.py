"""One append-only file of a history, with its manifest: fixed-size records, each of which holds one prototype.

`NAME.bin` has the records, each a whole number of pages, at record number x record bytes; room is allocated ahead.
`NAME.jsonl` is the manifest, of checked lines (`memflow_ops.journal`). The first is the header: an identity, the
layout of the cache, and the name, dtype, shape and offset of every tensor in a record. Every other line says of one
record which frame it is of, and its CRC-32s. A line is written when its record is on the disk (fsync), so that
a record without a line, or a line that is torn, is what an interruption left and counts for nothing.
"""

import errno
import json
import os
import uuid
import zlib
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memflow_ops.cache.layout import CacheLayout
from memflow_ops.journal import checked_line, read_journal

FORMAT = "memflow-ops history 1"
PAGE = 4096
ALIGNED = 64
"""Every tensor of a record begins at a multiple of this, in bytes."""
AHEAD_BYTES = 64 << 20
"""How much of a file is allocated at once, at least one record."""


class StoreError(OSError):
    """What is wrong with a history on disk, in one sentence."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a record."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """In the record, in bytes."""
    size: int
    """In bytes."""


class RecordLayout:
    """What a record holds: the means of a prototype first, then every tensor that a frame place has."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        """tensors: by name, one frame's; the first are its means, which are read alone when a history is opened."""
        self.tensors: list[StoredTensor] = []
        end = 0
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.tensors.append(StoredTensor(name, dtype, tuple(tensor.shape), end, tensor.nbytes))
            end = -(-(end + tensor.nbytes) // ALIGNED) * ALIGNED
        self.means_bytes = self.tensors[0].size
        self.record_bytes = -(-end // PAGE) * PAGE

    def described(self) -> list[dict[str, Any]]:
        """For the header of a manifest."""
        return [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in self.tensors]


def record_bytes(layout: CacheLayout) -> int:
    """The size of one story's record; at most, because how tensors are aligned is not counted to the byte."""
    means = layout.means_bytes // max(1, layout.history_frames)
    return -(-((layout.bank_frame_bytes + means) // layout.batch + 8 * ALIGNED) // PAGE) * PAGE


class Buffer:
    """Room in host memory for one record, and its tensors as views of it. Pinned for CUDA, so that copies to and from
    the device make nobody wait."""

    def __init__(self, layout: RecordLayout, device: torch.device):
        pinned = device.type == "cuda"
        # Zeros, so that what lies between the tensors is the same in every record.
        self.bytes = torch.zeros(layout.record_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.memory = self.bytes.numpy().data
        self.tensors = [
            self.bytes[t.offset : t.offset + t.size].view(getattr(torch, t.dtype)).view(t.shape) for t in layout.tensors
        ]
        self._device, self._copied = device, torch.cuda.Event() if pinned else None

    def note_copy(self) -> None:
        """A copy to or from this room has been queued on the device's current stream."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Until the copy that was noted last is done."""
        if self._copied is not None:
            self._copied.synchronize()


class Segment:
    """An open file of records and its manifest."""

    def __init__(self, path: Path, header: dict[str, Any], layout: RecordLayout):
        self.path, self.layout, self.identity = path, layout, str(header["id"])
        # What the manifest says of every record, in arrays, because there may be very many.
        self.frames = array("q")
        """The frame that each record is of."""
        self._checksums, self._means_checksums = array("Q"), array("Q")
        self.writer: object = None
        """Who appends to it; anybody may read."""
        self._data = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._manifest = os.open(_manifest(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._allocated = os.fstat(self._data).st_size

    @classmethod
    def create(cls, path: Path, about: Mapping[str, Any], layout: RecordLayout) -> "Segment":
        """about: what the header says beside the tensors, as JSON takes it."""
        header = {"format": FORMAT, "id": uuid.uuid4().hex, **about}
        header |= {"record_bytes": layout.record_bytes, "tensors": layout.described()}
        with _in_words(path):
            segment = cls(path, header, layout)
            _write_all(segment._manifest, checked_line(header))
            os.fsync(segment._manifest)
            _sync_folder(path.parent)
        return segment

    @classmethod
    def open(cls, path: Path, about: Mapping[str, Any], layout: RecordLayout) -> tuple["Segment", str]:
        """Opens an existing segment. Returns it, and in words what was torn at its end and is dropped, or "".

        A StoreError where a file is missing or damaged, or holds records of another cache.
        """
        for needed in (path, _manifest(path)):
            if not needed.is_file():
                raise StoreError(f"{needed} is missing: the history in {path.parent} is not whole without it")
        try:
            lines, whole, torn = read_journal(_manifest(path))
        except ValueError as error:
            raise StoreError(f"{error}; this history cannot be trusted") from error
        if not lines or lines[0].get("format") != FORMAT:
            raise StoreError(f"{_manifest(path)} is no manifest of a history: expected the format {FORMAT!r}")
        header, records = lines[0], lines[1:]
        expected = {**about, "record_bytes": layout.record_bytes, "tensors": layout.described()}
        for name, value in expected.items():
            if header.get(name) != json.loads(json.dumps(value)):
                raise StoreError(f"{path} holds the history of another cache: {_difference(name, header, value)}")
        segment = cls(path, header, layout)
        with _in_words(path):
            if torn:
                os.ftruncate(segment._manifest, whole)
        for line in records:
            segment._note(line["frame"], line["crc32"], line["means_crc32"])
        if segment._allocated < len(records) * layout.record_bytes:
            raise StoreError(
                f"{path} is cut short: its manifest names {len(records)} records of {layout.record_bytes} bytes, and "
                f"the file has {segment._allocated} bytes"
            )
        return segment, f"{_manifest(path)}: the last line was torn, its record is dropped" if torn else ""

    def write(self, frame: int, buffer: Buffer) -> int:
        """Puts a record on the disk, and then its line into the manifest; returns its number.

        Records are written one after another, all by one thread.
        """
        buffer.wait()
        number = len(self.frames)
        start, size = number * self.layout.record_bytes, self.layout.record_bytes
        with _in_words(self.path):
            self._allocate(start + size)
            done = 0
            while done < size:
                done += os.pwrite(self._data, buffer.memory[done:], start + done)
            os.fdatasync(self._data)
            means = zlib.crc32(buffer.memory[: self.layout.means_bytes])
            record = {"frame": frame, "crc32": zlib.crc32(buffer.memory), "means_crc32": means}
            _write_all(self._manifest, checked_line(record))
        self._note(**record)
        return number

    def read(self, number: int, buffer: Buffer, means_only: bool = False) -> None:
        """Reads a record, or only its means, and checks it. A StoreError where it is damaged or cannot be read."""
        buffer.wait()  # for a copy that still reads what the room held before
        start = number * self.layout.record_bytes
        size = self.layout.means_bytes if means_only else self.layout.record_bytes
        wanted = buffer.memory[:size]
        with _in_words(self.path):
            done = 0
            while done < size:
                got = os.preadv(self._data, [wanted[done:]], start + done)
                if not got:
                    raise StoreError(f"{self.path} is cut short in record {number}")
                done += got
        if zlib.crc32(wanted) != (self._means_checksums if means_only else self._checksums)[number]:
            raise StoreError(
                f"{self.path} is damaged in record {number}, frame {self.frames[number]}: its checksum differs; this "
                f"history cannot be trusted"
            )

    def sync(self) -> None:
        """Until the manifest is on the disk as far as it is written; the records are already."""
        with _in_words(self.path):
            os.fsync(self._manifest)

    def close(self) -> None:
        """Gives back the room that was allocated ahead. Further calls do nothing."""
        if self._data < 0:
            return
        try:
            end = len(self.frames) * self.layout.record_bytes
            if os.fstat(self._data).st_size > end:
                os.ftruncate(self._data, end)
        finally:
            for number in (self._data, self._manifest):
                os.close(number)
            self._data = -1

    def _note(self, frame: int, crc32: int, means_crc32: int) -> None:
        """One more record is on the disk. `frames` comes last, because its length says how many there are."""
        self._checksums.append(crc32)
        self._means_checksums.append(means_crc32)
        self.frames.append(frame)

    def _allocate(self, end: int) -> None:
        """Room on the disk for so many bytes, ahead of use, so that a full disk shows before a record is begun."""
        if end <= self._allocated:
            return
        size = self.layout.record_bytes
        target = end + AHEAD_BYTES // size * size
        try:
            os.posix_fallocate(self._data, self._allocated, target - self._allocated)
        except OSError as error:
            if error.errno == errno.ENOSPC and target > end:
                target = end  # the last records may still fit
                os.posix_fallocate(self._data, self._allocated, target - self._allocated)
            elif error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                os.ftruncate(self._data, target)  # this file system allocates nothing ahead
            else:
                raise
        self._allocated = target


def cut_back(path: Path, count: int) -> str:
    """Drops all records of a closed segment from `count` on, so that they can be written again. Returns what was
    dropped, in words, or "".

    What is missing or damaged is left as it is, for `Segment.open` to say.
    """
    try:
        lines, _, torn = read_journal(_manifest(path))
    except (ValueError, FileNotFoundError):
        return ""
    kept, dropped = lines[: count + 1], len(lines[count + 1 :])
    if not dropped and not torn:
        return ""
    with _in_words(path), open(_manifest(path), "r+b") as file:
        file.truncate(sum(len(checked_line(line)) for line in kept))
        os.fsync(file.fileno())
    end = " and one that was torn" if torn else ""
    return f"{path}: {dropped} records{end} are dropped, which came after the snapshot and are made again"


def _manifest(path: Path) -> Path:
    return path.with_suffix(".jsonl")


def _difference(name: str, header: Mapping[str, Any], value: Any) -> str:
    """How a header differs from what is expected, in words."""
    found = header.get(name)
    if isinstance(value, dict) and isinstance(found, dict):
        parts = [f"{part}={found.get(part)!r}, here {own!r}" for part, own in value.items() if found.get(part) != own]
        return "; ".join(parts) or name
    if name == "tensors":
        return "its records have other tensors"
    return f"{name}={found!r}, here {value!r}"


def _write_all(number: int, content: bytes) -> None:
    """Writes all of it, or raises what keeps the rest from being written."""
    done = 0
    while done < len(content):
        done += os.write(number, content[done:])


def _sync_folder(folder: Path) -> None:
    """Until the names in a folder are on the disk."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(number)
    finally:
        os.close(number)


class _in_words:
    """Turns what the system says of a file into a StoreError of one sentence."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, StoreError) or not isinstance(error, OSError):
            return
        if error.errno == errno.ENOSPC:
            raise StoreError(f"the disk of {self.path.parent} is full: the history cannot grow there") from error
        raise StoreError(f"{self.path}: {error.strerror}") from error
