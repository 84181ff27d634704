"""What a video shows, read alike with every release of PyAV."""

import io

import av
import numpy as np
from av.video.reformatter import ColorRange


def frames(content):
    """Time in seconds and pixels (H, W, 3) uint8 of every frame of an MP4 file."""
    with av.open(io.BytesIO(content)) as container:
        return [
            (frame.time, frame.reformat(format="rgb24", dst_color_range=ColorRange.JPEG).to_ndarray())
            for frame in container.decode(video=0)
        ]


def video(content):
    """All frames of an MP4 file, RGB uint8 (F, H, W, 3)."""
    return np.stack([pixels for _, pixels in frames(content)])
