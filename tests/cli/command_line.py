"""Running the command in the test's own process."""

import json

import pytest

from memflow_ops.cli import main


def memflow(*words) -> int:
    """Run the command with these arguments, each of which may be a path or a number. Gives its exit code."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def write_story(path, *stories) -> str:
    """Write stories, each a list of prompts, as the file that commands read. Gives its path."""
    path.write_text("".join(json.dumps({"prompts": prompts}) + "\n" for prompts in stories))
    return str(path)
