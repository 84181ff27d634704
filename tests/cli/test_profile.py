"""`memflow toy profile-selection`, and the places that both commands for profiles refuse to write to."""

import json

import pytest
from command_line import memflow, write_story

from memflow_ops.cli import main, profile
from memflow_ops.files import sha256
from memflow_ops.model.selection_profile import profile as selection_profile_profile

OPTIONS = {"--steps": 1, "--chunks": 2, "--calls": 2, "--rounds": 1, "--block-size": 16, "--query-group": 0}
QUICK = (*(word for option in OPTIONS.items() for word in option), "--device", "cpu")
PROMPTS = ["an empty meadow", "a ball in the meadow", "an empty sea", "a ball at night"]


@pytest.fixture
def story(tmp_path):
    return write_story(tmp_path / "story.jsonl", PROMPTS, ["an empty sea"])


def test_a_story_is_profiled(tmp_path, weights, story, capfd):
    out = tmp_path / "deep" / "selection.json"
    options = ("--bank-frames", 2, "--frames-per-prompt", 6, "--seed", 3, "--weights", weights)
    assert memflow("toy", "profile-selection", story, "--out", out, *QUICK, *options) == 0
    said = json.loads(out.read_text())
    assert said["command"] == "memflow toy profile-selection" and not said["interrupted"] and said["torch"]
    assert said["stories"] == [PROMPTS] and said["weights"] == {"name": weights.name, "sha256": sha256(weights)}
    assert said["clock"] in ("wall time", "CPU time of the thread")
    assert said["settings"]["bank_frames"] == 2 and said["settings"]["steps"] == 1
    assert said["sampling"] == {"chunks": 2, "calls": 2, "heads": 3, "queries": 512, "rounds": 1, "seed": 3}
    assert (said["bank_frames_with_sink"], said["frame_tokens"], len(said["chunks_measured"])) == (5, 64, 2)
    assert {(row["blocks"], row["block_size"], row["query_group"]) for row in said["rows"]} == {
        ("top", 16, None), ("moments", 16, None), ("normalised", 16, None), ("oracle", 16, None), ("random", 16, 1),
        ("top", 64, None), ("moments", 64, None), ("normalised", 64, None), ("oracle", 64, None), ("random", 64, 1),
    }  # fmt: skip
    assert [row["top_k"] for row in said["rankings"] if row["block_size"] == 16] == [1, 3]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr().out
    assert "blocks of 16, per chunk" in printed and "frames, per chunk, as released" in printed
    assert f"{100 * said['bank_mass']:.0f} % of attention falls on the bank" in printed
    assert "moments less means" in printed and "(blocks of 16, per chunk)" in printed
    assert "times the time of the window alone" in printed and str(out) in printed


def test_held_out_stories_are_the_default(tmp_path, weights, capfd, monkeypatch):
    monkeypatch.setattr(profile, "STORY_LENGTH", 0)
    out = tmp_path / "selection.json"
    assert (
        memflow("toy", "profile-selection", "--out", out, *QUICK, "--weights", weights, "--stories", 3, "--rounds", 0)
        == 0
    )
    said = json.loads(out.read_text())
    assert [len(story) for story in said["stories"]] == [6, 6, 6]
    assert "fewest keys" in capfd.readouterr().out


@pytest.mark.parametrize("measured", [0, 1])
def test_ctrl_c_keeps_what_was_measured(tmp_path, weights, story, capfd, monkeypatch, measured):
    """In the first chunk, and where a second one would be measured."""

    class Interrupted(selection_profile_profile.Streamer):
        def next_chunk(self, prompts):
            if self.cache.committed == (15 if measured else 0):
                raise KeyboardInterrupt
            return super().next_chunk(prompts)

    monkeypatch.setattr(selection_profile_profile, "Streamer", Interrupted)
    out = tmp_path / "selection.json"
    assert memflow("toy", "profile-selection", story, "--out", out, *QUICK, "--chunks", 99, "--weights", weights) == 130
    printed = capfd.readouterr()
    if measured:
        said = json.loads(out.read_text())
        assert said["interrupted"] and said["chunks_measured"] == list(range(5, 15)) and said["rows"]
        assert out.with_suffix(".png").is_file()
        assert "after 10 measured chunks; they are kept" in printed.err and "per chunk" in printed.out
    else:
        assert "nothing was written" in printed.err and not out.exists()


def test_what_was_measured_is_on_disk_before_the_end(tmp_path, weights, story, monkeypatch):
    """A kill or an error loses at most the chunk that was being measured."""

    def broken(*arguments, **options):
        yield next(whole(*arguments, **options))
        raise RuntimeError("out of everything")

    whole = selection_profile_profile.profile_selection
    monkeypatch.setattr(selection_profile_profile, "profile_selection", broken)
    out = tmp_path / "selection.json"
    with pytest.raises(RuntimeError):
        main([str(w) for w in ("toy", "profile-selection", story, "--out", out, *QUICK, "--weights", weights)])
    assert len(json.loads(out.read_text())["chunks_measured"]) == 1


BAD = {
    "block": (("--block-size", 65), "inside a frame of 64 tokens, got block_size=65"),
    "no block": (("--block-size", 0), "block_size must be a positive number, got 0"),
    "bank": (("--bank-frames", 40), "a bank of 40 frames is full in chunk 42, but the story ends after chunk 15"),
    "target": (("--out", "selection.txt"), ".json"),
    "real option": (("--text-encoder", "/there"), "No such option: --text-encoder"),
    "weights": (("--weights", "/no/such/file"), "/no/such/file"),
}


@pytest.mark.parametrize("options, expected", BAD.values(), ids=BAD.keys())
def test_bad_options_are_refused_before_anything_is_written(tmp_path, story, capfd, options, expected):
    out = tmp_path / "out"
    assert memflow("toy", "profile-selection", story, "--out", out / "selection.json", *QUICK, *options) == 2
    said = capfd.readouterr().err
    assert expected in said and said.count("\n") == 1 and said.startswith("memflow: ")
    assert not out.exists()


@pytest.mark.parametrize(
    "command",
    [("toy", "profile-selection"), ("profile-selection", "--checkpoint", "/there", "--text-encoder", "/there")],
    ids=["toy", "real"],
)
@pytest.mark.parametrize(
    "out, expected",
    [
        (".", "takes the name of a .json file"),
        ("p.json", "takes the name of a .png file"),
        ("/proc/deep/p.json", "cannot write to the folder /proc/deep"),
        ("story.jsonl/deep/p.json", "story.jsonl is a file"),
    ],
)
def test_places_that_cannot_be_written_to_are_named_before_anything_is_loaded(
    tmp_path, story, capfd, monkeypatch, command, out, expected
):
    monkeypatch.setattr(profile, "load_model", None)
    monkeypatch.setattr(profile, "read_stories", None)
    (tmp_path / "p.png").mkdir()
    assert memflow(*command, story, "--out", tmp_path / out, *QUICK) == 2
    said = capfd.readouterr().err
    assert expected in said and said.count("\n") == 1 and said.startswith("memflow: ")
    assert {path.name for path in tmp_path.iterdir()} == {"story.jsonl", "p.png"}
