"""The toy world's language: prompts that say in a handful of words who is where, and their embeddings."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHARACTERS = ("ball", "box", "star", "ring")
EMPTY = "empty"
PLACES = ("meadow", "desert", "sea", "night")
VOCABULARY = (*CHARACTERS, EMPTY, *PLACES)
FREE_WORDS = frozenset(("a", "an", "and", "the", "in", "on", "at", "by"))
"""Words that may stand anywhere and mean nothing."""

NOBODY = len(CHARACTERS)
"""The index that stands for nobody; characters have the indices 0..3 of CHARACTERS."""
TEXT_LENGTH = 3
"""A prompt's embedding has three rows: the place, who is named first, and who is named second."""
TEXT_DIM = len(VOCABULARY) + 1
"""A row is one-hot over the vocabulary, with a mark in its last entry on who is named second."""


@dataclass(frozen=True)
class Scene:
    """What a prompt says."""

    who: tuple[int, ...]
    """indices of the named characters: none, one, or two that differ, of which the first stands on the left"""
    place: int
    """index of the place"""


def parse_prompt(prompt: str) -> Scene:
    """What a prompt says, such as "A ball in the meadow", "the ball and the star at sea" or "an empty desert".

    Case, punctuation around words and the free words do not matter. A prompt that cannot be understood raises a
    ValueError, which says what is wrong and lists the vocabulary.
    """
    words = [word.strip(".,;:!?()\"'") for word in prompt.lower().split()]
    words = [word for word in words if word and word not in FREE_WORDS]
    help_text = f"characters: {', '.join((*CHARACTERS, EMPTY))}; places: {', '.join(PLACES)}"
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        raise ValueError(f"unknown word {', '.join(map(repr, unknown))} in the prompt {prompt!r}; {help_text}")
    who = [CHARACTERS.index(word) for word in words if word in CHARACTERS]
    where = [PLACES.index(word) for word in words if word in PLACES]
    empty = words.count(EMPTY)
    named_well = (empty == 1 and not who) or (not empty and len(who) in (1, 2) and len(set(who)) == len(who))
    if len(where) != 1 or not named_well:
        raise ValueError(
            f"a prompt names one character, two different ones or {EMPTY!r}, and one place, got {prompt!r}; {help_text}"
        )
    return Scene(tuple(who), where[0])


def describe(scene: Scene) -> str:
    """A prompt that says what the scene is; `parse_prompt` gives the scene back."""
    named = " and ".join(f"the {CHARACTERS[who]}" for who in scene.who)
    place = PLACES[scene.place]
    return f"{named} in the {place}" if named else f"{EMPTY} {place}"


def embed_ids(ids: Tensor) -> Tensor:
    """Scenes (..., 3) int64 -> embeddings (..., 3, TEXT_DIM) float32.

    A scene is given as who is named first, who is named second (NOBODY where there is none), and the place. The rows of
    an embedding are place, first, second: a shorter prompt lacks the last row, which is then all zero.
    """
    first, second, place = ids.unbind(-1)
    rows = torch.stack([place + VOCABULARY.index(PLACES[0]), first, second], dim=-1)
    embeddings = torch.nn.functional.one_hot(rows, TEXT_DIM).float()
    embeddings[..., 2, -1] = 1
    embeddings[..., 2, :] *= (second != NOBODY)[..., None]
    return embeddings


def scene_ids(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as `embed_ids` takes them, (len(scenes), 3) int64."""
    rows = [(*(*scene.who, NOBODY, NOBODY)[:2], scene.place) for scene in scenes]
    return torch.tensor(rows, dtype=torch.long, device="cpu").view(-1, 3)


def embed_prompts(prompts: Sequence[str]) -> Tensor:
    """B prompts -> text embeddings (B, 3, TEXT_DIM) float32, as `CausalVideoModel.encode_text` takes them."""
    return embed_ids(scene_ids([parse_prompt(prompt) for prompt in prompts]))
