"""The control that retrieves by name."""

import torch

from memflow_ops.model.toy.evaluation.held_out import (
    named_at,
)
from memflow_ops.model.toy.evaluation.kinds import OraclePolicy


def test_oracle_finds_all_who_are_named():
    story = ["empty sea", "ball sea", "star sea", "ball sea", "empty sea", "empty sea", "ball and star sea"]
    oracle = OraclePolicy(3, [story])
    frames = list(range(0, 60, 3))

    class Given:
        frames: list[list[int]] = []  # noqa: RUF012 - stands in for Candidates

    Given.frames = [frames]
    for prompt, expected in (
        ("ball sea", {0}),
        ("ball and star sea", {0, 2}),
        ("empty sea", set()),
        ("ring sea", set()),
    ):
        oracle.coming = [prompt]
        chosen = oracle.choose(Given, [], torch.ones(1)).frames[0]  # type: ignore[arg-type]
        assert len(chosen) == (3 if expected else 0) and len(set(chosen)) == len(chosen)
        assert {who for frame in chosen for who in named_at(story, frame)} == expected
