"""Stories are files of prompts; this reads them and lays the prompts out over chunks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

MOST_CHUNKS = 10_000_000
"""Months of video; the prompts of all chunks of a story are a list."""


def read_stories(path: Path, check: Callable[[str], object]) -> list[list[str]]:
    """The prompts of every story in a JSON-lines file, one story per line: {"prompts": ["...", ...]}.

    check: raises a ValueError for a prompt that cannot be used.

    A ValueError names the line that is wrong and what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte-order mark first
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the story {path}: {getattr(error, 'strerror', None) or error}") from error
    stories = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                stories.append(_prompts(line, check))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not stories:
        raise ValueError(f'{path} has no story; a story is a line like {{"prompts": ["a street at night", ...]}}')
    return stories


def _prompts(line: str, check: Callable[[str], object]) -> list[str]:
    try:
        story = json.loads(line, object_pairs_hook=_without_repetition)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; a story is a line of its own") from error
    prompts = story.get("prompts") if isinstance(story, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError('expected {"prompts": [...]} with at least one prompt, each a string')
    unknown = [json.dumps(name, ensure_ascii=False) for name in story if name != "prompts"]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)} would change nothing: a story has prompts and nothing else; leave it out (settings, "
            f"a seed for one, are options of the command)"
        )
    for prompt in prompts:
        check(prompt)
    return prompts


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; a ValueError where a name stands in it twice, of which Python would take the last."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(map(json.dumps, twice))} is given more than once; give it once")
    return dict(pairs)


def chunk_prompts(
    stories: Sequence[Sequence[str]], frames_per_prompt: int, chunk_frames: int = 3
) -> list[tuple[str, ...]]:
    """The prompts of every chunk, one per story.

    stories: each a list of prompts, with the same number of them in all stories.
    frames_per_prompt: latent frames under one prompt. A switch that falls inside a chunk waits for the next chunk.
    """
    if frames_per_prompt < 1:
        raise ValueError(f"frames_per_prompt must be positive, got {frames_per_prompt}")
    lengths = sorted({len(story) for story in stories})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(f"stories that run together must have the same number of prompts, at least 1, got {lengths}")
    chunks = -(-lengths[0] * frames_per_prompt // chunk_frames)
    if chunks > MOST_CHUNKS:
        raise ValueError(
            f"{lengths[0]} prompts with frames_per_prompt={frames_per_prompt} make {chunks} chunks, and at most "
            f"{MOST_CHUNKS} are possible"
        )
    numbers = [min(chunk * chunk_frames // frames_per_prompt, lengths[0] - 1) for chunk in range(chunks)]
    return [tuple(story[i] for story in stories) for i in numbers]
