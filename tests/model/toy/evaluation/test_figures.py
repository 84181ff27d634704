"""Proportions and their intervals."""

import math

import pytest

from memflow_ops.model.toy.evaluation.figures import Proportion


def test_intervals_are_wilson_s():
    """95 of 100: 88.8 to 97.8 % (Wilson 1927); no case, no share."""
    share = Proportion.of([True] * 95 + [False] * 5)
    assert (share.value, share.low, share.high) == (
        0.95,
        pytest.approx(0.8882, abs=2e-4),
        pytest.approx(0.9785, abs=2e-4),
    )
    assert math.isnan(Proportion.of([]).value)


@pytest.mark.parametrize("count", range(1, 60))
def test_an_interval_ends_at_0_and_1_and_never_at_minus_0(count):
    none, all_of_them = (Proportion.of([hit] * count) for hit in (False, True))
    assert str(none.low) == "0.0" and none.high < 1
    assert str(all_of_them.high) == "1.0" and all_of_them.low > 0
