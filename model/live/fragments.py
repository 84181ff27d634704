"""Chunks of video as a page plays them, and frames as PNG."""

import av
import numpy as np

from memflow_ops.model.stories.fragments import encode_fragment
from memflow_ops.model.stories.video import check_frames

THREADS = 2
"""Of the encoder."""


class FragmentEncoder:
    """Encodes chunks of frames as fragments of MP4, each by itself, so that a player may leave out any of them.

    `start` and the fragments of any chunks after one another are what Media Source Extensions play: every fragment
    begins with a key frame, and a frame's time is its absolute index over `fps`.
    """

    def __init__(self, height: int, width: int, fps: int):
        """height, width: of the frames, in pixels. fps: frames per second."""
        if height % 2 or width % 2:
            raise ValueError(f"a yuv420p video has even sides, got {width} x {height} pixels")
        self.shape, self.fps = (height, width), fps
        self.start, _ = self._encode(np.zeros((2, height, width, 3), np.uint8), 0, 0)
        """What comes before the first fragment that a player gets."""
        at = self.start.index(b"avcC")
        self.mime = f'video/mp4; codecs="avc1.{self.start[at + 5 : at + 8].hex()}"'

    def encode(self, frames: np.ndarray, first_frame: int, number: int) -> bytes:
        """A fragment of frames (F, H, W, 3) uint8, RGB. first_frame: the absolute index of the first. number: that of
        the fragment, from 0, which grows from one to the next."""
        check_frames(frames, self.shape)
        if not len(frames):
            raise ValueError("a fragment has one frame or more, got none")
        return self._encode(frames, first_frame, number)[1]

    def _encode(self, frames: np.ndarray, first_frame: int, number: int) -> tuple[bytes, bytes]:
        place = {"first_frame": first_frame, "number": number}
        return encode_fragment(frames, fps=self.fps, scale=1, threads=THREADS, **place)


def png(image: np.ndarray) -> bytes:
    """One frame (H, W, 3) uint8, RGB, as the content of a PNG file."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width, codec.pix_fmt = *image.shape[:2], "rgb24"
    return b"".join(bytes(packet) for packet in codec.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
