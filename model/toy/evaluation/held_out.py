"""Held-out stories of the toy world: who appears when, who returns, and after how long."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memflow_ops.model.toy.language import CHARACTERS, PLACES, Scene, describe, parse_prompt

JUDGED_SEED = 30_000
"""The seed of the stories of `memflow toy evaluate`. Unlike those of 10,000, nobody looked at them while the world and
the training were being made. Training refuses all seeds from 10,000 on."""
FRAMES_PER_PROMPT = 12
STORY_PROMPTS = (6, 12, 24, 40)
"""The lengths of the stories; there are as many of each."""
ABSENCES = (2, 3, 4, 5, 10)
"""The numbers of prompts for which a character stays away, at least; one is drawn each time."""
LONGEST_ABSENCE = 20


@dataclass(frozen=True)
class Appearance:
    """One prompt of a story that names a character."""

    story: int
    prompt: int
    character: int
    side: int | None
    """0 and 1: on the left and on the right of two; None: alone"""
    first: "Appearance | None"
    """where the story names it for the first time; None: here"""
    gap: int
    """frames since a prompt named it last; 0 for a first appearance"""


def make_stories(count: int, seed: int, lengths: Sequence[int] | None = None) -> list[list[list[str]]]:
    """`count` stories of each length, as prompts: (lengths, count, prompts). Without `lengths`, STORY_PROMPTS.

    A story opens with an empty place, so that no character is ever in the sink, and then introduces its 2 to 4
    characters one by one. Each shows up for one prompt and stays away for 2 prompts or more; the one introduced first
    stays away for 20, as far as the story is long enough. When two are due together a prompt names both; when nobody
    is due, the place is empty.

    Seeds below `schedule.HELD_OUT_SEED` are for tuning; from there on stories are held out. A negative seed, or a count
    below 1, raises a ValueError.
    """
    if seed < 0:
        raise ValueError(f"seeds are not negative, got {seed}")
    if count < 1:
        raise ValueError(f"there must be at least one story of each length, got {count}")
    rng = np.random.default_rng(seed)
    return [[_make_story(prompts, rng) for _ in range(count)] for prompts in lengths or STORY_PROMPTS]


def _make_story(prompts: int, rng: np.random.Generator) -> list[str]:
    cast = rng.permutation(len(CHARACTERS))[: rng.integers(2, 4 if prompts < 12 else 5)].tolist()
    due = {character: i + 1 for i, character in enumerate(cast)}
    last: dict[int, int] = {}
    scenes: list[tuple[int, ...]] = [()]
    for prompt in range(1, prompts):
        new = [character for character in cast if character not in last and due[character] <= prompt]
        back = [character for character in last if due[character] <= prompt]
        # A character that is due at the next prompt may come together with another now, if it was away long enough.
        early = [
            character
            for character, before in last.items()
            if due[character] == prompt + 1 and before + ABSENCES[0] < prompt and character != cast[0]
        ]
        if len(back) == 1 and early and rng.random() < 0.5:
            back.append(early[0])
        who = new[:1] or sorted(back, key=due.__getitem__)[:2]
        for character in who:
            absence = int(rng.choice(ABSENCES))
            if character == cast[0]:
                absence = min(LONGEST_ABSENCE, max(prompts - prompt - 2, ABSENCES[0]))
            due[character] = prompt + 1 + absence
            last[character] = prompt
        scenes.append(tuple(rng.permutation(who).tolist()))
    places = rng.integers(len(PLACES), size=prompts).tolist()
    return [describe(Scene(who, place)) for who, place in zip(scenes, places, strict=True)]


def appearances(stories: Sequence[Sequence[str]]) -> list[Appearance]:
    """Every appearance of every character, story by story, in the order of the prompts."""
    found = []
    for story, prompts in enumerate(stories):
        first: dict[int, Appearance] = {}
        last: dict[int, int] = {}
        for prompt, words in enumerate(prompts):
            who = parse_prompt(words).who
            for side, character in enumerate(who):
                gap = max(0, prompt - last.get(character, prompt) - 1) * FRAMES_PER_PROMPT
                here = Appearance(story, prompt, character, side if len(who) == 2 else None, first.get(character), gap)
                first.setdefault(character, here)
                last[character] = prompt
                found.append(here)
    return found


def is_return(appearance: Appearance) -> bool:
    """Whether the character comes back after two prompts or more, far outside the local window."""
    return appearance.first is not None and appearance.gap >= 2 * FRAMES_PER_PROMPT


def named_at(story: Sequence[str], frame: int) -> tuple[int, ...]:
    """The characters that the story's prompt names at a frame."""
    return parse_prompt(story[frame // FRAMES_PER_PROMPT]).who
