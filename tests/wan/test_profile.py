"""`memflow profile-selection` with a small random checkpoint, which needs no VAE."""

import json

import pytest
from command_line import memflow

STORY = ["A ball in the meadow", "the sea at night", "the ball returns"]
SMALL = ("--height", 32, "--width", 48, "--device", "cpu", "--steps", 1, "--chunks", 1, "--calls", 2, "--rounds", 1)


@pytest.fixture
def parts(tmp_path, pipeline):
    story = tmp_path / "story.jsonl"
    story.write_text(json.dumps({"prompts": STORY}) + "\n")
    return (story, "--checkpoint", pipeline, "--text-encoder", pipeline)


def test_a_checkpoint_is_profiled(tmp_path, pipeline, parts, capfd):
    out = tmp_path / "out" / "selection.json"
    sizes = ("--block-size", 3, "--query-group", 4, "--query-group", 0, "--frames-per-prompt", 8)
    assert memflow("profile-selection", *parts, "--out", out, *SMALL, *sizes) == 0
    said = json.loads(out.read_text())
    assert said["frame_tokens"] == 6 and said["stories"] == [STORY]
    assert said["settings"]["bank_frames"] == 2, "as large as is full for a quarter of the eight chunks"
    assert said["bank_frames_with_sink"] == 5 and said["chunks_measured"] in ([5], [6], [7])
    assert {row["block_size"] for row in said["rows"]} == {3, 6}
    assert said["sources"]["vae"] is None and said["sources"]["text_encoder"] == pipeline.name
    assert out.with_suffix(".png").is_file() and [path.name for path in tmp_path.iterdir()].count("out") == 1
    printed = capfd.readouterr().out
    assert "local window, 9 frames" in printed and "VAE" not in printed and "blocks of 3, per 4 queries" in printed


def test_default_sizes_fit_the_frame(tmp_path, parts):
    out = tmp_path / "selection.json"
    assert memflow("profile-selection", *parts, "--out", out, *SMALL, "--frames-per-prompt", 8, "--rounds", 0) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {(row["block_size"], row["query_group"]) for row in rows if row["blocks"] == "top"} == {
        (6, 1), (6, 128), (6, None)
    }  # fmt: skip


def test_a_story_too_short_is_refused_before_the_weights_are_read(tmp_path, parts, capfd):
    out = tmp_path / "out" / "selection.json"
    words = (*parts, "--out", out, *SMALL, "--frames-per-prompt", 8, "--bank-frames", 30)
    assert memflow("profile-selection", *words) == 2
    said = capfd.readouterr()
    assert "a bank of 30 frames is full in chunk 33" in said.err and "parameters" not in said.out
    assert not out.parent.exists()
