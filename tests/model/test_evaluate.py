"""The judgement of held-out stories, on streams drawn by the renderer instead of a model, and one by the model."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.toy import world
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.toy.evaluation import held_out
from memflow_ops.model.toy.evaluation.evaluate import check_evaluation, evaluate_kinds, time_kinds
from memflow_ops.model.toy.evaluation.figures import KindFigures, KindTiming, Proportion
from memflow_ops.model.toy.evaluation.held_out import (
    FRAMES_PER_PROMPT,
    Appearance,
    appearances,
    is_return,
    make_stories,
    named_at,
)
from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS, OraclePolicy
from memflow_ops.model.toy.evaluation.report import evaluation_table, write_evaluation
from memflow_ops.model.toy.evaluation.summary import judge_stream, summarise
from memflow_ops.model.toy.language import NOBODY, parse_prompt
from memflow_ops.model.toy.settings import TOY_SETTINGS

STORIES = 4


class Truth:
    """Draws stories as a perfect memory would make them, but for what a test changes."""

    def __init__(self, stories: list[list[str]], seed: int = 1):
        self.stories = stories
        generator = torch.Generator().manual_seed(seed)
        self.hue = torch.rand(len(stories), NOBODY, generator=generator)
        self.pattern = torch.randint(3, (len(stories), NOBODY), generator=generator)
        self.turn_returns = 0.0
        """degrees by which a character's hue is off whenever it is back"""
        self.other_pattern = self.other_shape = self.absent = False
        """at returns only"""
        self.retrieves_named = True
        self.alike = False
        """all characters of a story have one hue"""

    def chunks(self) -> Iterator[Chunk]:
        back = {(it.story, it.prompt, it.character) for it in appearances(self.stories) if it.first is not None}
        for index in range(len(self.stories[0]) * FRAMES_PER_PROMPT // 3):
            prompt, part = divmod(index * 3, FRAMES_PER_PROMPT)
            frames, retrieved = [], []
            for story, prompts in enumerate(self.stories):
                scene = parse_prompt(prompts[prompt])
                who, hue, pattern, x = [], [], [], []
                for side, character in enumerate(scene.who):
                    returns = (story, prompt, character) in back
                    if returns and self.absent:
                        continue
                    who.append((character + (returns and self.other_shape)) % NOBODY)
                    hue.append(self.hue[story, 0 if self.alike else character] + returns * self.turn_returns / 360)
                    pattern.append((self.pattern[story, character] + (returns and self.other_pattern)) % 3)
                    x.append((world.LEFT, world.RIGHT)[side] if len(scene.who) == 2 else world.MIDDLE)
                if part in (3, 6):
                    who = hue = pattern = x = []  # chunks that nobody looks at
                centre = torch.tensor([[at, 0.5] for at in x]).view(-1, 2)
                whom, tones = (torch.tensor(of, dtype=torch.long) for of in (who, pattern))
                frames.append(world.render(whom, torch.tensor(scene.place), torch.tensor(hue) % 1, tones, centre))
                past = range(0, 3 * index - 3, 3)
                shown = [f for f in past if bool(set(named_at(prompts, f)) & set(scene.who)) == self.retrieves_named]
                retrieved.append(shown[-3:])
            video = torch.stack(frames)[:, :, None].expand(-1, -1, 3, -1, -1)
            empty: list[list[float]] = [[] for _ in self.stories]
            spoken = [prompts[prompt] for prompts in self.stories]
            candidates = [[0, 1, 2, *found] for found in retrieved]
            yield Chunk(index, 3 * index, spoken, video, retrieved, empty, candidates, empty, 0.5)


def judged(**changes: object) -> KindFigures:
    streamed = []
    for i, stories in enumerate(make_stories(STORIES, 10_000)[:2]):
        truth = Truth(stories, seed=i)
        for name, value in changes.items():
            setattr(truth, name, value)
        streamed.append(judge_stream(stories, truth.chunks(), 3))
    return summarise("memflow", streamed, TOY_SETTINGS, blocks_per_frame=4)


def returns() -> list[Appearance]:
    return [it for stories in make_stories(STORIES, 10_000)[:2] for it in appearances(stories) if is_return(it)]


def test_a_perfect_stream_is_judged_perfect():
    row = judged()
    shares = (row.hue, row.pattern, row.shape, row.pairs)
    assert [share.value for share in shares] == [1.0] * 4
    assert row.hue.count == row.pattern.count == len(returns()) >= 15
    assert row.pairs.count == sum(it.side == 0 for it in returns()) >= 1
    assert row.shape.count > row.hue.count  # first appearances too
    assert row.median_error < 1 and row.drift < 1 and row.precision == 1.0
    assert sum(row.hues) == row.shape.count - row.hue.count
    assert row.activated == pytest.approx(TOY_SETTINGS.top_k / 24, abs=0.02)


@pytest.mark.parametrize(("turn", "match"), [(20, 1.0), (-20, 1.0), (40, 0.0), (180, 0.0)])
def test_a_return_matches_within_30_degrees(turn, match):
    row = judged(turn_returns=turn)
    assert row.hue.value == row.pairs.value == match
    assert row.median_error == pytest.approx(abs(turn), abs=4)
    assert row.pattern.value == row.shape.value == 1


def test_patterns_and_shapes_are_judged_apart_from_hues():
    row = judged(other_pattern=True)
    assert (row.hue.value, row.pattern.value, row.shape.value) == (1, 0, 1)
    row = judged(other_shape=True)
    new = row.shape.count - row.hue.count
    assert (row.hue.value, row.pattern.value) == (1, 1)
    assert row.shape.value == pytest.approx(new / row.shape.count, abs=1e-3)


def test_an_absent_character_is_a_miss_everywhere():
    row = judged(absent=True)
    assert row.hue.value == row.pattern.value == row.pairs.value == 0
    assert row.hue.count == len(returns())
    assert row.shape.value == pytest.approx(1 - row.hue.count / row.shape.count, abs=1e-3)
    assert math.isnan(row.median_error)


def test_chance_is_that_of_shuffled_identities():
    """Looks are drawn evenly here; every hue 90 degrees off at returns changes nothing for other stories."""
    row = judged()
    assert row.chance_hue == pytest.approx(1 / 6, abs=0.12) and row.chance_pattern == pytest.approx(1 / 3, abs=0.12)
    assert judged(turn_returns=90).chance_hue == pytest.approx(1 / 6, abs=0.12)
    assert judged(absent=True).chance_hue == judged(absent=True).chance_pattern == 0


def test_others_are_those_of_the_same_story():
    row = judged(alike=True)
    assert row.others_hue == 1 and row.chance_hue < 0.4
    assert judged().others_hue < 0.5 and judged(absent=True).others_hue == 0


def test_returns_are_counted_by_their_gap():
    row = judged()
    counts = [sum(low <= it.gap <= high for it in returns()) for low, high in ((24, 48), (49, 120), (121, 240))]
    assert [share.count for share in row.gaps.values()] == counts
    assert counts[0] and counts[1]


def test_precision_asks_who_was_shown():
    assert judged(retrieves_named=False).precision == 0


def test_intervals_are_wilson_s():
    """95 of 100: 88.8 to 97.8 % (Wilson 1927); no case, no share."""
    share = Proportion.of([True] * 95 + [False] * 5)
    assert (share.value, share.low, share.high) == (
        0.95,
        pytest.approx(0.8882, abs=2e-4),
        pytest.approx(0.9785, abs=2e-4),
    )
    assert math.isnan(Proportion.of([]).value)


def test_oracle_finds_all_who_are_named():
    story = ["empty sea", "ball sea", "star sea", "ball sea", "empty sea", "empty sea", "ball and star sea"]
    oracle = OraclePolicy(3, [story])
    frames = list(range(0, 60, 3))

    class Given:
        frames: list[list[int]] = []  # noqa: RUF012 - stands in for Candidates

    Given.frames = [frames]
    for prompt, expected in (
        ("ball sea", {0}),
        ("ball and star sea", {0, 2}),
        ("empty sea", set()),
        ("ring sea", set()),
    ):
        oracle.coming = [prompt]
        chosen = oracle.choose(Given, [], torch.ones(1)).frames[0]  # type: ignore[arg-type]
        assert len(chosen) == (3 if expected else 0) and len(set(chosen)) == len(chosen)
        assert {who for frame in chosen for who in named_at(story, frame)} == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((["nothing"], 1, 10_000), "unknown kind of memory 'nothing'; there are none, sink"),
        ((["none"], 1, -1), "seeds are not negative"),
        ((["none"], 0, 10_000), "at least one story"),
    ],
)
def test_what_cannot_be_judged_is_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        check_evaluation(*arguments)


def test_table_picture_and_json_show_every_row(tmp_path):
    rows = [judged(), judged(turn_returns=180)]
    timings = {"memflow": KindTiming(0.5, 1.25, 1.2, 1.3)}
    lines = evaluation_table(rows, timings).splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("memflow") and "100 % (" in lines[1] and " 0 % (" in lines[2]
    out = tmp_path / "deep" / "toy.json"
    assert lines[1].rstrip().endswith("+25 %")
    write_evaluation(rows, timings, TOY_SETTINGS, seed=10_000, stories=STORIES, weights=TOY_WEIGHTS, out=out)
    written = json.loads(out.read_text())
    assert [row["hue"]["value"] for row in written["rows"]] == [1.0, 0.0]
    assert written["held_out"]
    assert written["weights"]["sha256"] == hashlib.sha256(TOY_WEIGHTS.read_bytes()).hexdigest()
    assert written["settings"]["top_k"] == TOY_SETTINGS.top_k and written["seed"] == 10_000
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_kinds_are_timed_in_turn(monkeypatch):
    monkeypatch.setattr("memflow_ops.model.toy.evaluation.evaluate.TIMED_CHUNKS", range(2, 5))
    timings = time_kinds(load_checkpoint(TOY_WEIGHTS), ["none", "memflow"], replace(TOY_SETTINGS, steps=1))
    assert timings["none"].ratio == 1.0 and timings["none"].seconds > 0
    ours = timings["memflow"]
    assert ours.ratio is not None and ours.ratio_p20 <= ours.ratio <= ours.ratio_p80
    assert (
        time_kinds(load_checkpoint(TOY_WEIGHTS), ["memflow"], replace(TOY_SETTINGS, steps=1))["memflow"].ratio is None
    )


def test_memory_of_the_shipped_weights_brings_characters_back(monkeypatch):
    """Eight short stories, streamed for real: fails if memory stops helping."""
    monkeypatch.setattr(held_out, "STORY_PROMPTS", (6,))
    rows = {
        row.memory: row
        for row in evaluate_kinds(load_checkpoint(TOY_WEIGHTS), stories=8, kinds=["none", "memflow"], seed=20_000)
    }
    none, memflow = rows["none"], rows["memflow"]
    assert memflow.hue.count >= 8
    assert memflow.hue.value >= 0.85 and memflow.hue.value >= none.hue.value + 0.4
    assert memflow.pattern.value >= 0.75
    assert memflow.precision is not None and memflow.precision >= 0.9
    assert memflow.shape.value >= 0.9
    assert none.precision is None and set(rows) <= set(MEMORY_KINDS)
    assert all(a.memory != b.memory for a, b in pairwise(rows.values()))
