"""Files of stories, and the prompts of chunks."""

import json

import pytest

from memflow_ops.model.stories.prompts import chunk_prompts, read_stories


def test_a_story_that_begins_with_a_byte_order_mark(tmp_path):
    (tmp_path / "story.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"prompts": ["a ball in the meadow"]}).encode() + b"\r\n"
    )
    assert read_stories(tmp_path / "story.jsonl", str) == [["a ball in the meadow"]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompts": ["a"], "seed": 3}', 'line 2: "seed" would change nothing'),
        ('{"promts": ["b"], "prompts": ["a"]}', 'line 2: "promts" would change nothing'),
        ('{"prompts": ["a"], "frames": 3, "日": 1}', 'line 2: "frames", "日" would change nothing'),
        ('{"prompts": ["a"], "prompts": ["b"]}', 'line 2: "prompts" is given more than once'),
    ],
)
def test_what_would_pass_unnoticed_in_a_line_is_refused(tmp_path, line, said):
    path = tmp_path / "story.jsonl"
    path.write_text(f'{{"prompts": ["first"]}}\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        read_stories(path, str)


def test_chunk_prompts_round_switches_up_to_a_chunk():
    assert chunk_prompts([["a", "b", "c"]], 4) == [("a",), ("a",), ("b",), ("c",)]
    assert chunk_prompts([["a", "b"], ["c", "d"]], 3) == [("a", "c"), ("b", "d")]
    assert len(chunk_prompts([["a", "b", "c", "d"]], 12)) == 16
    for stories, frames, message in (
        ([["a"], ["b", "c"]], 3, r"same number of prompts, at least 1, got \[1, 2\]"),
        ([[]], 3, r"got \[0\]"),
        ([], 3, r"got \[\]"),
        ([["a"]], 0, "frames_per_prompt must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            chunk_prompts(stories, frames)
