"""The mp4 that grows while a story is made."""

import numpy as np
import pytest

from memflow_ops.model.stories.video import SCALE, VideoWriter, read_video


def test_colours_survive_the_encoder(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (4, 8, 8, 3))
    with VideoWriter(tmp_path / "v.mp4", 8, 8, fragment_frames=3) as writer:
        writer.write(frames)
        writer.publish()
    assert np.abs(read_video(tmp_path / "v.mp4")[:, ::SCALE, ::SCALE].astype(int) - frames).max() <= 6


def test_a_video_that_cannot_be_ended_is_discarded(tmp_path, monkeypatch):
    def full(packets):
        raise OSError(28, "No space left")

    with VideoWriter(tmp_path / "v.mp4", 8, 8, fragment_frames=3) as writer:
        writer.write(np.zeros((1, 8, 8, 3), np.uint8))
        monkeypatch.setattr(writer, "_mux", full)
        with pytest.raises(OSError, match="No space left"):
            writer.discard()
    assert not list(tmp_path.iterdir())


def test_frames_of_the_wrong_shape_are_refused(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", 8, 8, fragment_frames=3) as writer:
        with pytest.raises(ValueError, match="uint8"):
            writer.write(np.zeros((1, 8, 8, 3), np.float32))
        writer.discard()
    assert not list(tmp_path.iterdir())
