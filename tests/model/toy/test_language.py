"""Prompts of the toy world."""

import itertools

import pytest
import torch

from memflow_ops.model.toy.language import (
    CHARACTERS,
    NOBODY,
    PLACES,
    VOCABULARY,
    Scene,
    describe,
    embed_ids,
    embed_prompts,
    parse_prompt,
)


@pytest.mark.parametrize(
    ("prompt", "who", "where"),
    [
        ("a ball in the meadow", ["ball"], "meadow"),
        ("an empty desert", [], "desert"),
        ("The STAR at Night.", ["star"], "night"),
        ("ring, sea", ["ring"], "sea"),
        ("in the meadow a box", ["box"], "meadow"),
        ("the ball and the star in the sea", ["ball", "star"], "sea"),
        ("a star, a ball: night".replace(":", ","), ["star", "ball"], "night"),
    ],
)
def test_articles_case_and_order_are_free(prompt, who, where):
    scene = parse_prompt(prompt)
    assert [CHARACTERS[i] for i in scene.who] == who and PLACES[scene.place] == where


@pytest.mark.parametrize("prompt", ["a red ball in the meadow", "a dragon at sea"])
def test_unknown_words_list_the_vocabulary(prompt):
    with pytest.raises(ValueError, match=r"unknown word '(red|dragon)'") as error:
        parse_prompt(prompt)
    assert all(word in str(error.value) for word in VOCABULARY)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "a ball",
        "the meadow",
        "a ball and",
        "sea night ring",
        "an empty ball in the sea",
        "empty empty sea",
        "the ball and the ball in the sea",
        "a ball, a box and a star in the sea",
    ],
)
def test_a_prompt_is_up_to_two_characters_and_one_place(prompt):
    with pytest.raises(ValueError, match="a prompt names one character, two different ones or 'empty', and one place"):
        parse_prompt(prompt)


def test_describing_a_scene_can_be_undone():
    casts = [(), *itertools.permutations(range(NOBODY), 1), *itertools.permutations(range(NOBODY), 2)]
    for who, place in itertools.product(casts, range(len(PLACES))):
        scene = Scene(who, place)
        assert parse_prompt(describe(scene)) == scene


def test_embeddings_name_words_and_mark_the_second():
    embeddings = embed_prompts(["a ball in the meadow", "an empty night", "the star and the ball at sea"])
    expected = torch.zeros(3, 3, len(VOCABULARY) + 1)
    for b, words in enumerate((("meadow", "ball"), ("night", "empty"), ("sea", "star", "ball"))):
        for i, word in enumerate(words):
            expected[b, i, VOCABULARY.index(word)] = 1
    expected[2, 2, -1] = 1
    assert torch.equal(embeddings, expected)
    ids = torch.tensor([[0, NOBODY, 0], [NOBODY, NOBODY, 3], [2, 0, 2]])
    assert torch.equal(embed_ids(ids), embeddings)
