"""Which prompts of a story name whom, which of them bring somebody back, and which frames a prompt has."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.toy.language import CHARACTERS, parse_prompt

Naming = Callable[[str], list[str]]
"""The subjects that a prompt names, in order."""


@dataclass(frozen=True)
class ReturnOf:
    """A subject that was named, then not, and then again."""

    subject: str
    first: int
    """The number of the prompt that names it for the first time."""
    back: int
    """The number of the prompt that brings it back."""
    away: int
    """Prompts in between that do not name it, since one named it last."""


def toy_naming(prompt: str) -> list[str]:
    return [CHARACTERS[who] for who in parse_prompt(prompt).who]


def word_naming(subjects: Sequence[str]) -> Naming:
    """A prompt names a subject where its words stand in it, whatever their case."""
    if not subjects or any(not subject.strip() for subject in subjects):
        raise ValueError("name whom the story is about: --subject, once for each")
    found = {}
    for subject in subjects:
        words = r"\s+".join(map(re.escape, subject.split()))
        found[subject] = re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)

    def named(prompt: str) -> list[str]:
        places = {subject: there.start() for subject, pattern in found.items() if (there := pattern.search(prompt))}
        return sorted(places, key=places.__getitem__)

    return named


def find_returns(prompts: Sequence[str], named: Naming) -> list[ReturnOf]:
    """The returns of a story, in the order of its prompts."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    returns = []
    for number, prompt in enumerate(prompts):
        for subject in named(prompt):
            away = number - last.get(subject, number - 1) - 1
            if away:
                returns.append(ReturnOf(subject, first[subject], number, away))
            first.setdefault(subject, number)
            last[subject] = number
    return returns


def prompt_frames(frames: int, prompts: int, run: Mapping[str, Any] | None = None) -> list[range]:
    """The video frames under each prompt.

    frames: of the video. run: what run.json beside the video says; None: the prompts lasted equally long. A ValueError
    where there are fewer frames than prompts.
    """
    if run is None:
        edges = [round(frames * i / prompts) for i in range(prompts + 1)]
    else:
        size, latent = run["settings"]["chunk_frames"], run["frames_per_prompt"]
        numbers = [
            number for (number,) in chunk_prompts([[str(i) for i in range(prompts)]], latent, size) for _ in range(size)
        ]
        starts = [numbers.index(str(i)) if str(i) in numbers else len(numbers) for i in range(prompts)]
        made = size * len(run["chunks"]) if "chunks" in run else len(numbers)  # fewer where it was interrupted
        # Wan's VAE makes one video frame of the first latent frame and four of every other one.
        per_latent = 4 if frames > made else 1
        edges = [min(frames, per_latent * start - (per_latent - 1) * (start > 0)) for start in starts] + [frames]
    ranges = [range(start, stop) for start, stop in pairwise(edges)]
    empty = [i + 1 for i, here in enumerate(ranges) if not here]
    if empty:
        raise ValueError(f"the video has {frames} frames, and prompt {empty[0]} of {prompts} has none of them")
    return ranges
