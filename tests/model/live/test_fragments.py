"""Fragments of MP4: each can be played by itself behind the start, in its place in time, and nothing is held back."""

import io

import av
import numpy as np
import pytest
from seen import frames

from memflow_ops.model.live.fragments import FragmentEncoder, png

FPS = 8


def gray(values):
    """Frames of one gray each."""
    return np.broadcast_to(np.asarray(values, np.uint8)[:, None, None, None], (len(values), 32, 64, 3)).copy()


def shown(content):
    """Time in seconds and mean gray of every frame of a file."""
    return [(time, pixels.mean()) for time, pixels in frames(content)]


def test_fragments_after_one_another_are_a_video():
    encoder = FragmentEncoder(32, 64, FPS)
    grays = [[20, 60, 100], [140], [200, 180, 90, 30]]
    content, first = encoder.start, 0
    for number, values in enumerate(grays):
        content += encoder.encode(gray(values), first, number)
        first += len(values)
    seen = shown(content)
    assert [time for time, _ in seen] == [frame / FPS for frame in range(8)]
    np.testing.assert_allclose([value for _, value in seen], [value for values in grays for value in values], atol=3)


def test_a_fragment_alone_lies_where_it_belongs_also_after_hours():
    encoder = FragmentEncoder(32, 64, FPS)
    late = 3 * 3600 * 24 * FPS
    seen = shown(encoder.start + encoder.encode(gray([50, 150]), late, 7))
    assert [time for time, _ in seen] == [late / FPS, (late + 1) / FPS]


def test_a_fragment_is_a_head_and_its_frames_of_which_the_first_is_a_key_frame():
    encoder = FragmentEncoder(32, 64, FPS)
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 64, 3), dtype=np.uint8)  # every frame another scene
    fragment = encoder.encode(noise, 0, 0)
    assert fragment[4:8] == b"moof" and encoder.start[4:8] == b"ftyp" and b"moof" not in encoder.start
    assert fragment.count(b"moof") == 1
    with av.open(io.BytesIO(encoder.start + fragment)) as container:
        assert next(container.demux(video=0)).is_keyframe


def test_the_type_names_the_codec_of_the_stream():
    assert FragmentEncoder(32, 64, FPS).mime.startswith('video/mp4; codecs="avc1.64')


def test_no_frames_are_refused():
    with pytest.raises(ValueError, match="one frame or more"):
        FragmentEncoder(32, 64, FPS).encode(gray([1])[:0], 0, 0)


@pytest.mark.parametrize("frames", [gray([1])[:, :16], gray([1]).astype(np.float32)])
def test_other_frames_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames must be uint8 \(F, 32, 64, 3\)"):
        FragmentEncoder(32, 64, FPS).encode(frames, 0, 0)


def test_odd_sides_are_refused():
    with pytest.raises(ValueError, match="even sides"):
        FragmentEncoder(31, 64, FPS)


def test_a_picture_keeps_every_pixel():
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    with av.open(io.BytesIO(png(image))) as container:
        (frame,) = container.decode(video=0)
    np.testing.assert_array_equal(frame.to_ndarray(format="rgb24"), image)
