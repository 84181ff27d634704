"""Append-only files of JSON lines, each with a checksum, so that a torn end is told from a damaged middle."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Journal(NamedTuple):
    """What a file of checked lines holds."""

    lines: list[dict[str, Any]]
    whole_bytes: int
    """Where its last whole line ends."""
    torn: bool
    """Whether something that is no whole line follows, as a process leaves it that was killed while it wrote."""


def checked_line(body: Mapping[str, Any]) -> bytes:
    """One line of such a file: a JSON list of the body and the CRC-32 of its text, which finds every single flipped bit
    and all but one in four billion other damages."""
    text = json.dumps(body)
    return f"[{text}, {zlib.crc32(text.encode())}]\n".encode()


def read_journal(path: Path) -> Journal:
    """Reads all whole lines. An end that is torn is left out.

    A ValueError where a line is damaged and whole lines follow it, which no interruption leaves behind.
    """
    content = path.read_bytes()
    lines: list[dict[str, Any]] = []
    good, start, bad = 0, 0, None
    for number, raw in enumerate(content.split(b"\n")[:-1], start=1):
        start += len(raw) + 1
        body = _body(raw)
        if body is None:
            bad = bad or number
        elif bad is not None:
            raise ValueError(f"{path} is damaged in line {bad}: its checksum differs, and whole lines follow it")
        else:
            lines.append(body)
            good = start
    return Journal(lines, good, torn=good < len(content))


def _body(raw: bytes) -> dict[str, Any] | None:
    """What a line says; None where it is no line of ours or its checksum differs."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(found, list) and len(found) == 2 and isinstance(found[0], dict)):
        return None
    return found[0] if checked_line(found[0]) == raw + b"\n" else None
