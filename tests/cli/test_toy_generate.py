"""`memflow toy generate`: what it writes, read back."""

import json
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from command_line import memflow, write_story
from matplotlib.image import imread

from memflow_ops.model.stories.video import SCALE, read_video
from memflow_ops.model.toy.settings import TOY_SETTINGS

STORY = ["an empty meadow", "a ball in the meadow", "the ball at night"]
FRAMES = 18  # 6 per prompt


@pytest.fixture(scope="module")
def made(tmp_path_factory, weights):
    """A folder that one run has filled."""
    folder = tmp_path_factory.mktemp("generate")
    story = write_story(folder / "story.jsonl", STORY)
    options = ("--steps", 1, "--frames-per-prompt", 6, "--seed", 3, "--top-k", 5, "--device", "cpu")
    assert memflow("toy", "generate", story, "--out", folder / "out", "--weights", weights, *options) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def record(made):
    return json.loads((made / "run.json").read_text())


def test_files_are_complete_and_nothing_else_is_left(made):
    assert sorted(path.name for path in made.iterdir()) == ["frames.npz", "run.json", "timeline.png", "video.mp4"]


def test_video_shows_the_frames(made):
    frames, video = np.load(made / "frames.npz")["frames"], read_video(made / "video.mp4")
    assert frames.dtype == np.uint8 and frames.shape == (FRAMES, 32, 32, 3)
    assert video.shape == (FRAMES, 32 * SCALE, 32 * SCALE, 3)
    middles = video[:, SCALE // 2 :: SCALE, SCALE // 2 :: SCALE].astype(int)
    assert np.abs(middles - frames).mean() < 4
    # Nearest neighbour: inside a square the colour hardly changes.
    squares = video.reshape(FRAMES, 32, SCALE, 32, SCALE, 3)[:, :, 2:-2, :, 2:-2].astype(int)
    assert (squares.max((2, 4)) - squares.min((2, 4))).mean() < 8


def test_record_says_what_was_run(record):
    settings = replace(TOY_SETTINGS, steps=1, top_k=5)
    assert record["settings"] == vars(settings)
    assert record["prompts"] == STORY and record["seed"] == 3 and record["frames"] == FRAMES
    assert record["interrupted"] is False and record["error"] is None
    assert {"device", "torch", "python", "memflow_ops", "commit", "date"} <= record.keys()
    assert [chunk["first_frame"] for chunk in record["chunks"]] == list(range(0, FRAMES, 3))
    assert [chunk["prompt"] for chunk in record["chunks"]] == [prompt for prompt in STORY for _ in range(2)]


def test_record_says_what_was_remembered(record):
    for chunk in record["chunks"]:
        assert len(chunk["relevance"]) == len(chunk["retrieved"]) <= 3
        assert len(chunk["activation"]) == len(chunk["candidates"])
        assert set(chunk["retrieved"]) <= set(chunk["candidates"]) <= set(range(max(chunk["first_frame"] - 3, 0)))
        if chunk["first_frame"] >= 6:
            assert sum(chunk["activation"]) == pytest.approx(1)


def test_overhead_is_the_median_of_pairs_beyond_the_window(record):
    pairs = [(chunk["seconds"], chunk["baseline_seconds"]) for chunk in record["chunks"][2:]]
    cost = record["overhead"]
    assert cost["chunks_compared"] == 4
    assert cost["ratio"] == pytest.approx(statistics.median(ours / without for ours, without in pairs))
    assert cost["ratio_p20"] <= cost["ratio"] <= cost["ratio_p80"]
    assert cost["seconds_per_chunk"] == pytest.approx(statistics.median(ours for ours, _ in pairs))
    assert cost["baseline_seconds_per_chunk"] == pytest.approx(statistics.median(without for _, without in pairs))


def test_timeline_is_a_picture_of_this_story(made):
    picture = imread(made / "timeline.png")
    assert picture.shape[0] > 900 and picture.shape[1] > 900
    assert picture[..., :3].mean() > 0.6, "light"
    assert picture[..., :3].std() > 0.05, "not blank"


def test_seed_decides_and_baseline_does_not(made, tmp_path, weights):
    story = write_story(tmp_path / "two.jsonl", STORY, STORY)
    options = ("--steps", 1, "--frames-per-prompt", 6, "--seed", 2, "--top-k", 5, "--device", "cpu", "--no-baseline")
    assert memflow("toy", "generate", story, "--out", tmp_path / "out", "--weights", weights, *options) == 0
    frames = [np.load(tmp_path / "out" / f"story-{i:03d}" / "frames.npz")["frames"] for i in range(2)]
    # Seeds 2 and 3: the second is the run above, but for its baseline.
    assert (frames[1] == np.load(made / "frames.npz")["frames"]).all()
    assert (frames[0] != frames[1]).any()
    assert json.loads((tmp_path / "out" / "story-001" / "run.json").read_text())["overhead"] is None


@pytest.mark.parametrize("memory", ["none", "sink", "full"])
def test_other_kinds_of_memory(tmp_path, weights, memory):
    story = write_story(tmp_path / "story.jsonl", STORY[:2])
    options = ("--memory", memory, "--steps", 1, "--frames-per-prompt", 6, "--device", "cpu")
    assert memflow("toy", "generate", story, "--out", tmp_path, "--weights", weights, *options) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["frames"] == 12 and (record["overhead"] is None) == (memory == "none")
    assert imread(tmp_path / "timeline.png").shape[1] > 900


ENDS = {"Ctrl-C": signal.SIGINT, "ended": signal.SIGTERM, "hung up": signal.SIGHUP, "killed": signal.SIGKILL}


@pytest.mark.parametrize("end", list(ENDS.values()), ids=ENDS)
def test_a_run_that_is_ended_leaves_a_playable_video(tmp_path, weights, end):
    story = write_story(tmp_path / "story.jsonl", STORY * 200)
    words = ("toy", "generate", story, "--out", tmp_path, "--weights", weights, "--device", "cpu")
    command = [sys.executable, "-m", "memflow_ops", *map(str, words), "--steps", "1", "--no-baseline"]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the tests, and so the command, ignore SIGHUP
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    signal.signal(signal.SIGHUP, before)
    growing = tmp_path / "video.part.mp4"
    patience = time.monotonic() + 500
    while not (growing.exists() and growing.stat().st_size > 4000):
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < patience
        time.sleep(0.05)
    running.send_signal(end)
    _, said = running.communicate(timeout=500)
    if end == signal.SIGKILL:
        assert len(read_video(growing)) > 0
        assert not (tmp_path / "video.mp4").exists()
        return
    assert running.returncode == 130
    assert "interrupted" in said and "Traceback" not in said
    frames = np.load(tmp_path / "frames.npz")["frames"]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["interrupted"] and record["frames"] == len(frames) == 3 * len(record["chunks"]) < 7200
    assert len(read_video(tmp_path / "video.mp4")) == len(frames)
    assert imread(tmp_path / "timeline.png").shape[1] > 900
    assert not growing.exists()


def test_an_error_on_the_way_keeps_what_was_made(tmp_path, weights):
    import torch

    from memflow_ops.model.toy.checkpoint import load_model
    from memflow_ops.model.toy.generate import make_toy_plans, stream_toy_story

    def fail(run):
        raise RuntimeError("out of everything")

    model = load_model(weights, torch.device("cpu"))
    settings = replace(TOY_SETTINGS, steps=1)
    with pytest.raises(RuntimeError, match="everything"):
        stream_toy_story(model, make_toy_plans([STORY], tmp_path, settings, baseline=False)[0], fail)
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["frames"] == 3 and record["interrupted"] and "out of everything" in record["error"]
    assert len(read_video(tmp_path / "video.mp4")) == 3


# ------------------------------------------------------------------------------------------------------------ bad input

GOOD = '{"prompts": ["a ball in the meadow"]}'
BAD_STORIES = {
    "not JSON": ("{", "line 1"),
    "second line": (f"{GOOD}\n[]", "line 2"),
    "no prompts": ('{"prompts": []}', "at least one prompt"),
    "no such key": ('{"story": ["a ball in the meadow"]}', "prompts"),
    "prompts are numbers": ('{"prompts": [1]}', "string"),
    "unknown word": ('{"prompts": ["a dragon in the meadow"]}', "'dragon'"),
    "deep": ("[" * 100_000, "a story is a line of its own"),
    "no place": ('{"prompts": ["a ball"]}', "one place"),
    "empty file": ("\n", "no story"),
}


@pytest.mark.parametrize("text, expected", BAD_STORIES.values(), ids=BAD_STORIES.keys())
def test_bad_story(tmp_path, weights, capfd, text, expected):
    (tmp_path / "story.jsonl").write_text(text)
    out = tmp_path / "out"
    assert memflow("toy", "generate", tmp_path / "story.jsonl", "--out", out, "--weights", weights) == 2
    said = capfd.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not out.exists()


def test_unknown_words_list_the_vocabulary(tmp_path, capfd):
    (tmp_path / "story.jsonl").write_text(BAD_STORIES["unknown word"][0])
    assert memflow("toy", "generate", tmp_path / "story.jsonl", "--out", tmp_path / "out") == 2
    said = capfd.readouterr().err
    assert all(word in said for word in ("ball", "box", "star", "ring", "empty", "meadow", "desert", "sea", "night"))


BAD_OPTIONS = {
    "seed": ("--seed", "-1"),
    "seed is a word": ("--seed", "x"),
    "top k": ("--top-k", "0"),
    "bank": ("--bank-frames", "-1"),
    "steps": ("--steps", "0"),
    "frames per prompt": ("--frames-per-prompt", "0"),
    "memory": ("--memory", "elephant"),
    "device": ("--device", "abacus"),
    "no such GPU": ("--device", "cuda:99"),
    "no weights": ("--weights", "/no/such/file"),
    "no such option": ("--colour", "red"),
}


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_option(tmp_path, weights, capfd, options):
    (tmp_path / "story.jsonl").write_text(GOOD)
    out = tmp_path / "out"
    all_options = ("--weights", weights, *options)
    assert memflow("toy", "generate", tmp_path / "story.jsonl", "--out", out, *all_options) == 2
    said = capfd.readouterr().err
    assert said.startswith("memflow: ") and said.count("\n") == 1
    assert not out.exists()


def test_files_that_are_in_the_way(tmp_path, weights, capfd):
    story = write_story(tmp_path / "story.jsonl", STORY)
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "below"):
        assert memflow("toy", "generate", story, "--out", out, "--weights", weights) == 2
        assert "cannot write" in capfd.readouterr().err
    assert memflow("toy", "generate", tmp_path / "missing.jsonl", "--out", tmp_path / "out", "--weights", weights) == 2
    assert "missing.jsonl" in capfd.readouterr().err
    assert memflow("toy", "generate", tmp_path, "--out", tmp_path / "out", "--weights", weights) == 2
    (tmp_path / "text.safetensors").write_text("mine")
    assert memflow("toy", "generate", story, "--out", tmp_path / "out", "--weights", tmp_path / "text.safetensors") == 2
    assert (tmp_path / "taken").read_text() == "mine" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["video.mp4", "run.json", "timeline.png"])
def test_a_folder_in_the_place_of_a_file(tmp_path, weights, capfd, name):
    story, out = write_story(tmp_path / "story.jsonl", STORY), tmp_path / "out"
    (out / name).mkdir(parents=True)
    assert memflow("toy", "generate", story, "--out", out, "--weights", weights) == 2
    assert f"cannot write {out / name}: a folder is in its place" in capfd.readouterr().err
    assert [path.name for path in out.iterdir()] == [name]


UNUSED = {
    "none": (("none", "--top-k", 8, "--bank-frames", 4), "--bank-frames, --top-k would change nothing"),
    "sink": (("sink", "--query-group", 0), "--query-group would change nothing with --memory sink"),
    "full": (("full", "--bank-frames", 3), "--bank-frames is for memflow, released"),
    "released": (("released", "--top-k", 8), "--top-k is for memflow"),
    "baseline": (("none", "--baseline"), "--baseline would change nothing with --memory none"),
}


@pytest.mark.parametrize("options, expected", UNUSED.values(), ids=UNUSED.keys())
def test_options_that_would_change_nothing_are_refused(tmp_path, weights, capfd, options, expected):
    """Even where they have the value that they have by default: who gives one expects something of it."""
    story, out = write_story(tmp_path / "story.jsonl", STORY), tmp_path / "out"
    assert memflow("toy", "generate", story, "--out", out, "--weights", weights, "--memory", *options) == 2
    said = capfd.readouterr().err
    assert expected in said and said.startswith("memflow: ") and said.count("\n") == 1
    assert not out.exists()
