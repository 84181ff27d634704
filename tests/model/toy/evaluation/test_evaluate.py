"""The evaluation itself: what it refuses, how it times, and what it says of the shipped weights."""

from dataclasses import replace
from itertools import pairwise

import pytest

from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.toy.evaluation import held_out
from memflow_ops.model.toy.evaluation.evaluate import check_evaluation, evaluate_kinds, time_kinds
from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS
from memflow_ops.model.toy.settings import TOY_SETTINGS


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
    """Six short stories, streamed for real. This fails if memory stops helping."""
    monkeypatch.setattr(held_out, "STORY_PROMPTS", (6,))
    rows = {
        row.memory: row
        for row in evaluate_kinds(load_checkpoint(TOY_WEIGHTS), stories=6, kinds=["none", "memflow"], seed=20_000)
    }
    none, memflow = rows["none"], rows["memflow"]
    assert memflow.hue.count >= 8
    assert memflow.hue.value >= 0.85 and memflow.hue.value >= none.hue.value + 0.4
    assert memflow.pattern.value >= 0.75
    assert memflow.precision is not None and memflow.precision >= 0.9
    assert memflow.shape.value >= 0.9
    assert none.precision is None and set(rows) <= set(MEMORY_KINDS)
    assert all(a.memory != b.memory for a, b in pairwise(rows.values()))
