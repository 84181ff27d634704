"""What a page may say, as JSON text: checked here, and nothing else of it is used."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MESSAGE_BYTES = 16 * 1024
"""Of a message from a page, at most; the connection that sends a longer one is closed."""
PROMPT_LENGTH = 2000
"""Characters of a prompt, at most."""
MOST_SEED = 2**32 - 1
SESSION_NAME = re.compile(r"[A-Za-z0-9_-]{10,64}")


@dataclass(frozen=True)
class Message:
    """A message from a page. What its kind does not have is None."""

    kind: str
    """open, prompt, restart, pause, resume or fork."""
    token: str | None = None
    session: str | None = None
    """The name of a session that is there, to be watched again; None for a new one."""
    prompt: str | None = None
    seed: int | None = None


# Kind -> the fields that it may have and those that it must have.
_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "open": (("token", "session", "prompt", "seed"), ()),
    "prompt": (("prompt",), ("prompt",)),
    "restart": (("seed",), ()),
    "pause": ((), ()),
    "resume": ((), ()),
    "fork": (("prompt",), ("prompt",)),
}


def read_message(text: str, check: Callable[[str], object]) -> Message:
    """A message, checked; a ValueError says what is wrong with it. check: raises one for a bad prompt."""
    try:
        said: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("that was no JSON") from None
    if not isinstance(said, dict) or not isinstance(said.get("type"), str) or said["type"] not in _FIELDS:
        raise ValueError(f"expected an object with a type, one of {', '.join(_FIELDS)}")
    kind = said.pop("type")
    may, must = _FIELDS[kind]
    given = {name: value for name, value in said.items() if value is not None}
    unknown = [name[:40] for name in given if name not in may]
    if unknown:
        raise ValueError(f"{kind} takes {', '.join(may) or 'nothing else'}, got {', '.join(unknown[:3])}")
    missing = [name for name in must if name not in given]
    if missing:
        raise ValueError(f"{kind} needs a {missing[0]}")
    for name in ("token", "session", "prompt"):
        if not isinstance(given.get(name, ""), str):
            raise ValueError(f"{name} must be text")
    seed = given.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MOST_SEED:
        raise ValueError(f"a seed is a whole number from 0 to {MOST_SEED}")
    if "session" in given and not SESSION_NAME.fullmatch(given["session"]):
        raise ValueError("that is no name of a session")
    if "prompt" in given:
        given["prompt"] = _prompt(given["prompt"], check)
    return Message(kind, **given)


def _prompt(prompt: str, check: Callable[[str], object]) -> str:
    prompt = " ".join(prompt.split())
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError("a prompt is text; half of a surrogate pair is none")
    if not prompt:
        raise ValueError("a prompt is empty")
    if len(prompt) > PROMPT_LENGTH:
        raise ValueError(f"a prompt has at most {PROMPT_LENGTH} characters, got {len(prompt)}")
    check(prompt)
    return prompt
