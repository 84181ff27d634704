"""An mp4 of fragments that can be cut back to any of them and go on, to the same bytes.

x264 carries its rate control from frame to frame, and nothing saves or restores that. So each fragment here is encoded
by an encoder of its own, in memory, and appended whole. A video that was cut back and went on has then the bytes of one
that never stopped, as long as the number of the encoder's threads, of which its slices depend, stays the same.
"""

import io
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np

from memflow_ops.files import delete_abandoned, locked, replacing
from memflow_ops.model.stories.video import (
    FRAMES_PER_SECOND,
    SCALE,
    add_h264,
    check_frames,
    file_name,
    growing,
    yuv_frames,
)

MOST_THREADS = 8
PART_BYTES = 1 << 20
"""What is read at a time of a video that goes on."""
KEY_FRAMES = 250
"""The distance of key frames inside a fragment, whose first frame is always one. It is the same for all, because
the header that they share depends on it."""


class FragmentWriter:
    """Writes what a `VideoWriter` does, in fragments that stand by themselves: one for each call of `write`.

    The file grows as `path` with "part" before its suffix. `position` says how far it is, and `cut_back` goes back to
    there, also in another process. `publish` gives it an index and its name, without encoding anything again.
    """

    def __init__(self, path: Path, height: int, width: int, *, fps: int = FRAMES_PER_SECOND, scale: int = SCALE):
        """As for `VideoWriter`."""
        if height * scale % 2 or width * scale % 2:
            raise ValueError(f"a yuv420p video has even sides, got {width} x {height} pixels times {scale}")
        self.path, self.growing = path, growing(path)
        self.shape, self.scale, self.fps = (height, width), scale, fps
        self.frames = self._fragments = self._crc32 = 0
        self._threads = min(os.cpu_count() or 1, MOST_THREADS)
        self._lock = ExitStack()
        self._lock.enter_context(locked(path, wait=False))
        delete_abandoned(path.parent)  # of an actor that was killed; its command has locked the folder once for all
        # Unbuffered, so that a process that is killed leaves all that it has written. What is there of an earlier run
        # is kept for `cut_back` until the first fragment is written.
        self._file = open(self.growing, "r+b" if self.growing.exists() else "w+b", buffering=0)  # noqa: SIM115

    def position(self) -> dict[str, int]:
        """Where the video is, when it is on the disk; for `cut_back`."""
        self._begin()
        os.fsync(self._file.fileno())
        size = os.fstat(self._file.fileno()).st_size
        made = {"frames": self.frames, "fragments": self._fragments, "threads": self._threads}
        return {"bytes": size, "crc32": self._crc32, **made}

    def cut_back(self, position: Mapping[str, int]) -> None:
        """Goes back to where the video was, before anything has been written. An OSError where the file does not reach
        as far, or is not what was written until there."""
        size = os.fstat(self._file.fileno()).st_size
        if size < position["bytes"]:
            raise OSError(f"{self.growing} has {size} bytes, and the video that is to go on had {position['bytes']}")
        if self._checksum(position["bytes"]) != position["crc32"]:
            raise OSError(f"{self.growing} is not the video that is to go on, or is damaged: its checksum differs")
        self._file.truncate(position["bytes"])
        self._file.seek(position["bytes"])
        self.frames, self._fragments = position["frames"], position["fragments"]
        self._threads, self._crc32 = position["threads"], position["crc32"]

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """An error in this context gives up the file, which nobody has entered yet."""
        try:
            yield
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def write(self, frames: np.ndarray) -> None:
        """Adds a fragment of frames (F, H, W, 3) uint8, RGB."""
        check_frames(frames, self.shape)
        self._begin()
        place = {"first_frame": self.frames, "number": self._fragments}
        start, fragment = encode_fragment(frames, fps=self.fps, scale=self.scale, threads=self._threads, **place)
        left = memoryview(fragment if self._fragments else start + fragment)
        self._crc32 = zlib.crc32(left, self._crc32)
        while left:  # an unbuffered file may take a part
            left = left[self._file.write(left) :]
        self.frames += len(frames)
        self._fragments += 1

    def close(self) -> None:
        """Closes the file. Further calls do nothing."""
        self._file.close()

    def publish(self) -> None:
        """Writes the video with one index under its name, by copying what is encoded. The file that has grown stays, so
        that the video can go on, until `discard` deletes it.
        """
        with (
            replacing(self.path) as temporary,
            av.open(file_name(self.growing)) as source,
            av.open(file_name(temporary), "w", format="mp4") as target,
        ):
            stream = source.streams.video[0]
            copied = target.add_stream_from_template(stream)
            for packet in source.demux(stream):
                if packet.dts is not None:
                    packet.stream = copied
                    target.mux(packet)
        self.close()

    def discard(self) -> None:
        """Deletes the file that has grown."""
        self.close()
        self.growing.unlink(missing_ok=True)

    def _begin(self) -> None:
        if self._fragments == 0:
            self._file.truncate(0)
            self._file.seek(0)
            self._crc32 = 0

    def _checksum(self, size: int) -> int:
        """The CRC-32 of so many bytes from the beginning of the file."""
        crc32 = 0
        self._file.seek(0)
        while size and (part := self._file.read(min(size, PART_BYTES))):
            crc32, size = zlib.crc32(part, crc32), size - len(part)
        return crc32

    def __enter__(self) -> "FragmentWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self.close()


def encode_fragment(
    frames: np.ndarray, *, fps: int, scale: int, threads: int, first_frame: int, number: int
) -> tuple[bytes, bytes]:
    """Frames (F, H, W, 3) uint8, RGB, as a fragment, and what comes before the first fragment of a video.

    The former is the same for all fragments of a video. fps: frames per second. scale: video pixels per side of a
    pixel. threads: of the encoder, of which its slices depend. first_frame: the index in the video of the first of the
    frames. number: that of the fragment, from 0.
    """
    content = io.BytesIO()
    flags = "frag_custom+empty_moov+default_base_moof+skip_trailer"
    with av.open(content, "w", format="mp4", options={"movflags": flags}) as container:
        stream = add_h264(container, frames.shape[1:3], scale, fps, KEY_FRAMES)
        stream.codec_context.thread_count = threads
        for frame in [*yuv_frames(frames, scale, first=0), None]:
            container.mux(stream.encode(frame))
    whole = content.getvalue()
    start, fragment = bytearray(), bytearray()
    for kind, begin, end in _boxes(whole, 0, len(whole)):
        if kind in (b"ftyp", b"moov"):
            start += whole[begin:end]
        elif kind == b"moof":
            fragment += _moved(whole[begin:end], number + 1, _timescale(whole) * first_frame // fps)
        elif kind == b"mdat":
            fragment += whole[begin:end]
    return bytes(start), bytes(fragment)


def _boxes(content: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of every box of an mp4 (ISO 14496-12) from start to end."""
    while start < end:
        size, kind = struct.unpack_from(">I4s", content, start)
        if size == 1:
            size = struct.unpack_from(">Q", content, start + 8)[0]
        yield kind, start, start + (size or end - start)
        start += size or end - start


def _find(content: bytes, *kinds: bytes) -> int:
    """Where the content of a box begins that lies in boxes of these kinds, one in another."""
    start, end = 0, len(content)
    for wanted in kinds:
        start, end = next((s + 8, e) for kind, s, e in _boxes(content, start, end) if kind == wanted)
    return start


def _timescale(content: bytes) -> int:
    """Ticks of a second of the only track."""
    start = _find(content, b"moov", b"trak", b"mdia", b"mdhd")
    return struct.unpack_from(">I", content, start + (20 if content[start] == 1 else 12))[0]


def _moved(moof: bytes, number: int, ticks: int) -> bytes:
    """A fragment's moof with its number in the file, from 1, and the time at which it begins."""
    moved: Any = bytearray(moof)
    struct.pack_into(">I", moved, _find(moof, b"moof", b"mfhd") + 4, number)
    start = _find(moof, b"moof", b"traf", b"tfdt")
    struct.pack_into(">Q" if moof[start] == 1 else ">I", moved, start + 4, ticks)
    return bytes(moved)
