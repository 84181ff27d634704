"""Defaults are those of the library, and options that would change nothing are refused."""

import inspect
from dataclasses import replace

import pytest
import torch
from command_line import memflow

from memflow_ops.cli import generate, profile, toy
from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.pipeline.settings import WAN_SETTINGS
from memflow_ops.model.selection_profile.figures import Sampling
from memflow_ops.model.streaming.settings import USED_BY
from memflow_ops.model.streaming.streamer import stream
from memflow_ops.model.toy import train
from memflow_ops.model.toy.evaluation import evaluate
from memflow_ops.model.toy.generate import DEMO_STORY
from memflow_ops.model.toy.language import embed_prompts
from memflow_ops.model.toy.settings import TOY_SETTINGS


def defaults_of(function):
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


LIBRARY = {
    "demo": (toy.demo, vars(TOY_SETTINGS)),
    "train": (toy.train, defaults_of(train.train)),
    "evaluate": (toy.evaluate, defaults_of(evaluate.evaluate_kinds)),
    "profile": (profile.profile_selection, vars(Sampling())),
    "toy profile": (profile.toy_profile_selection, vars(Sampling())),
}


@pytest.mark.parametrize("command, library", LIBRARY.values(), ids=LIBRARY.keys())
def test_defaults_are_those_of_the_library(command, library):
    defaults = defaults_of(command)
    shared = (defaults.keys() & library.keys()) - {"out", "weights"}
    assert len(shared) >= 1
    assert {name: defaults[name] for name in shared} == {name: library[name] for name in shared}


def test_the_default_size_is_that_of_the_settings():
    assert (8 * WAN_SETTINGS.height, 8 * WAN_SETTINGS.width) == (generate.HEIGHT, generate.WIDTH)


UNUSED = {
    "bench": (("bench", "--stored", "--rounds", 3), "--rounds would change nothing with --stored"),
    "bench, empty": (("bench", "--stored", "--case", ""), "--case would change nothing with --stored"),
    "profile": (("toy", "profile-selection", DEMO_STORY, "--stories", 3), "--stories would change nothing"),
    "profile, seed": (
        ("toy", "profile-selection", DEMO_STORY, "--story-seed", 10**4),
        "--story-seed would change nothing",
    ),
    "profile, default": (("toy", "profile-selection", DEMO_STORY, "--stories", 2), "--stories would change nothing"),
}


@pytest.mark.parametrize("words, expected", UNUSED.values(), ids=UNUSED.keys())
def test_options_that_would_change_nothing_are_refused(tmp_path, monkeypatch, capfd, words, expected):
    """Even where they have the value that they have by default: who gives one expects something of it."""
    monkeypatch.chdir(tmp_path)
    assert memflow(*words) == 2
    said = capfd.readouterr().err
    assert expected in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory", ["none", "sink", "full", "memflow", "released"])
@pytest.mark.parametrize(
    "option, values",
    [
        ("bank_frames", (1, 2)),
        ("top_k", (1, 3)),
        ("query_group", (16, None)),
        ("score", ("mean", "moments")),
        ("bank_dtype", (None, "int8")),
        ("score", ("mean", "normalised")),
        ("reselect", ("step", "chunk")),
        ("positions", ("absolute", "bounded")),
        ("bank_schedule", ("interactive", "single-prompt")),
    ],
)
def test_who_uses_an_option(memory, option, values, weights):
    """The table by which commands refuse them says what changes the frames, and what takes memory."""
    model = load_checkpoint(weights)
    steps = 2 if option == "reselect" else 1
    changed = [replace(TOY_SETTINGS, memory=memory, steps=steps, **{option: value}) for value in values]
    frames = [
        [c.frames for c in stream(model, [("a ball at night",)] * 5, settings, encode=embed_prompts)]
        for settings in changed
    ]
    sizes = [settings.cache_layout(model, 1).device_bytes for settings in changed]
    used = memory in USED_BY[option]
    assert all(map(torch.equal, *frames)) is (sizes[0] == sizes[1] and not used)
