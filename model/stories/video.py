"""Video files: an mp4 that grows while it is made and can be played at any time, even if the process is killed."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from memflow_ops.files import locked

FRAMES_PER_SECOND = 8
SCALE = 8
"""Video pixels per side of a frame's pixel."""


class VideoWriter:
    """Writes H.264 in yuv420p, which all players and browsers can play. A pixel becomes a square of `scale` x `scale`.

    The file grows, fragment by fragment, as `path` with "part" before its suffix (video.part.mp4), so that a process
    that is killed leaves a playable file. `close` turns it into an ordinary mp4, and `publish` gives it its name. Only
    one writer at a time may write a video: another one gets a ValueError until the first has left its context.
    """

    def __init__(
        self,
        path: Path,
        height: int,
        width: int,
        *,
        fragment_frames: int,
        fps: int = FRAMES_PER_SECOND,
        scale: int = SCALE,
    ):
        """height, width: of the frames, in pixels. fragment_frames: frames that are written together; the first of them
        is a key frame. fps: frames per second."""
        if height * scale % 2 or width * scale % 2:
            raise ValueError(f"a yuv420p video has even sides, got {width} x {height} pixels times {scale}")
        self.path, self.growing = path, growing(path)
        self.shape, self.scale, self.frames = (height, width), scale, 0
        # hybrid_fragmented: the file consists of fragments while it grows, and has one index when it is closed.
        self._lock = ExitStack()
        self._lock.enter_context(locked(path, wait=False))
        self._container = av.open(
            file_name(self.growing),
            "w",
            format="mp4",
            options={"movflags": "hybrid_fragmented+frag_keyframe+default_base_moof", "flush_packets": "1"},
        )
        self._stream = add_h264(self._container, self.shape, scale, fps, fragment_frames)
        self._open = True

    def write(self, frames: np.ndarray) -> None:
        """Adds frames (F, H, W, 3) uint8, RGB."""
        check_frames(frames, self.shape)
        for frame in yuv_frames(frames, self.scale, self.frames):
            self._mux(self._stream.encode(frame))
            self.frames += 1

    def close(self) -> None:
        """Completes the file. Further calls do nothing."""
        if self._open:
            self._open = False
            try:
                self._mux(self._stream.encode(None))
            finally:
                self._container.close()

    def publish(self) -> None:
        """Closes the file and gives it its name."""
        self.close()
        self.growing.replace(self.path)

    def discard(self) -> None:
        """Deletes the file."""
        try:
            self.close()
        finally:  # on a full disk the file cannot be ended
            self.growing.unlink(missing_ok=True)

    def _mux(self, packets: Iterable[av.Packet]) -> None:
        for packet in packets:
            self._container.mux(packet)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self.close()


def growing(path: Path) -> Path:
    """The name under which a video grows."""
    return path.with_suffix(f".part{path.suffix}")


def add_h264(container: Any, shape: tuple[int, int], scale: int, fps: int, key_frames: int) -> Any:
    """Adds a stream of H.264 to a container. shape: of a frame before it is scaled. key_frames: the distance of two."""
    # crf 10 preserves hues. zerolatency keeps the encoder from holding frames back.
    quality = {"crf": "10", "preset": "veryfast", "tune": "zerolatency"}
    stream = container.add_stream("libx264", rate=fps, options=quality)
    stream.width, stream.height, stream.pix_fmt = shape[1] * scale, shape[0] * scale, "yuv420p"
    stream.gop_size = key_frames
    stream.codec_context.colorspace = Colorspace.ITU709
    stream.codec_context.color_range = ColorRange.MPEG
    return stream


def check_frames(frames: np.ndarray, shape: tuple[int, int]) -> None:
    """A ValueError unless these are RGB frames of this height and width."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*shape, 3):
        raise ValueError(f"frames must be uint8 (F, {shape[0]}, {shape[1]}, 3), got {frames.dtype} {frames.shape}")


def yuv_frames(frames: np.ndarray, scale: int, first: int) -> Iterator[av.VideoFrame]:
    """The frames as the encoder takes them, with numbers from `first` on."""
    for number, image in enumerate(frames.repeat(scale, 1).repeat(scale, 2), start=first):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
        frame.pts = number
        yield frame


def file_name(path: Path) -> str:
    """The name of a file for FFmpeg, which takes what precedes a colon for a protocol, unless a slash comes first."""
    return str(path.absolute())


def read_video(path: Path) -> np.ndarray:
    """All frames of a video, RGB uint8 (F, height, width, 3)."""
    with av.open(file_name(path)) as container:
        # Older PyAV would leave the values in a video's narrower range.
        frames = (
            frame.reformat(format="rgb24", dst_color_range=ColorRange.JPEG) for frame in container.decode(video=0)
        )
        return np.stack([frame.to_ndarray() for frame in frames])


def to_pixels(latents: Tensor) -> np.ndarray:
    """A chunk's frames (3, F, H, W) in -1..1 -> RGB uint8 (F, H, W, 3)."""
    return ((latents.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
