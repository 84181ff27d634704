"""`memflow toy demo`: the story, and the words that say what came of it."""

import json

import pytest
from command_line import memflow

from memflow_ops.cli import toy
from memflow_ops.model.stories.prompts import chunk_prompts, read_stories
from memflow_ops.model.toy.generate import DEMO_STORY
from memflow_ops.model.toy.language import parse_prompt
from memflow_ops.model.toy.returns import find_returns
from memflow_ops.model.toy.settings import TOY_SETTINGS


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


SEEN = {
    "same": ({}, "it came back with the same look: red halves, hue 10 degrees, when it left, red halves, hue 352"),
    "another": ({"same": False}, "with ANOTHER look"),
    "did not leave": ({"hue_before": None}, "was not to be seen when it should have left"),
    "did not return": ({"hue_after": None}, "was not to be seen when it should have returned"),
}


@pytest.mark.parametrize("change, expected", SEEN.values(), ids=SEEN.keys())
def test_a_return_is_told_in_plain_words(change, expected):
    seen = {"hue_before": 10.0, "hue_after": 352.0, "pattern_before": "halves", "pattern_after": "halves", "same": True}
    assert expected in toy.looks(seen | change, "ball")
