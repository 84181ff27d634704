"""Who leaves a story and comes back, and whether with the same look."""

import numpy as np
import pytest
import torch

from memflow_ops.model.stories.video import to_pixels
from memflow_ops.model.toy import world
from memflow_ops.model.toy.returns import Return, find_returns, judge_return


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


def test_returns_are_found():
    spoken = ["empty meadow", "ball sea", "ball night", "star sea", "ball sea", "star sea"]
    assert find_returns(spoken, 3) == [Return("ball", 8, 12, None, None), Return("star", 11, 15, None, None)]
    assert find_returns(spoken, 3)[0].gap == 3
    assert find_returns(spoken[:3], 3) == []
    spoken = ["ball and star sea", "empty sea", "star and ball sea", "star sea"]
    assert find_returns(spoken, 3) == [Return("star", 2, 6, 1, 0), Return("ball", 2, 6, 0, 1)]
