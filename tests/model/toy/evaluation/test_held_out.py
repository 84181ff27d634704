"""Held-out stories: what they promise, and how appearances are read from them."""

import pytest

from memflow_ops.model.toy.evaluation.held_out import (
    FRAMES_PER_PROMPT,
    STORY_PROMPTS,
    appearances,
    is_return,
    make_stories,
)
from memflow_ops.model.toy.language import parse_prompt


def test_stories_keep_their_promises():
    groups = make_stories(20, 10_000)
    gaps, casts, pairs = set(), set(), 0
    for prompts, stories in zip(STORY_PROMPTS, groups, strict=True):
        for story in stories:
            assert len(story) == prompts and 6 <= prompts <= 40
            assert parse_prompt(story[0]).who == ()  # the sink shows nobody
            here = appearances([story])
            casts.add(len({it.character for it in here}))
            for it in here:
                if it.first is not None:
                    assert is_return(it), "a character stays away for two prompts or more"
                    assert 24 <= it.gap <= 240
                    gaps.add(it.gap)
                else:
                    assert it.side is None, "first appearances are alone"
            pairs += sum(it.side == 1 for it in here)
    assert casts == {2, 3, 4}
    assert {24, 240} <= gaps
    assert pairs > 20
    assert sum(is_return(it) for stories in make_stories(10, 10_000) for it in appearances(stories)) >= 200


def test_stories_repeat_with_their_seed():
    assert make_stories(2, 10_000) == make_stories(2, 10_000) != make_stories(2, 10_001)


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="seeds are not negative, got -1"):
        make_stories(1, -1)


def test_appearances_by_hand():
    story = ["empty sea", "the ball in the sea", "the ball and the star at night", "empty sea", "the star at sea"]
    ball, ball_again, star, star_again = appearances([story])
    assert (ball.prompt, ball.character, ball.side, ball.first) == (1, 0, None, None)
    assert (ball_again.prompt, ball_again.side, ball_again.first, ball_again.gap) == (2, 0, ball, 0)
    assert (star.prompt, star.character, star.side, star.first) == (2, 2, 1, None)
    assert (star_again.prompt, star_again.first, star_again.gap) == (4, star, FRAMES_PER_PROMPT)
    assert not any(map(is_return, (ball, ball_again, star, star_again)))  # none was away for two prompts
