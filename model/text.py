"""The toy world's language: who is where, in a handful of words."""

from collections.abc import Sequence

import torch
from torch import Tensor

CHARACTERS = ("ball", "box", "star", "ring")
EMPTY = "empty"
PLACES = ("meadow", "desert", "sea", "night")
VOCABULARY = (*CHARACTERS, EMPTY, *PLACES)
FREE_WORDS = frozenset(("a", "an", "the", "in", "on", "at", "by"))
"""Words that may stand anywhere and mean nothing."""

WHO = {word: i for i, word in enumerate(VOCABULARY[: len(CHARACTERS) + 1])}
WHERE = {word: i for i, word in enumerate(VOCABULARY) if word in PLACES}
TEXT_LENGTH = 2
TEXT_DIM = len(VOCABULARY)


def parse_prompt(prompt: str) -> tuple[int, int]:
    """ "A ball in the meadow" -> the vocabulary indices (who, where).

    Case, full stops, commas and the free words do not matter. A ValueError says what is wrong and lists the vocabulary.
    """
    words = [word.strip(".,;!") for word in prompt.lower().split()]
    words = [word for word in words if word and word not in FREE_WORDS]
    help_text = f"characters: {', '.join((*CHARACTERS, EMPTY))}; places: {', '.join(PLACES)}"
    unknown = [word for word in words if word not in VOCABULARY]
    if unknown:
        raise ValueError(f"unknown word {', '.join(map(repr, unknown))} in the prompt {prompt!r}; {help_text}")
    who, where = ([table[word] for word in words if word in table] for table in (WHO, WHERE))
    if len(who) != 1 or len(where) != 1:
        raise ValueError(f"a prompt names one character (or {EMPTY!r}) and one place, got {prompt!r}; {help_text}")
    return who[0], where[0]


def embed_ids(ids: Tensor) -> Tensor:
    """Vocabulary indices (..., 2) -> one-hot embeddings (..., 2, text_dim) float32."""
    return torch.nn.functional.one_hot(ids, TEXT_DIM).float()


def embed_prompts(prompts: Sequence[str]) -> Tensor:
    """B prompts -> text embeddings (B, 2, text_dim) float32 for `CausalVideoModel.encode_text`."""
    return embed_ids(torch.tensor([parse_prompt(prompt) for prompt in prompts]))
