"""What a page may say, and what is refused with a sentence."""

import json

import pytest

from memflow_ops.model.live.messages import PROMPT_LENGTH, Message, read_message
from memflow_ops.model.toy.language import parse_prompt


def test_messages_are_read():
    words = {"type": "open", "token": "t", "session": None, "prompt": " a ball \n at  sea", "seed": 3}
    assert read_message(json.dumps(words), parse_prompt) == Message("open", token="t", prompt="a ball at sea", seed=3)
    assert read_message('{"type": "pause"}', parse_prompt) == Message("pause")
    assert read_message('{"type": "restart", "seed": 0}', parse_prompt) == Message("restart", seed=0)


WRONG = {
    "no JSON": ("{", "no JSON"),
    "deep": ("[" * 100_000, "no JSON"),
    "a huge number": ('{"type": "restart", "seed": ' + "9" * 5000 + "}", "no JSON"),
    "a list": ("[1]", "expected an object with a type"),
    "no type": ("{}", "expected an object with a type"),
    "another type": ('{"type": "shutdown"}', "expected an object with a type"),
    "a type that is a list": ('{"type": ["open"]}', "expected an object with a type"),
    "an unknown field": ('{"type": "pause", "path": "/etc/passwd"}', "pause takes nothing else, got path"),
    "no prompt": ('{"type": "prompt"}', "needs a prompt"),
    "a prompt that is a number": ('{"type": "prompt", "prompt": 3}', "prompt must be text"),
    "an empty prompt": ('{"type": "prompt", "prompt": "  "}', "a prompt is empty"),
    "a long prompt": (json.dumps({"type": "prompt", "prompt": "a " * PROMPT_LENGTH + "b"}), "at most 2000 characters"),
    "another world's prompt": ('{"type": "prompt", "prompt": "a dragon at sea"}', "unknown word 'dragon'"),
    "half a letter": ('{"type": "prompt", "prompt": "a ball \\ud800"}', "surrogate"),
    "a seed below 0": ('{"type": "restart", "seed": -1}', "a seed is a whole number"),
    "a seed that is true": ('{"type": "restart", "seed": true}', "a seed is a whole number"),
    "a broken seed": ('{"type": "restart", "seed": 1.5}', "a seed is a whole number"),
    "a path as session": ('{"type": "open", "session": "../../etc/passwd"}', "no name of a session"),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG.keys())
def test_anything_else_is_refused_with_a_sentence(text, said):
    with pytest.raises(ValueError, match=said) as refusal:
        read_message(text, parse_prompt)
    assert len(str(refusal.value)) < 500
