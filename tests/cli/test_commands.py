"""The other commands, and the words they choose."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from memflow_ops import environment
from memflow_ops.cli import main, toy
from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.stories.prompts import chunk_prompts, read_stories
from memflow_ops.model.stories.video import to_pixels
from memflow_ops.model.streaming.settings import USED_BY
from memflow_ops.model.streaming.streamer import stream
from memflow_ops.model.toy import train, world
from memflow_ops.model.toy.evaluation import evaluate
from memflow_ops.model.toy.generate import DEMO_STORY
from memflow_ops.model.toy.language import embed_prompts, parse_prompt
from memflow_ops.model.toy.returns import Return, find_returns, judge_return
from memflow_ops.model.toy.settings import TOY_SETTINGS


def memflow(*words) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def test_help_names_every_command(capfd):
    assert memflow() == 0
    said = capfd.readouterr().out
    for command in ("generate", "convert", "verify", "profile-selection", "bench", "info", "toy"):
        assert f" {command} " in said
    assert memflow("toy") == 0
    said = capfd.readouterr().out
    for command in ("demo", "generate", "train", "evaluate", "profile-selection"):
        assert f" {command} " in said


@pytest.mark.parametrize("command", ["demo", "train", "evaluate"])
def test_defaults_are_those_of_the_library(command):
    defaults = {name: p.default for name, p in inspect.signature(getattr(toy, command)).parameters.items()}
    library = {
        "demo": vars(TOY_SETTINGS),
        "train": {name: p.default for name, p in inspect.signature(train.train).parameters.items()},
        "evaluate": {name: p.default for name, p in inspect.signature(evaluate.evaluate_kinds).parameters.items()},
    }[command]
    shared = (defaults.keys() & library.keys()) - {"out", "weights"}
    assert len(shared) >= 1
    assert {name: defaults[name] for name in shared} == {name: library[name] for name in shared}


def test_info_without_triton():
    program = "import sys; sys.modules['triton'] = None\nfrom memflow_ops.cli import main; main(['info'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line[:36].strip(): line[36:] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert rows["torch"] in (torch.__version__, "yes") and rows["reference"] == "yes"
    assert "not installed" in rows["our Triton kernel"]
    assert "matplotlib" not in done.stderr


def test_device_is_refused_where_it_is_not():
    assert environment.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="cuda:99"):
        environment.pick_device("cuda:99")


def test_demo_story_has_a_return_that_needs_memory():
    (prompts,) = read_stories(DEMO_STORY, parse_prompt)
    settings = TOY_SETTINGS
    spoken = [prompt for (prompt,) in chunk_prompts([prompts], 12)]
    first = find_returns(spoken, settings.chunk_frames)[0]
    assert len(prompts) >= 4 and first.gap >= 24
    assert first.character not in spoken[0], "never in the sink"


def test_demo_says_what_came_of_it(tmp_path, weights, capfd):
    assert memflow("toy", "demo", "--out", tmp_path, "--steps", 1, "--weights", weights, "--device", "cpu") == 0
    said = capfd.readouterr().out
    record = json.loads((tmp_path / "run.json").read_text())
    there = record["returns"][0]
    assert f"The {there['character']} leaves after frame {there['last_seen']}" in said
    for words in (
        "With memory:",
        "Without memory:",
        f"{100 * (record['overhead']['ratio'] - 1):+.0f} %",
        str(tmp_path),
    ):
        assert words in said


def rendered(who: int, hues: list[float], pattern: int = 0) -> np.ndarray:
    """Three frames per hue (degrees) of a character, or of nobody (4)."""
    hue = torch.tensor(hues).repeat_interleave(3) / 360
    count = len(hue)
    pattern = torch.full((count, 1), pattern)
    centre = torch.full((count, 1, 2), 0.5)
    frames = world.render(
        torch.full((count, 1), who), torch.zeros(count, dtype=torch.long), hue[:, None], pattern, centre
    )
    return to_pixels(frames.transpose(0, 1))


@pytest.mark.parametrize(
    "before, after, same", [(10, 352, True), (350, 8, True), (100, 140, False), (200, 222, True), (0, 180, False)]
)
def test_judged_return(before, after, same):
    frames = rendered(0, [50, before, 90, after])
    judged = judge_return(frames, Return("ball", 5, 9, None, None), 3)
    expected = min((before - after) % 360, (after - before) % 360)
    assert judged.difference == pytest.approx(expected, abs=3)  # the judge's colour circle is not quite HSV's
    assert judged.same == same
    words = toy.looks(vars(judged), "ball")
    assert ("with ANOTHER look" in words) == (not same)


def test_another_pattern_is_another_look():
    frames = np.concatenate([rendered(0, [50, 60]), rendered(0, [200, 60], pattern=2)])
    judged = judge_return(frames, Return("ball", 5, 9, None, None), 3)
    assert judged.difference == pytest.approx(0, abs=1) and not judged.same
    assert (judged.pattern_before, judged.pattern_after) == ("halves", "checks")


def test_sides_are_judged_apart():
    """A ball on the left that comes back on the right, beside another each time."""
    who, hue = torch.tensor([[0, 2], [1, 0]]), torch.tensor([[0.3, 0.8], [0.6, 0.3]])
    centre = torch.tensor([[world.LEFT, 0.5], [world.RIGHT, 0.5]]).expand(2, 2, 2)
    frames = world.render(who, torch.zeros(2, dtype=torch.long), hue, torch.zeros(2, 2, dtype=torch.long), centre)
    frames = to_pixels(frames.repeat_interleave(3, 0).transpose(0, 1))
    assert judge_return(frames, Return("ball", 2, 3, 0, 1), 3).same
    assert not judge_return(frames, Return("ball", 2, 3, 0, 0), 3).same


def test_nobody_returns():
    frames = np.concatenate([rendered(0, [50, 60]), rendered(4, [0])])
    judged = judge_return(frames, Return("ball", 2, 6, None, None), 3)
    assert judged.hue_before is not None and judged.hue_after is None and not judged.same
    assert "not to be seen when it should have returned" in toy.looks(vars(judged), "ball")


def test_returns_are_found():
    spoken = ["empty meadow", "ball sea", "ball night", "star sea", "ball sea", "star sea"]
    assert find_returns(spoken, 3) == [Return("ball", 8, 12, None, None), Return("star", 11, 15, None, None)]
    assert find_returns(spoken, 3)[0].gap == 3
    assert find_returns(spoken[:3], 3) == []
    spoken = ["ball and star sea", "empty sea", "star and ball sea", "star sea"]
    assert find_returns(spoken, 3) == [Return("star", 2, 6, 1, 0), Return("ball", 2, 6, 0, 1)]


def test_an_evaluation_that_is_stopped_keeps_what_was_judged(tmp_path, monkeypatch, capfd):
    """Kinds are judged for real, on one short story; then Ctrl-C comes while the third is being made, or the timing."""
    monkeypatch.setattr("memflow_ops.model.toy.evaluation.held_out.STORY_PROMPTS", (6,))
    short = ("toy", "evaluate", "--stories", 1, "--steps", 1, "--out", tmp_path / "e.json")
    judge_really, calls = evaluate.summarise, []

    def summarise(*arguments, **options):
        calls.append(arguments[0])
        if arguments[0] == "full":
            raise KeyboardInterrupt
        return judge_really(*arguments, **options)

    monkeypatch.setattr(evaluate, "summarise", summarise)
    kinds = [word for kind in ("none", "sink", "none", "full") for word in ("--memory", kind)]
    assert memflow(*short, *kinds) == 130
    assert calls == ["none", "sink", "full"]
    written = json.loads((tmp_path / "e.json").read_text())
    assert [row["memory"] for row in written["rows"]] == ["none", "sink"] and written["timings"] == {}
    said = capfd.readouterr().err
    assert "what was judged is in" in said and said.endswith("memflow: interrupted\n")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "time_kinds", interrupted)
    (tmp_path / "e.json").unlink()
    assert memflow(*short, "--memory", "none", "--seed", 5) == 130
    written = json.loads((tmp_path / "e.json").read_text())
    assert [row["memory"] for row in written["rows"]] == ["none"] and not written["held_out"]
    assert "not held out" in capfd.readouterr().err


UNUSED = {
    "evaluate": (
        ("toy", "evaluate", "--top-k", 3, "--memory", "none", "--memory", "dense bank"),
        "--top-k would change nothing",
    ),
    "bench": (("bench", "--stored", "--rounds", 3), "--rounds would change nothing with --stored"),
    "profile": (("toy", "profile-selection", DEMO_STORY, "--stories", 3), "--stories would change nothing"),
}


@pytest.mark.parametrize("words, expected", UNUSED.values(), ids=UNUSED.keys())
def test_options_that_would_change_nothing_are_refused(tmp_path, monkeypatch, capfd, words, expected):
    monkeypatch.chdir(tmp_path)
    assert memflow(*words) == 2
    said = capfd.readouterr().err
    assert expected in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", ["none", "sink", "full", "memflow", "released"])
@pytest.mark.parametrize("option, values", [("bank_frames", (1, 2)), ("top_k", (1, 3)), ("query_group", (16, None))])
def test_who_uses_an_option(memory, option, values, weights):
    """The table by which commands refuse them says what changes the frames, and what takes memory."""
    model = load_checkpoint(weights)
    changed = [replace(TOY_SETTINGS, memory=memory, steps=1, **{option: value}) for value in values]
    frames = [
        [c.frames for c in stream(model, [("a ball at night",)] * 5, settings, encode=embed_prompts)]
        for settings in changed
    ]
    sizes = [settings.cache_layout(model, 1).device_bytes for settings in changed]
    used = memory in USED_BY[option]
    assert all(map(torch.equal, *frames)) is (sizes[0] == sizes[1] and not used)


def test_an_evaluation_that_cannot_be_written_does_not_begin(tmp_path, capfd):
    (tmp_path / "p.png").mkdir()
    for out, says in ((tmp_path / "p.json", "takes the name of a .png file"), ("/proc/e.json", "cannot write to")):
        assert memflow("toy", "evaluate", "--out", out) == 2
        assert says in capfd.readouterr().err
