"""The score: a case worked out by hand, VBench's formula, frozen videos, and who returns in a story."""

import json
import math

import numpy as np
import pytest
import torch

from memflow_ops.model.score.consistency import consistency, interval, similarity, still_share
from memflow_ops.model.score.encoders import ToyJudge
from memflow_ops.model.score.score import read_run, retained, score_video, summarise
from memflow_ops.model.score.subjects import ReturnOf, find_returns, prompt_frames, toy_naming, word_naming
from memflow_ops.model.stories.video import to_pixels
from memflow_ops.model.toy.world import LEFT, MIDDLE, RIGHT, render

BALL, STAR = 0, 2
STORY = ["the fox", "a boat", "nobody", "the fox again", "an owl"]
NAMED = word_naming(["fox", "owl", "boat"])


def angle(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


class Angles:
    """An encoder whose feature is an angle: of 100 + degrees in a frame's red, or nothing for 0."""

    name = "angles"

    def whole(self, frames):
        red = frames[:, 0, 0, 0].astype(float)
        return torch.tensor([angle(value - 100) if value else [0.0, 0.0] for value in red])

    def subject(self, frames, named, subject):
        return self.whole(frames)


def video(angles):
    """Two frames of each prompt; every frame moves in its green."""
    values = np.repeat([0 if degrees is None else degrees + 100 for degrees in angles], 2)
    frames = np.zeros((len(values), 4, 4, 3), np.uint8)
    frames[..., 0] = values[:, None, None]
    frames[::2, ..., 1] = 200
    return frames


def test_a_case_worked_out_by_hand():
    """The fox is at 0 degrees and returns at 30; the boat is at 90, nobody at -60 degrees, the owl at 60."""
    cos = {degrees: math.cos(math.radians(degrees)) for degrees in (30, 60, 90)}
    scored = score_video("v", video([0, 90, -60, 30, 60]), STORY, NAMED, Angles())
    (fox,) = scored.returns
    assert (fox.subject, fox.first, fox.back, fox.away) == ("fox", 0, 3, 2)
    assert fox.similarity == pytest.approx(cos[30], abs=1e-6)
    chance = (cos[60] + cos[90] + cos[30]) / 3  # 30 is 60 from the boat, 90 from nobody and 30 from the owl
    assert fox.chance == pytest.approx(chance, abs=1e-6)
    assert fox.others == pytest.approx(cos[30], abs=1e-6) and fox.recognised is False
    # Pairs of equal frames: to the first, and to the one before.
    first = [1, 0, 0, cos[60], cos[60], cos[30], cos[30], cos[60], cos[60]]
    before = [1, 0, 1, 0, 1, 0, 1, cos[30], 1]
    expected = sum((a + b) / 2 for a, b in zip(first, before, strict=True)) / 9
    assert scored.subject_consistency == pytest.approx(expected, abs=1e-6)
    said = summarise([scored], Angles())
    assert said["retained"] == pytest.approx((cos[30] - chance) / (1 - chance), abs=1e-6)
    assert said["retained_interval"] is None
    assert said["recognised"]["value"] == 0 and said["retained_per_gb"] is None


def test_the_same_picture_is_1_chance_is_0_and_nothing_to_be_seen_is_no_chance():
    same = score_video("v", video([0, 90, None, 0, None]), STORY, NAMED, Angles()).returns[0]
    assert retained([same])[0] == pytest.approx(1) and same.chance == pytest.approx(0, abs=1e-9) and same.recognised
    gone = score_video("v", video([0, 90, None, 60, None]), STORY, NAMED, Angles()).returns[0]
    similar, chance = math.cos(math.radians(60)), math.cos(math.radians(30))  # it looks like the boat now
    assert retained([gone])[0] == pytest.approx((similar - chance) / (1 - chance), abs=1e-6)
    value, (low, high) = retained([same, gone])
    assert value == pytest.approx(((1 + similar) / 2 - chance / 2) / (1 - chance / 2), abs=1e-6)
    assert (low, high) == pytest.approx((retained([gone])[0], 1))


def test_vbench_consistency_takes_negative_cosines_as_0():
    x = torch.tensor([angle(0), angle(120), angle(120), angle(60)])
    expected = ((0 + 0) / 2 + (0 + 1) / 2 + (0.5 + 0.5) / 2) / 3
    assert consistency(7 * x) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="two frames or more, got 1"):
        consistency(x[:1])


def test_similarity_is_the_mean_over_all_pairs():
    a, b = torch.tensor([angle(0), angle(60)]), torch.tensor([angle(0), angle(90), angle(180)])
    pairs = [math.cos(math.radians(x - y)) for x in (0, 60) for y in (0, 90, 180)]
    assert similarity(a, 3 * b) == pytest.approx(sum(pairs) / 6, abs=1e-6)


def test_a_frozen_video_is_flagged_and_not_rewarded():
    frames = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), dtype=np.uint8), 10, 0)
    frozen = score_video("v", frames, STORY, NAMED, Angles())
    assert frozen.frozen and frozen.still == 1 and not frozen.returns and frozen.subject_consistency is None
    moving = score_video("w", video([0, 90, None, 10, 20]), STORY, NAMED, Angles())
    both, alone = (summarise(some, Angles()) for some in ([frozen, moving], [moving]))
    assert both["frozen"] == ["v"] and {**both, "videos": 0, "frozen": 0} == {**alone, "videos": 0, "frozen": 0}
    # One that moves by noise and never shows anything else gains nothing by it either.
    restless = score_video("v", video([0, 0, 0, 0, 0]), STORY, NAMED, Angles())
    assert retained(restless.returns)[0] == 0 and not restless.frozen
    brighter = frames // 2 + np.arange(10, dtype=np.uint8)[:, None, None, None]
    assert still_share(frames[:1]) == 1 and still_share(brighter) == 0


def test_who_returns():
    assert find_returns(STORY, NAMED) == [ReturnOf("fox", 0, 3, 2)]
    prompts = ["a ball at sea", "an empty sea", "the ball and the star at sea", "the box at sea", "the star at sea"]
    assert find_returns(prompts, toy_naming) == [ReturnOf("ball", 0, 2, 1), ReturnOf("star", 2, 4, 1)]
    assert word_naming(["Red  fox", "fox"])("a red fox, a foxglove") == ["Red  fox", "fox"]
    assert word_naming(["fox"])("a foxglove") == []
    assert word_naming(["owl", "fox"])("the fox and the owl") == ["fox", "owl"]  # as they stand in the prompt
    for wrong in ([], [" "]):
        with pytest.raises(ValueError, match="--subject"):
            word_naming(wrong)


@pytest.mark.parametrize(
    ("frames", "prompts", "run", "expected"),
    [
        (10, 3, None, [(0, 3), (3, 7), (7, 10)]),
        (12, 2, (6, 3), [(0, 6), (6, 12)]),
        (15, 2, (7, 3), [(0, 9), (9, 15)]),  # a switch inside a chunk waits for the next
        (45, 2, (6, 3), [(0, 21), (21, 45)]),  # 12 latent frames, as Wan's VAE decodes them
    ],
)
def test_the_frames_of_every_prompt(frames, prompts, run, expected):
    said = None if run is None else {"frames_per_prompt": run[0], "settings": {"chunk_frames": run[1]}}
    assert [(here.start, here.stop) for here in prompt_frames(frames, prompts, said)] == expected


def test_a_video_that_ended_early_is_refused():
    run = {"frames_per_prompt": 6, "settings": {"chunk_frames": 3}}
    with pytest.raises(ValueError, match="prompt 3 of 3 has none of them"):
        prompt_frames(12, 3, run)

    # Nine video frames are three latent frames of Wan's, and not the nine that were to be made of three prompts.
    run = {"frames_per_prompt": 3, "settings": {"chunk_frames": 3}, "chunks": [{}]}
    with pytest.raises(ValueError, match="prompt 2 of 3 has none of them"):
        prompt_frames(9, 3, run)


def test_a_run_of_another_video_or_story_is_refused(tmp_path):
    run = {"frames_per_prompt": 2, "settings": {"chunk_frames": 2}, "frames": 10, "prompts": STORY}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert read_run(tmp_path / "v.mp4", STORY) == run
    with pytest.raises(ValueError, match="of a video of other prompts"):
        read_run(tmp_path / "v.mp4", STORY[::-1])
    with pytest.raises(ValueError, match=r"v has 10 frames, and the .* is of a video of 12"):
        score_video("v", video([0, 90, None, 0, None]), STORY, NAMED, Angles(), run={**run, "frames": 12})


def test_of_stories_that_are_streamed_together_each_has_its_part_of_the_cache():
    run = {"frames_per_prompt": 2, "settings": {"chunk_frames": 2}, "cache_bytes": 6e9, "stories_together": 3}
    scored = score_video("v", video([0, 90, None, 0, None]), STORY, NAMED, Angles(), run=run)
    assert summarise([scored], Angles())["retained_per_gb"] == pytest.approx(0.5)


def test_intervals_hold_the_mean_and_shrink():
    few, many = (interval(torch.tensor([[0.0], [1.0]] * n), lambda means: means[:, 0]) for n in (5, 100))
    assert few[0] < many[0] < 0.5 < many[1] < few[1]
    # The standard error of 200 such values is 0.0354.
    assert many[1] - 0.5 == pytest.approx(1.96 * 0.0354, rel=0.15)
    assert interval(torch.tensor([[0.3]]), lambda means: means[:, 0]) is None


def look(*characters):
    """A frame of the meadow with characters, each as (its number, hue in degrees, pattern), from left to right."""
    who, hue, pattern = (torch.tensor(values) for values in zip(*characters, strict=True))
    x = [MIDDLE] if len(characters) == 1 else [LEFT, RIGHT]
    centre = torch.tensor([[side, 0.5] for side in x])
    return to_pixels(render(who, torch.tensor(0), hue / 360, pattern, centre)[:, None])


def test_the_toy_judge_compares_hue_and_pattern():
    judge = ToyJudge()
    looks = {(hue, pattern): judge.whole(look((BALL, hue, pattern))) for hue in (0, 60, 180) for pattern in (0, 1)}
    own = looks[0, 0]
    for name, expected in (((0, 0), 1), ((60, 0), 0.75), ((180, 0), 0), ((0, 1), 0.5), ((60, 1), 0.25)):
        assert similarity(own, looks[name]) == pytest.approx(expected, abs=0.02), name
    assert judge.whole(np.full((1, 64, 64, 3), 200, np.uint8)).abs().sum() == 0
    large = look((BALL, 60, 0)).repeat(8, 1).repeat(8, 2)
    torch.testing.assert_close(judge.whole(large), looks[60, 0])
    with pytest.raises(ValueError, match="squares of 32 pixels or a multiple, got 64 x 32"):
        judge.whole(np.zeros((1, 32, 64, 3), np.uint8))


def test_of_two_the_judge_looks_at_the_one_that_is_named():
    judge = ToyJudge()
    both = look((BALL, 0, 0), (STAR, 180, 1))
    for subject, alone in (("ball", look((BALL, 0, 0))), ("star", look((STAR, 180, 1)))):
        seen = judge.subject(both, ["ball", "star"], subject)
        assert similarity(seen, judge.whole(alone)) == pytest.approx(1, abs=0.05), subject
