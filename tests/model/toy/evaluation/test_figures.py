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
