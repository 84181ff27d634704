"""Rankings beside one another, with intervals by leaving out chunks."""

import statistics

import pytest
import torch

from memflow_ops.model.selection_profile.figures import SelectionProfile
from memflow_ops.model.selection_profile.quality import Choice, ChoiceSums
from memflow_ops.model.selection_profile.rankings import compare_rankings, ranking_table

BUDGETS = [0, 1, 4, 16, 100]
CHOICES = [Choice(name, 4, None) for name in ("top", "moments", "oracle")] + [Choice("random", 4, 1)]


def sums(captured: float) -> ChoiceSums:
    """Of two heads; a choice captures so much of a bank of 2 in the first, and all in the second, whatever it takes."""
    rows = torch.tensor([[captured, 1.0]], dtype=torch.float64).repeat(len(BUDGETS), 1)
    ones = torch.ones(2, dtype=torch.float64)
    return ChoiceSums(BUDGETS, rows, 1.5 * ones, (2 - rows).square(), 2 * ones, rows, 5)


def profile(chunks: list[tuple[float, ...]]) -> SelectionProfile:
    measured = SelectionProfile(5, 80, CHOICES)
    for number, shares in enumerate(chunks):
        measured.add(number, [{choice: sums(share) for choice, share in zip(CHOICES, shares, strict=True)}])
    return measured


def test_shares_and_intervals():
    chunks = [(0.2, 0.3, 0.5, 0.1), (0.4, 0.5, 0.8, 0.1), (0.6, 0.8, 0.9, 0.1), (0.3, 0.3, 0.4, 0.1)]
    rows = compare_rankings(profile(chunks), 4, None)
    assert [(row.top_k, row.share) for row in rows] == [(1, 0.01), (4, 0.04), (16, 0.16)]
    shares = [[(1 + part) / 3 for part in column] for column in zip(*chunks, strict=True)]
    for row in rows:
        for name, values in zip(("top", "moments", "oracle", "random"), shares, strict=True):
            found = row.captured[name]
            assert found.value == pytest.approx(statistics.mean(values))
            # With banks of one size, leaving out gives the standard error of the mean.
            assert found.half == pytest.approx(1.96 * statistics.stdev(values) / len(values) ** 0.5, abs=1e-12)
        differences = [moments - top for top, moments in zip(*shares[:2], strict=True)]
        assert row.more_captured.value == pytest.approx(statistics.mean(differences))
        assert row.more_captured.half == pytest.approx(1.96 * statistics.stdev(differences) / 2)
        assert row.more_captured.half < row.captured["top"].half
        errors = [
            (sum((2 - part[i]) ** 2 + 1 for part in chunks) / (4 * len(chunks))) ** 0.5 for i in range(len(CHOICES))
        ]
        assert [one.value for one in row.error.values()] == pytest.approx(errors)
        assert row.less_error.value == pytest.approx(errors[0] - errors[1])


def test_two_chunks_are_too_few_for_an_interval():
    rows = compare_rankings(profile([(0.2, 0.3, 0.5, 0.1)] * 2), 4, None)
    assert all(row.more_captured.half is None for row in rows)
    table = ranking_table(rows)
    assert "1 (1.0 %)" in table and "+-" not in table and "normalised" not in table and "43.3" in table
    assert "40.0 +- 0.0" in ranking_table(compare_rankings(profile([(0.2, 0.3, 0.5, 0.1)] * 3), 4, None))


def test_normalised_scores_stand_beside_where_they_were_measured():
    chosen = [*CHOICES, Choice("normalised", 4, None)]
    measured = SelectionProfile(5, 80, chosen)
    for number, shares in enumerate([(0.2, 0.3, 0.5, 0.1, 0.4), (0.4, 0.5, 0.8, 0.1, 0.5), (0.6, 0.8, 0.9, 0.1, 0.6)]):
        measured.add(number, [{choice: sums(share) for choice, share in zip(chosen, shares, strict=True)}])
    rows = compare_rankings(measured, 4, None)
    assert [row.more_normalised.value for row in rows] == pytest.approx([(0.1 + 0 - 0.2) / 9] * 3)
    assert "normalised less moments" in ranking_table(rows) and "-1.1 +-" in ranking_table(rows)
