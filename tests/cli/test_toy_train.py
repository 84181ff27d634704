"""`memflow toy train`: which file it writes. What training does is tested in tests/model."""

from pathlib import Path

import pytest
from command_line import memflow

from memflow_ops.cli import toy
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS

TARGETS = {
    "whole": ((), TOY_WEIGHTS),
    "another seed": (("--seed", 1), Path("out/toy.safetensors")),
    "shorter": (("--training-steps", 5), Path("out/toy.safetensors")),
    "named": (("--training-steps", 5, "--out", "mine.safetensors"), Path("mine.safetensors")),
}


@pytest.mark.parametrize("options, target", TARGETS.values(), ids=TARGETS.keys())
def test_only_the_whole_training_replaces_the_shipped_weights(monkeypatch, options, target):
    asked = []
    monkeypatch.setattr(toy.training, "train", lambda out, **settings: asked.append((out, settings)))
    assert memflow("toy", "train", *options) == 0
    ((out, settings),) = asked
    assert out == target and settings["steps"] == (5 if "--training-steps" in options else toy.training.TOTAL_STEPS)


def test_a_file_that_cannot_be_written_is_refused_before_the_training(monkeypatch, capfd):
    monkeypatch.setattr(toy.training, "train", None)
    assert memflow("toy", "train", "--out", "weights.pt") == 2
    assert "takes the name of a .safetensors file" in capfd.readouterr().err
