"""The mp4 of fragments, cut back and gone on with."""

import av
import numpy as np
import pytest

from memflow_ops.model.stories.fragments import FragmentWriter, encode_fragment
from memflow_ops.model.stories.video import read_video

SIZE = 32
LENGTHS = (1, 3, 4, 3, 2, 3, 3)


def chunks():
    base = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return [np.stack([np.roll(base, 5 * number + i, 0) for i in range(count)]) for number, count in enumerate(LENGTHS)]


def whole(path):
    with FragmentWriter(path, SIZE, SIZE, fps=16, scale=2) as writer:
        for frames in chunks():
            writer.write(frames)
        writer.publish()
        writer.discard()
    return path.read_bytes()


def test_frames_come_out_in_order_and_on_time(tmp_path):
    whole(tmp_path / "v.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    video = read_video(tmp_path / "v.mp4")
    assert video.shape == (sum(LENGTHS), 2 * SIZE, 2 * SIZE, 3)
    assert np.abs(video[:, ::2, ::2].astype(int) - np.concatenate(chunks())).mean() < 30
    with av.open(str(tmp_path / "v.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16 and stream.frames == sum(LENGTHS)
        times = [packet.pts * stream.time_base for packet in container.demux(stream) if packet.pts is not None]
    assert times == [pytest.approx(i / 16) for i in range(sum(LENGTHS))]


def test_fragments_of_any_length_share_a_header():
    """Their own would not be read: a player has the one of the first fragment."""
    starts = {encode_fragment(x, fps=16, scale=2, threads=2, first_frame=0, number=0)[0] for x in chunks()}
    assert len(starts) == 1


@pytest.mark.parametrize("kept", range(len(LENGTHS)))
def test_cut_back_and_gone_on_with_it_has_the_same_bytes(tmp_path, kept):
    """Whatever came after, a torn fragment too, and whatever can be played at that moment."""
    want, path = whole(tmp_path / "whole.mp4"), tmp_path / "v.mp4"
    with FragmentWriter(path, SIZE, SIZE, fps=16, scale=2) as writer:
        for number, frames in enumerate(chunks()[: kept + 2]):
            if number == kept:
                position = writer.position()
            writer.write(frames)
        writer._file.write(b"torn")
    shown = read_video(writer.growing)
    assert len(shown) == sum(LENGTHS[: kept + 2]), "what has grown so far is a video"
    with FragmentWriter(path, SIZE, SIZE, fps=16, scale=2) as writer:
        writer.cut_back(position)
        for frames in chunks()[kept:]:
            writer.write(frames)
        writer.publish()
        assert writer.growing.exists(), "until it is discarded the video could go on"
        writer.discard()
    assert path.read_bytes() == want


def test_a_video_that_is_shorter_than_it_was_is_refused(tmp_path):
    with FragmentWriter(tmp_path / "v.mp4", SIZE, SIZE) as writer:
        writer.write(chunks()[1])
        position = writer.position()
    writer.growing.write_bytes(writer.growing.read_bytes()[:-1])
    with FragmentWriter(tmp_path / "v.mp4", SIZE, SIZE) as writer:
        with pytest.raises(OSError, match=r"v\.part\.mp4 has \d+ bytes, and the video that is to go on had"):
            writer.cut_back(position)
        writer.discard()
    assert not list(tmp_path.iterdir())


def test_another_video_is_not_gone_on_with(tmp_path):
    """Another run may have written to the folder meanwhile."""
    positions = []
    for frames in (chunks()[1], chunks()[2]):
        with FragmentWriter(tmp_path / "v.mp4", SIZE, SIZE) as writer:
            writer.write(frames)
            positions.append(writer.position())
            writer.write(frames)
    with FragmentWriter(tmp_path / "v.mp4", SIZE, SIZE) as writer:
        with pytest.raises(OSError, match=r"v\.part\.mp4 is not the video that is to go on, or is damaged"):
            writer.cut_back(positions[0])
        writer.cut_back(positions[1])


def test_a_new_video_replaces_what_has_grown_before(tmp_path):
    (tmp_path / "v.part.mp4").write_bytes(b"of an earlier run" * 10000)
    assert whole(tmp_path / "v.mp4") == whole(tmp_path / "w.mp4")


def test_a_disk_that_takes_a_part_of_a_fragment_gets_the_rest(tmp_path, monkeypatch):
    want = whole(tmp_path / "whole.mp4")
    with FragmentWriter(tmp_path / "v.mp4", SIZE, SIZE, fps=16, scale=2) as writer:
        file = writer._file

        class Slow:
            def write(self, content):
                return file.write(bytes(content)[:1000])

            def __getattr__(self, name):
                return getattr(file, name)

        writer._file = Slow()
        for frames in chunks():
            writer.write(frames)
        writer.publish()
    assert (tmp_path / "v.mp4").read_bytes() == want
