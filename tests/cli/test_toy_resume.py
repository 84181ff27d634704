"""`memflow toy generate --resume`: what was stopped, in whatever way, comes out as if it had never been."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import memflow, write_story

from memflow_ops.model.stories.video import read_video
from memflow_ops.model.streaming.streamer import Streamer

STORY = ["a ball in the meadow", "the empty sea", "a star at night", "the ball in the desert"]
CHUNKS = 16
OPTIONS = ("--steps", 1, "--frames-per-prompt", 12, "--device", "cpu")
TIERS = ("--device-frames", 5, "--host-frames", 2)
TIMES = {"date", "overhead"}
TIMES_OF_A_CHUNK = {"seconds", "baseline_seconds"}


@pytest.fixture
def command(tmp_path, weights):
    """Runs the command with a history folder, and gives its exit code."""
    story = write_story(tmp_path / "story.jsonl", STORY)

    def words(name, *more):
        folders = ("--out", tmp_path / name, "--history-dir", tmp_path / f"{name}-history")
        return ("toy", "generate", story, "--weights", weights, *OPTIONS, *TIERS, *folders, *more)

    return words


@pytest.fixture(scope="module")
def whole(tmp_path_factory, weights):
    """The files of a run without a baseline that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    story = write_story(folder / "story.jsonl", STORY)
    words = ("toy", "generate", story, "--weights", weights, *OPTIONS, *TIERS, "--no-baseline")
    assert memflow(*words, "--out", folder / "out", "--history-dir", folder / "history") == 0
    assert [path.name for path in (folder / "history").iterdir()] == ["run.json"]
    return folder / "out"


def without_times(record):
    kept = {name: value for name, value in record.items() if name not in TIMES}
    kept["chunks"] = [{k: v for k, v in chunk.items() if k not in TIMES_OF_A_CHUNK} for chunk in record["chunks"]]
    return kept


def assert_same_files(got, want, timeline=False):
    """Byte for byte, but for the times. timeline: holds no time, because there is no baseline."""
    assert {p.name for p in got.iterdir()} == {"frames.npz", "run.json", "timeline.png", "video.mp4"}
    for name in ("video.mp4", "frames.npz", *["timeline.png"] * timeline):
        assert (got / name).read_bytes() == (want / name).read_bytes(), name
    records = [json.loads((folder / "run.json").read_text()) for folder in (got, want)]
    assert without_times(records[0]) == without_times(records[1])


@pytest.mark.parametrize("baseline", [(), ("--no-baseline",)], ids=["baseline", "alone"])
def test_stopped_again_and_again_it_comes_to_the_same_files(tmp_path, command, whole, monkeypatch, capfd, baseline):
    """By Ctrl-C in any chunk, of the story or of its baseline, which may then be one ahead or behind."""
    if not baseline:
        assert memflow(*command("whole")) == 0
        whole = tmp_path / "whole"
    next_chunk, left = Streamer.next_chunk, 0

    def ending(streamer, *prompts):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        return next_chunk(streamer, *prompts)

    monkeypatch.setattr(Streamer, "next_chunk", ending)
    made, resume, stops = 0, (), 0
    while True:
        left = 6 if baseline else 12
        if memflow(*command("parts", *resume, *baseline)) == 0:
            break
        resume, stops = ("--resume",), stops + 1
        record = json.loads((tmp_path / "parts" / "run.json").read_text())
        assert record["interrupted"] and len(record["chunks"]) > made
        made = len(record["chunks"])
        assert len(read_video(tmp_path / "parts" / "video.mp4")) == 3 * made, "what was made can be seen meanwhile"
    assert stops >= 2
    assert_same_files(tmp_path / "parts", whole, timeline=bool(baseline))
    assert memflow(*command("parts", "--resume", *baseline)) == 0
    assert "is complete already" in capfd.readouterr().out
    (tmp_path / "parts" / "video.mp4").unlink()
    assert memflow(*command("parts", "--resume", *baseline)) == 2
    assert "parts/video.mp4 is not there" in capfd.readouterr().err


def test_an_error_costs_what_came_after_the_snapshot_and_no_more(tmp_path, command, whole, monkeypatch, capfd):
    next_chunk, calls = Streamer.next_chunk, []

    def failing(streamer, *prompts):
        calls.append(streamer.cache.committed)
        if len(calls) == 8:
            raise OSError("out of everything")
        return next_chunk(streamer, *prompts)

    monkeypatch.setattr(Streamer, "next_chunk", failing)
    assert memflow(*command("parts", "--no-baseline", "--snapshot-every", 3)) == 1
    assert memflow(*command("parts", "--no-baseline", "--snapshot-every", 3, "--resume")) == 0
    assert calls == [*range(8), *range(6, CHUNKS)]
    said = capfd.readouterr()
    assert "out of everything" in said.err and "Going on after chunk 6" in said.out
    assert "1 records are dropped, which came after the snapshot and are made again" in said.out
    assert_same_files(tmp_path / "parts", whole, timeline=True)


@pytest.mark.parametrize("of_baseline", [False, True], ids=["story", "baseline"])
def test_an_interruption_between_commit_and_return_loses_no_chunk(tmp_path, command, monkeypatch, of_baseline):
    """The stream is then ahead of the video, and no snapshot may say that both are as far."""
    more = () if of_baseline else ("--no-baseline",)
    assert memflow(*command("whole", *more)) == 0
    next_chunk = Streamer.next_chunk

    def ending(streamer, *prompts):
        made = next_chunk(streamer, *prompts)
        if made.index == 6 and (streamer.settings.memory == "none") == of_baseline:
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patched:
        patched.setattr(Streamer, "next_chunk", ending)
        assert memflow(*command("parts", "--snapshot-every", 2, *more)) == 130
    assert memflow(*command("parts", "--snapshot-every", 2, "--resume", *more)) == 0
    assert_same_files(tmp_path / "parts", tmp_path / "whole", timeline=not of_baseline)


def kill_and_resume(words, points, patience=300):
    """Runs a command as a process of its own, kills it (SIGKILL) after so many seconds each time, and lets it go on."""
    run, resume = [sys.executable, "-m", "memflow_ops", *map(str, words)], []
    for seconds in points:
        running = subprocess.Popen([*run, *resume], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        running.send_signal(signal.SIGKILL)
        running.wait(patience)
        resume = ["--resume"]
    done = subprocess.run([*run, *resume], capture_output=True, text=True, timeout=patience)
    assert done.returncode == 0, done.stderr


def test_killed_at_random_it_comes_to_the_same_files(tmp_path, command, whole):
    """`tests/cli/kill_at_random.py` does this at as many points as one likes."""
    choice = random.Random(0)
    kill_and_resume(command("parts", "--no-baseline"), [choice.uniform(3, 6) for _ in range(2)])
    assert_same_files(tmp_path / "parts", whole, timeline=True)


# ------------------------------------------------------------------------------------------------------------ bad input


def stopped(command, monkeypatch, name="parts"):
    """A run that Ctrl-C has ended after six chunks."""
    next_chunk = Streamer.next_chunk

    def ending(streamer, *prompts):
        if streamer.cache.committed == 6:
            raise KeyboardInterrupt
        return next_chunk(streamer, *prompts)

    with monkeypatch.context() as patched:
        patched.setattr(Streamer, "next_chunk", ending)
        assert memflow(*command(name, "--no-baseline")) == 130


def refused(capfd, words, *command, code=2):
    capfd.readouterr()
    assert memflow(*command) == code
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("memflow: ")]
    assert len(said) == 1 and words in said[0], said


def test_a_full_disk_ends_a_run_that_goes_on_when_there_is_room(tmp_path, command, whole, monkeypatch, capfd):
    """One line says it, all that was made is kept, and it comes to the same files in the end."""
    pwrite, records = os.pwrite, 0

    def full(*arguments):
        nonlocal records
        records += 1
        if records > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*arguments)

    every = ("--no-baseline", "--snapshot-every", 2)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        refused(capfd, "is full: the history cannot grow there", *command("parts", *every), code=1)
    history, made = tmp_path / "parts-history", tmp_path / "parts"
    assert (history / "snapshot.safetensors").exists() and (made / "video.part.mp4").exists()
    assert memflow(*command("parts", *every, "--resume")) == 0
    assert "Going on after chunk " in capfd.readouterr().out
    assert_same_files(made, whole, timeline=True)


def test_what_cannot_go_on_is_said_in_one_line(tmp_path, command, monkeypatch, capfd):
    stopped(command, monkeypatch)
    history, go_on = tmp_path / "parts-history", command("parts", "--no-baseline", "--resume")
    refused(capfd, "holds a run that was not finished: go on with it by --resume", *command("parts", "--no-baseline"))
    refused(capfd, "holds another run: seed 0, here 5", *go_on, "--seed", 5)
    refused(capfd, "holds another run: top_k 8, here 5", *go_on, "--top-k", 5)
    refused(capfd, "holds another run: baseline False, here True", *command("parts", "--resume"))
    about = history / "run.json"
    said = about.read_text()
    for damage, words in (
        (said[:-9], "run.json is damaged: "),
        ("[]", "run.json is not of a run"),
        ('{"format": "memflow-ops run 1", "finished": false}', "run.json is damaged: it does not say what the run is"),
    ):
        about.write_text(damage)
        refused(capfd, words, *go_on)
    about.write_text(said.replace('"device": "cpu"', '"device": "cuda"'))
    refused(capfd, "holds another run: device 'cuda', here 'cpu'", *go_on)
    about.unlink()
    refused(capfd, "snapshot.safetensors is there and", *go_on)
    about.write_text(said)
    growing = tmp_path / "parts" / "video.part.mp4"
    content = growing.read_bytes()
    growing.write_bytes(content[:-1])
    refused(capfd, "video.part.mp4 has ", *go_on, code=1)
    growing.write_bytes(content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    refused(capfd, "video.part.mp4 is not the video that is to go on, or is damaged", *go_on, code=1)
    growing.write_bytes(content)
    snapshot = history / "snapshot.safetensors"
    whole = snapshot.read_bytes()
    snapshot.write_bytes(whole[:-9] + b"!" + whole[-8:])
    refused(capfd, "snapshot.safetensors is damaged: the checksum of tensor", *go_on)
    snapshot.write_bytes(whole)
    (records,) = history.glob("*.bin")
    content = records.read_bytes()
    records.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    refused(capfd, "is damaged in record 0, frame 3: its checksum differs", *go_on, code=1)
    records.unlink()
    refused(capfd, f"{records.name} is missing", *go_on, code=1)
    records.write_bytes(content)
    assert memflow(*go_on) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--resume",), "--resume needs --history-dir"),
        (("--snapshot-every", 3, "--host-frames", 2), "--host-frames, --snapshot-every needs --history-dir"),
        (("--host-frames", 0), "--host-frames needs --history-dir"),
        (("--history-dir", "out"), "--history-dir and --out are the same folder"),
        (("--history-dir", "h", "--device-frames", 2), "device_frames must hold the bank and the window's prototypes"),
        (("--history-dir", "h", "--host-frames", 2, "--memory", "sink"), "--host-frames would change nothing"),
    ],
)
def test_bad_options(tmp_path, weights, capfd, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    story = write_story(tmp_path / "story.jsonl", STORY)
    refused(capfd, words, "toy", "generate", story, "--out", tmp_path / "out", "--weights", weights, *OPTIONS, *options)


def test_kinds_without_a_history_go_on_too(tmp_path, weights, monkeypatch):
    story = write_story(tmp_path / "story.jsonl", STORY, STORY[::-1])

    def command(name, *more):
        folders = ("--out", tmp_path / name, "--history-dir", tmp_path / f"{name}-history")
        options = (*OPTIONS, "--weights", weights, "--memory", "sink", *folders)
        return ("toy", "generate", story, *options, *more)

    assert memflow(*command("whole", "--no-baseline")) == 0
    stopped(command, monkeypatch)
    assert memflow(*command("parts", "--no-baseline", "--resume")) == 0
    for number in range(2):
        parts, whole = (tmp_path / name / f"story-{number:03d}" for name in ("parts", "whole"))
        assert_same_files(parts, whole, timeline=True)


def test_the_video_of_fragments_shows_what_the_other_does(tmp_path, whole, weights):
    story, plain = write_story(tmp_path / "story.jsonl", STORY), tmp_path / "plain"
    assert memflow("toy", "generate", story, "--weights", weights, *OPTIONS, "--no-baseline", "--out", plain) == 0
    videos = [read_video(folder / "video.mp4").astype(int) for folder in (whole, plain)]
    frames = [np.load(folder / "frames.npz")["frames"] for folder in (whole, plain)]
    assert (frames[0] == frames[1]).all(), "the history on disk changes no pixel"
    assert videos[0].shape == videos[1].shape and np.abs(videos[0] - videos[1]).mean() < 2
