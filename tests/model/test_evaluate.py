"""The held-out stories and their judgement, on streams drawn by the renderer instead of a model."""

import itertools

import pytest
import torch

from memflow_ops.model import world
from memflow_ops.model.evaluate import FRAMES_PER_PROMPT, Row, _judge, make_stories, table
from memflow_ops.model.stream import Chunk
from memflow_ops.model.text import EMPTY, PLACES, VOCABULARY, parse_prompt

STORIES = 24


def hero(story: list[str]) -> str:
    return story[1].split()[0]


@pytest.mark.parametrize("fillers", [2, 5])
def test_the_hero_is_never_in_the_sink_and_stays_away_for_the_gap(fillers):
    stories = make_stories(64, 10_000, fillers)
    for story in stories:
        names = [prompt.split()[0] for prompt in story]
        assert len(names) == fillers + 3
        assert names[0] != hero(story) and names[-1] == hero(story) != EMPTY
        assert hero(story) not in names[2:-1] and EMPTY not in names[1:]
        assert all(a != b for a, b in itertools.pairwise(names))
    assert 0.3 < sum(story[0].startswith(EMPTY) for story in stories) / 64 < 0.7
    assert make_stories(64, 10_000, fillers) == stories != make_stories(64, 10_001, fillers)


def drawn(stories: list[list[str]], return_shift: float, *, absent: int = 0, retrieved_frame: int = 12) -> list[Chunk]:
    """Chunks in which every character has its own hue, turned by `return_shift` degrees at the return.

    In the first `absent` stories nobody comes back.
    """
    chunks = []
    base = torch.rand(len(stories), 5, generator=torch.Generator().manual_seed(1))
    for index in range(4 * (len(stories[0]) - 1) + 1):
        prompt = index * 3 // FRAMES_PER_PROMPT
        ids = torch.tensor([parse_prompt(story[prompt]) for story in stories])
        who, place = ids[:, 0], ids[:, 1] - VOCABULARY.index(PLACES[0])
        hue = base.gather(1, who[:, None])[:, 0]
        if prompt == len(stories[0]) - 1:
            hue = (hue + return_shift / 360) % 1
            who[:absent] = world.EMPTY_INDEX
        frame = world.render(who, place, hue, torch.full((len(stories), 2), 0.5))
        empty: list[list[int]] = [[] for _ in stories]
        found = [[retrieved_frame] for _ in stories] if index else empty
        frames = frame[:, :, None].expand(-1, -1, 3, -1, -1)
        chunks.append(Chunk(index, 3 * index, [s[prompt] for s in stories], frames, found, empty, empty, empty, 0.0))
    return chunks


def judged(return_shift: float, **kwargs: int) -> Row:
    stories = make_stories(STORIES, 3)
    return _judge("memflow", stories, drawn(stories, return_shift, **kwargs), 2, 3, 1.0)


def test_a_perfect_stream_is_judged_perfect():
    row = judged(0)
    assert (row.match, row.present, row.shape, row.precision) == (1.0, 1.0, 1.0, 1.0)
    assert row.median_error < 1 and row.drift < 1
    assert sum(row.hues) == 3 * STORIES


@pytest.mark.parametrize(("shift", "match"), [(20, 1.0), (-20, 1.0), (40, 0.0), (180, 0.0)])
def test_a_return_matches_within_30_degrees(shift, match):
    row = judged(shift)
    assert row.match == match
    assert row.median_error == pytest.approx(abs(shift), abs=4)


def test_an_absent_character_is_a_miss():
    row = judged(0, absent=6)
    assert row.match == (STORIES - 6) / STORIES
    assert row.present < 1


def test_precision_asks_who_was_shown():
    assert judged(0, retrieved_frame=27).precision == 0  # a filler's frame


def test_table_shows_every_row():
    lines = table([judged(0), judged(180)]).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:4] == ["memflow", "100", "%", lines[1].split()[3]]
    assert lines[2].split()[1] == "0"
