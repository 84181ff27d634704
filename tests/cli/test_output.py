"""A message or a picture never costs the rest, a name of a folder never the video, and two runs never one another."""

import io
import json
import sys
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from command_line import memflow, write_story

from memflow_ops.cli.output import PatientStream, patient_output
from memflow_ops.files import locked_folders
from memflow_ops.model.stories.video import SCALE, VideoWriter, read_video

STORIES = (["a ball in the meadow"], ["the star at sea"])
FILES = {"frames.npz", "run.json", "timeline.png", "video.mp4"}


@pytest.fixture
def generate(tmp_path, weights, monkeypatch):
    """Runs two short stories, in the test's folder, and gives the exit code and the files of both stories."""
    monkeypatch.chdir(tmp_path)
    write_story(tmp_path / "stories.jsonl", *STORIES)

    def run(out="out", *options):
        words = ("--weights", weights, "--steps", 1, "--frames-per-prompt", 3, "--no-baseline", "--device", "cpu")
        code = memflow("toy", "generate", "stories.jsonl", "--out", out, *words, *options)
        return code, [{path.name for path in (tmp_path / out / f"story-00{i}").glob("*")} for i in range(2)]

    return run


def test_a_stream_that_has_not_all_characters_writes_them_as_escapes():
    bytes_written = io.BytesIO()
    stream = PatientStream(io.TextIOWrapper(bytes_written, encoding="latin-1"))
    assert stream.write("é 日本 \udcff\n") == 7
    stream.flush()
    assert bytes_written.getvalue() == b"\xe9 \\u65e5\\u672c \\udcff\n" and stream.error is None


def test_a_stream_that_is_closed_or_full_loses_what_is_written_and_says_so():
    closed = io.StringIO()
    closed.close()
    with open("/dev/full", "w") as full:
        for stream in (PatientStream(closed), PatientStream(full)):
            for words in ("is lost", "too"):
                assert stream.write(words) == len(words)
                stream.flush()
            assert isinstance(stream.error, OSError | ValueError)


def test_a_process_without_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with patient_output() as output:
        assert output == [] and sys.stdout is None


@pytest.mark.parametrize("stdout", ["latin-1", "ascii", "full", "closed pipe", "none"])
def test_stories_are_made_whatever_stdout_takes(generate, stdout, monkeypatch, capfd):
    streams = {
        "full": partial(open, "/dev/full", "w"),
        "closed pipe": BrokenPipe,
        "none": lambda: None,
    }
    encoded = streams.get(stdout, lambda: io.TextIOWrapper(io.BytesIO(), encoding=stdout))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", encoded())
        code, made = generate("日本")
    assert made == [FILES, FILES]
    assert code == (1 if stdout == "full" else 0)
    assert ("not all could be printed" in capfd.readouterr().err) is (stdout == "full")


class BrokenPipe(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.parametrize("name", ["10:30", "md5:x", "file:y"])
def test_a_folder_with_a_colon_in_its_name(generate, name):
    code, made = generate(name)
    assert code == 0 and made == [FILES, FILES]
    assert len(read_video(Path(name) / "story-001" / "video.mp4")) == 3


def test_pictures_do_not_follow_the_users_style(generate, tmp_path):
    with matplotlib.rc_context():
        assert generate("plain") == (0, [FILES, FILES])
        matplotlib.rcParams |= {"text.usetex": True, "axes.facecolor": "black", "font.size": 40}
        assert generate("styled") == (0, [FILES, FILES])
        assert matplotlib.rcParams["text.usetex"]
    pictures = [(tmp_path / name / "story-000" / "timeline.png").read_bytes() for name in ("plain", "styled")]
    assert pictures[0] == pictures[1]


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(generate, tmp_path, monkeypatch, capfd):
    def fail(run):
        raise RuntimeError("no fonts here")

    assert generate()[1] == [FILES, FILES]
    monkeypatch.setattr("memflow_ops.model.toy.timeline.draw_timeline", fail)
    code, made = generate()
    assert code == 1 and made == [FILES - {"timeline.png"}] * 2, "an old picture would be taken for a new one"
    problem = "timeline.png could not be drawn, and everything else was done: RuntimeError: no fonts here"
    assert capfd.readouterr().err.count(problem) == 2
    assert json.loads((tmp_path / "out" / "story-000" / "run.json").read_text())["problems"] == [problem]


def test_a_second_run_into_a_folder_is_refused(generate, tmp_path, capfd):
    for folder in (tmp_path / "out", tmp_path / "out" / "story-001"):
        folder.mkdir(exist_ok=True, parents=True)
        with locked_folders([folder]):
            assert generate()[0] == 2
            said = capfd.readouterr().err
        assert "another process is writing to the folder" in said and "name another folder" in said
        assert not list(tmp_path.rglob("*.mp4"))
    assert generate() == (0, [FILES, FILES])


def test_a_second_writer_of_a_video_is_refused_and_the_first_keeps_its_own(tmp_path):
    path = tmp_path / "video.mp4"
    frames = np.full((3, 8, 8, 3), 200, np.uint8)
    with VideoWriter(path, 8, 8, fragment_frames=3) as writer:
        writer.write(frames)
        with pytest.raises(ValueError, match=r"another process is writing .*video\.mp4"):
            VideoWriter(path, 8, 8, fragment_frames=3)
        writer.publish()
    assert np.abs(read_video(path)[:, ::SCALE, ::SCALE].astype(int) - frames).max() <= 6
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("option", ["--bank-frames", "--top-k", "--steps", "--frames-per-prompt", "--query-group"])
@pytest.mark.parametrize("value", [10**11, 10**30])
def test_absurd_numbers_are_refused_in_one_line(generate, tmp_path, capfd, option, value):
    assert generate("out", option, value)[0] == 2
    said = capfd.readouterr().err
    assert said.startswith("memflow: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
