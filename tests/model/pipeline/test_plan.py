"""The plans of streams: what follows from a story and what the user has asked for."""

import pytest

from memflow_ops.model.pipeline.plan import StreamOptions
from memflow_ops.model.pipeline.settings import wan_settings


@pytest.mark.parametrize(
    ("prompts", "asked", "expected"),
    [
        (["a ball"], None, "single-prompt"),
        (["a ball", "a box"], None, "interactive"),
        (["a ball"], "interactive", "interactive"),
        (["a ball", "a box"], "single-prompt", "single-prompt"),
    ],
)
def test_the_bank_is_filled_as_the_authors_program_for_such_a_story_does(prompts, asked, expected):
    options = StreamOptions(bank_schedule=asked)
    assert options.for_story(wan_settings("released"), prompts).bank_schedule == expected


def test_other_kinds_of_memory_have_no_schedule():
    settings = wan_settings("memflow")
    assert StreamOptions().for_story(settings, ["a ball"]) is settings
