"""`memflow generate` in several processes, as torchrun starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import memflow, write_story

from memflow_ops.model.stories.video import read_video
from memflow_ops.model.streaming.streamer import Streamer

STORY = ["A ball in the meadow", "the sea at night", "the ball returns"]
SMALL = ("--height", 32, "--width", 48, "--frames-per-prompt", 6, "--device", "cpu", "--bank-frames", 2, "--top-k", 3)


@pytest.fixture
def words(tmp_path, pipeline):
    """The arguments of `memflow`, but for the folder."""
    story = write_story(tmp_path / "story.jsonl", STORY)
    return ["generate", story, "--checkpoint", pipeline, "--text-encoder", pipeline, "--vae", pipeline, *SMALL]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def test_two_processes_make_the_video_of_one(tmp_path, words):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command = [*torchrun, "-m", "memflow_ops", *words, "--out", tmp_path / "two", "--shard-weights"]
    done = subprocess.run(list(map(str, command)), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run.json") == 1 and done.stdout.count("local window") == 1
    assert "2 processes make each video, each with 1 of 2 heads" in done.stdout
    assert "blocks shared by 2 processes" in done.stdout

    assert memflow(*words, "--out", tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert not two["interrupted"] and two["frames"] == one["frames"] == 69
    assert two["cache_bytes"] == one["cache_bytes"]  # of all processes together
    for a, b in zip(one["chunks"], two["chunks"], strict=True):
        assert all(a[same] == b[same] for same in ("prompt", "first_frame", "retrieved", "candidates", "activation"))
    pixels = [read_video(tmp_path / name / "video.mp4").astype(int) for name in ("one", "two")]
    assert np.abs(pixels[0] - pixels[1]).mean() < 0.01 < pixels[0].std()
    assert not list((tmp_path / "two").glob(".*"))


def test_a_process_that_dies_ends_the_other_and_what_was_made_goes_on(tmp_path, words, capfd, monkeypatch):
    """One process begins, two go on until one of them is killed, and one goes on again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    out, history = tmp_path / "out", tmp_path / "history"
    words = [*words, "--frames-per-prompt", 30, "--steps", 1]
    stored = ["--history-dir", history, "--snapshot-every", 2]
    next_chunk = Streamer.next_chunk

    def interrupted(streamer, *prompts):
        if streamer.cache.committed == 7:
            raise KeyboardInterrupt
        return next_chunk(streamer, *prompts)

    with monkeypatch.context() as patch:
        patch.setattr(Streamer, "next_chunk", interrupted)
        assert memflow(*words, *stored, "--out", out) == 130
    assert len(list(history.glob("history-*"))) == 2

    command = list(map(str, [sys.executable, "-m", "memflow_ops", *words, *stored, "--out", out, "--resume"]))
    snapshot, processes = history / "snapshot.safetensors", []
    try:
        for rank in "01":
            launched = environment(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
            launched.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            processes.append(subprocess.Popen(command, env=launched, stderr=subprocess.PIPE, text=True))
        deadline, taken_in = time.monotonic() + 200, None
        while taken_in in (None, snapshot.stat().st_mtime_ns):
            assert time.monotonic() < deadline and processes[0].poll() is None, "nothing was made"
            if not list(history.glob("history-*")):  # they keep the history in the snapshot
                taken_in = taken_in or snapshot.stat().st_mtime_ns
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGKILL)
        _, said = processes[0].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert processes[0].returncode == 1
    assert "process 0 of 2: another process has ended or did not answer in time" in said
    record = json.loads((out / "run.json").read_text())
    assert record["interrupted"] and record["error"].startswith("LostRanks: another process has ended")
    assert len(read_video(out / "video.mp4")) == record["frames"] > 0

    # One process goes on with what two have begun.
    capfd.readouterr()
    assert memflow(*words, *stored, "--out", out, "--resume") == 0
    assert "Going on after chunk" in capfd.readouterr().out
    # A video that can go on is encoded in other pieces, so the whole one is made in the same way.
    assert memflow(*words, "--history-dir", tmp_path / "other", "--out", tmp_path / "whole") == 0
    records = [json.loads((folder / "run.json").read_text()) for folder in (out, tmp_path / "whole")]
    for a, b in zip(*(record["chunks"] for record in records), strict=True):
        assert all(a[same] == b[same] for same in ("prompt", "first_frame", "retrieved", "candidates"))
    pixels = [read_video(folder / "video.mp4").astype(int) for folder in (out, tmp_path / "whole")]
    assert np.abs(pixels[0] - pixels[1]).mean() < 0.01 < pixels[0].std()


@pytest.mark.parametrize(
    ("options", "launched", "said"),
    [
        (("--ulysses", 2), {}, "needs 2 processes, and this is one: start them with torchrun --nproc-per-node 2 -m"),
        (("--ulysses", 3), {"WORLD_SIZE": "2"}, "needs 3 processes, and torchrun has started 2: start them with"),
        (("--shard-weights",), {}, "deals the weights out to several processes, and there is one"),
    ],
)
def test_it_says_how_several_processes_are_started(tmp_path, words, capfd, monkeypatch, options, launched, said):
    for name, value in ({"RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "", **launched} if launched else {}).items():
        monkeypatch.setenv(name, value)
    assert memflow(*words, "--out", tmp_path / "out", *options) == 2
    error = capfd.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
