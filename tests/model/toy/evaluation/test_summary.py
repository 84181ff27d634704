"""The judgement of held-out stories, on streams that the renderer draws instead of a model."""

import math

import pytest
from drawn_streams import judged, returns

from memflow_ops.model.toy.settings import TOY_SETTINGS


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
    count = row.hue.count
    assert (row.each_hue, row.each_pattern) == (str(int(match)) * count, "1" * count)


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
