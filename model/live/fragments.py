"""Chunks of video as fragments of MP4, which a page plays through Media Source Extensions, and frames as PNG."""

import io
from collections.abc import Iterator

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

TICKS = 512
"""Of the video's clock, per frame."""


class FragmentEncoder:
    """Encodes chunks of frames, each by itself, so that a player may leave out any of them.

    `start` and the fragments of any chunks after one another are a fragmented MP4 file: H.264 in yuv420p, a key frame
    first in every fragment, a frame's time being its absolute index over `fps`.
    """

    def __init__(self, height: int, width: int, fps: int, crf: int = 12):
        """height, width: of the frames, in pixels. fps: frames per second. crf: x264's quality, 0 (lossless) to 51."""
        if height % 2 or width % 2:
            raise ValueError(f"a yuv420p video has even sides, got {width} x {height} pixels")
        self.shape, self.fps, self.crf = (height, width), fps, crf
        head = self._container(np.zeros((2, height, width, 3), np.uint8))
        self.start = b"".join(content for name, content in boxes(head) if name in (b"ftyp", b"moov"))
        """What comes before the first fragment that a player gets."""
        at = self.start.index(b"avcC")
        self.mime = f'video/mp4; codecs="avc1.{self.start[at + 5 : at + 8].hex()}"'

    def encode(self, frames: np.ndarray, first_frame: int, number: int) -> bytes:
        """A fragment of frames (F, H, W, 3) uint8, RGB. first_frame: the absolute index of the first. number: that of
        the fragment, from 0, which grows from one to the next."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self.shape, 3) or not len(frames):
            raise ValueError(
                f"frames must be uint8 (F, {self.shape[0]}, {self.shape[1]}, 3), got {frames.dtype} {frames.shape}"
            )
        content = dict(boxes(self._container(frames)))
        head = bytearray(content[b"moof"])
        # A file begins with the first fragment at time 0; these two fields say where this one really belongs.
        at = head.index(b"mfhd") + 8
        head[at : at + 4] = (number + 1).to_bytes(4, "big")
        at = head.index(b"tfdt") + 4
        if head[at] != 1:
            raise RuntimeError("FFmpeg wrote the time of a fragment in 32 bits; expected 64")
        head[at + 4 : at + 12] = (first_frame * TICKS).to_bytes(8, "big")
        return bytes(head) + content[b"mdat"]

    def _container(self, frames: np.ndarray) -> bytes:
        """The frames as a file of one fragment."""
        target = io.BytesIO()
        options = {
            "movflags": "frag_keyframe+empty_moov+default_base_moof",
            "video_track_timescale": str(self.fps * TICKS),
        }
        with av.open(target, "w", format="mp4", options=options) as container:
            quality = {"crf": str(self.crf), "preset": "veryfast", "tune": "zerolatency", "sc_threshold": "0"}
            stream = container.add_stream("libx264", rate=self.fps, options=quality)
            stream.height, stream.width = self.shape
            stream.pix_fmt, stream.gop_size = "yuv420p", len(frames)
            stream.codec_context.colorspace = Colorspace.ITU709
            stream.codec_context.color_range = ColorRange.MPEG
            for index, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return target.getvalue()


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The boxes of an MP4 file, one after another: name, and content with its head of 8 bytes."""
    at = 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 4], "big")
        if size < 8:
            raise ValueError(f"an MP4 box has at least 8 bytes, got {size}")
        yield content[at + 4 : at + 8], content[at : at + size]
        at += size


def png(image: np.ndarray) -> bytes:
    """One frame (H, W, 3) uint8, RGB, as the content of a PNG file."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt = *image.shape[:2], "rgb24"
    return b"".join(bytes(packet) for packet in codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
