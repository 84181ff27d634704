"""Prompts of the toy world."""

import pytest
import torch

from memflow_ops.model.text import PLACES, VOCABULARY, embed_prompts, parse_prompt


@pytest.mark.parametrize(
    ("prompt", "who", "where"),
    [
        ("a ball in the meadow", "ball", "meadow"),
        ("an empty desert", "empty", "desert"),
        ("The STAR at Night.", "star", "night"),
        ("ring, sea", "ring", "sea"),
        ("in the meadow a box", "box", "meadow"),
    ],
)
def test_articles_case_and_order_are_free(prompt, who, where):
    assert parse_prompt(prompt) == (VOCABULARY.index(who), VOCABULARY.index(where))


@pytest.mark.parametrize("prompt", ["a red ball in the meadow", "a dragon at sea"])
def test_unknown_words_list_the_vocabulary(prompt):
    with pytest.raises(ValueError, match=r"unknown word '(red|dragon)'") as error:
        parse_prompt(prompt)
    assert all(word in str(error.value) for word in VOCABULARY)


@pytest.mark.parametrize(
    "prompt", ["", "a ball", "the meadow", "a ball and", "a ball, a box in the sea", "sea night ring"]
)
def test_a_prompt_is_one_character_and_one_place(prompt):
    with pytest.raises(ValueError):
        parse_prompt(prompt)


def test_embeddings_are_one_hot():
    embeddings = embed_prompts(["a ball in the meadow", "an empty night"])
    expected = torch.zeros(2, 2, 9)
    for b, words in enumerate((("ball", "meadow"), ("empty", "night"))):
        for i, word in enumerate(words):
            expected[b, i, VOCABULARY.index(word)] = 1
    assert torch.equal(embeddings, expected)
    assert VOCABULARY[-4:] == PLACES
