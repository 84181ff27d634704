"""What is read off a profile: the table, the setting to take, and the front of time and error."""

from dataclasses import replace

from memflow_ops.model.selection_profile.figures import ChoiceFigures
from memflow_ops.model.selection_profile.plot import pareto_front
from memflow_ops.model.selection_profile.quality import Choice
from memflow_ops.model.selection_profile.report import (
    GOALS,
    cheapest,
    profile_table,
    smallest_enough,
)


def made_up(
    blocks: str, size: int, group: int | None, top_k: int, captured: float, error: float, ratio=None
) -> ChoiceFigures:
    return ChoiceFigures(
        blocks, size, group, top_k, top_k * size, top_k * size / 64, captured, captured, 0, error, None, ratio
    )


ROWS = [
    made_up("top", 16, 1, 0, 0.0, 0.5),
    made_up("top", 16, 1, 1, 0.7, 0.2, 1.5),
    made_up("top", 16, 1, 2, 0.9, 0.05, 2.0),
    made_up("top", 16, 1, 4, 1.0, 0.0, 4.0),
    made_up("oracle", 16, 1, 1, 0.8, 0.1),
    made_up("oracle", 16, 1, 4, 1.0, 0.0),
    made_up("top", 64, None, 1, 1.0, 0.0, 2.5),
    made_up("random", 16, 1, 4, 1.0, 0.0),
]


def test_the_table_says_what_is_enough():
    lines = profile_table(ROWS, 64).splitlines()
    assert len(lines) == 1 + 3
    said = "blocks of 16, per query 2 50 % (25) 2.00 x 4 100 % (100) 4.00 x 2 50 % (100) 2.00 x"
    assert " ".join(lines[1].split()) == said
    assert lines[2].startswith("frames, per chunk, as released") and "2.50 x" in lines[2]
    assert lines[3].startswith("blocks of 16, at random")
    assert smallest_enough(ROWS, Choice("top", 16, 1), GOALS["80 % of the mass"]).top_k == 2


def test_the_quickest_is_recommended():
    assert cheapest(ROWS, GOALS["error of 5 %"]) == ROWS[2]
    assert cheapest(ROWS, GOALS["95 %"]) == ROWS[6]
    untimed = [replace(row, ratio=None) for row in ROWS]
    assert cheapest(untimed, GOALS["error of 5 %"]) == untimed[2]


def test_the_front_is_what_nothing_beats():
    timed = [row for row in ROWS if row.ratio is not None]
    assert pareto_front(timed) == [ROWS[1], ROWS[2], ROWS[6]]
