"""Files of stories."""

import json

from memflow_ops.model.stories.prompts import read_stories


def test_a_story_that_begins_with_a_byte_order_mark(tmp_path):
    (tmp_path / "story.jsonl").write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"prompts": ["a ball in the meadow"]}).encode() + b"\r\n"
    )
    assert read_stories(tmp_path / "story.jsonl", str) == [["a ball in the meadow"]]
