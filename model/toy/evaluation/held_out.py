"""Held-out stories of the toy world: who appears when, who returns, and after how long."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memflow_ops.model.toy.language import CHARACTERS, PLACES, Scene, describe, parse_prompt

JUDGED_SEED = 30_000
"""Of the stories of `memflow toy evaluate`: unlike those of 10,000, nobody looked at them while world and training were
being made. Training refuses all seeds from 10,000 on."""
FRAMES_PER_PROMPT = 12
STORY_PROMPTS = (6, 12, 24, 40)
"""Lengths of the stories; as many of each."""
_ABSENCES = (2, 3, 4, 5, 10)  # prompts that a character stays away, at least
_LONGEST_ABSENCE = 20


@dataclass(frozen=True)
class Appearance:
    """One prompt of a story that names a character."""

    story: int
    prompt: int
    character: int
    slot: int | None
    """0 and 1: on the left and on the right, of two; None: alone"""
    first: "Appearance | None"
    """where the story named it for the first time; None: here"""
    gap: int
    """frames since a prompt named it last; meaningless for a first appearance"""


def make_stories(count: int, seed: int, lengths: Sequence[int] | None = None) -> list[list[list[str]]]:
    """`count` stories of each length, as prompts: (lengths, count, prompts). lengths: None for STORY_PROMPTS.

    A story opens with an empty place, so that no character is ever in the sink, then introduces its 2 to 4 characters
    one by one. Each shows up for one prompt and stays away for 2 prompts or more; the one introduced first for 20, as
    far as the story is long enough. When two are due together a prompt names both; when nobody is, the place is empty.

    Seeds below `train.HELD_OUT_SEED` are for tuning, from there on stories are held out.
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
        # Who is due next may as well come now, together with another, if away for long enough.
        early = [
            character
            for character, before in last.items()
            if due[character] == prompt + 1 and before + _ABSENCES[0] < prompt and character != cast[0]
        ]
        if len(back) == 1 and early and rng.random() < 0.5:
            back.append(early[0])
        who = new[:1] or sorted(back, key=due.__getitem__)[:2]
        for character in who:
            absence = int(rng.choice(_ABSENCES))
            if character == cast[0]:
                absence = min(_LONGEST_ABSENCE, max(prompts - prompt - 2, _ABSENCES[0]))
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
            for slot, character in enumerate(who):
                gap = (prompt - last.get(character, prompt) - 1) * FRAMES_PER_PROMPT
                here = Appearance(story, prompt, character, slot if len(who) == 2 else None, first.get(character), gap)
                first.setdefault(character, here)
                last[character] = prompt
                found.append(here)
    return found


def is_return(appearance: Appearance) -> bool:
    """Whether the character comes back after two prompts or more, far outside the local window."""
    return appearance.first is not None and appearance.gap >= 2 * FRAMES_PER_PROMPT
