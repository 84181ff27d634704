"""Kinds of memory scored on stories of the toy world; the whole of it is a program of its own."""

from dataclasses import replace

import pytest
import torch

from memflow_ops.model.score.score import retained
from memflow_ops.model.score.toy_kinds import score_kind
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
from memflow_ops.model.toy.settings import TOY_SETTINGS

STORY = ["an empty sea", "a ball in the meadow", "an empty desert", "the ball at night"]


def test_memory_retains_what_no_memory_forgets():
    model, settings = load_model(TOY_WEIGHTS, torch.device("cpu")), replace(TOY_SETTINGS, steps=6)
    with_memory, without = (
        retained([there for video in score_kind(model, kind, [STORY], 5, settings) for there in video.returns])
        for kind in ("memflow", "none")
    )
    assert with_memory[0] == pytest.approx(1, abs=0.1) and without[0] < 0.7
