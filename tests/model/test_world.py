"""The renderer's claims about colour and area, and the pixel judge on rendered ground truth."""

import itertools

import pytest
import torch

from memflow_ops.model import world
from memflow_ops.model.text import CHARACTERS, PLACES, embed_ids, embed_prompts

EVERYTHING = list(itertools.product(range(len(CHARACTERS)), range(len(PLACES)), range(24)))


def saturation_and_value(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rgb = (frames + 1) / 2
    value, darkest = rgb.amax(-3), rgb.amin(-3)
    return (value - darkest) / value, value


def all_scenes(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Every character in every place in 24 hues, somewhere: who, place, hue and centre."""
    who, place, step = torch.tensor(EVERYTHING).unbind(1)
    low, high = torch.tensor(world.PLACE_LOW), torch.tensor(world.PLACE_HIGH)
    centre = low + (high - low) * torch.rand(len(who), 2, generator=torch.Generator().manual_seed(seed))
    return who, place, step / 24 + 0.01, centre


def empty_scenes() -> torch.Tensor:
    place = torch.arange(len(PLACES))
    who = torch.full_like(place, world.EMPTY_INDEX)
    return world.render(who, place, torch.zeros(4), torch.full((4, 2), 0.5))


def test_places_are_pale_and_differ():
    frames = empty_scenes()
    saturation, _ = saturation_and_value(frames)
    assert saturation.max() < 0.3
    for a, b in itertools.combinations(range(len(PLACES)), 2):
        assert (frames[a] - frames[b]).abs().mean() > 0.05, f"{PLACES[a]} and {PLACES[b]} look alike"


def test_characters_are_vivid_and_large():
    who, place, hue, centre = all_scenes()
    frames = world.render(who, place, hue, centre)
    difference = (frames - empty_scenes()[place]).abs().amax(-3)
    colour = world.hue_to_rgb(hue) * 2 - 1
    solid = (frames - colour[..., None, None]).abs().amax(-3) < 1e-5  # pixels wholly inside the character
    saturation, _ = saturation_and_value(frames)
    assert saturation[solid].min() > 0.7
    area = solid.float().mean((-2, -1))
    assert area.min() >= 0.05
    assert (difference > 0.01).float().mean((-2, -1)).max() < 0.25


def test_judge_sees_every_character_and_its_hue():
    who, place, hue, centre = all_scenes()
    verdict = world.judge(world.render(who, place, hue, centre))
    assert verdict.present.all()
    assert world.hue_difference(verdict.hue, hue * 360).max() < 4
    assert verdict.area.min() > 0.08 and verdict.area.max() < 0.25


def test_judge_sees_nobody_in_empty_places():
    verdict = world.judge(empty_scenes())
    assert not verdict.present.any()
    assert verdict.area.max() == 0


def test_judge_is_steady_under_noise():
    who, place, hue, centre = all_scenes()
    frames = world.render(who, place, hue, centre)
    verdict = world.judge(frames + 0.1 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(1)))
    assert verdict.present.all()
    assert world.hue_difference(verdict.hue, hue * 360).median() < 3


def test_shapes_are_recognised():
    who, place, hue, centre = all_scenes()
    recognised = world.recognise(world.render(who, place, hue, centre))
    assert (recognised == who).float().mean() > 0.99


@pytest.mark.parametrize(("a", "b", "expected"), [(350, 10, 20), (10, 350, 20), (90, 270, 180), (5, 5, 0)])
def test_hue_difference_goes_around_the_circle(a, b, expected):
    assert world.hue_difference(torch.tensor(float(a)), torch.tensor(float(b))) == expected


def test_half_resolution_shows_the_same_scene():
    """Training starts at 16 x 16; the picture must be the same one, only coarser."""
    who, place, hue, centre = all_scenes()
    coarse = world.render(who, place, hue, centre, size=16)
    averaged = torch.nn.functional.avg_pool2d(world.render(who, place, hue, centre), 2)
    assert (coarse - averaged).abs().mean() < 0.03


def test_clips_keep_a_character_s_hue():
    clips = world.random_clips(64, 8, torch.Generator().manual_seed(2))
    for who, hue in zip(clips.who, clips.hue, strict=True):
        for character in who.unique():
            assert len(hue[who == character].unique()) == 1
    verdict = world.judge(clips.frames.transpose(1, 2))
    named = clips.who.repeat_interleave(3, 1) < world.EMPTY_INDEX
    assert torch.equal(verdict.present, named)
    truth = clips.hue.repeat_interleave(3, 1) * 360
    assert world.hue_difference(verdict.hue, truth)[named].max() < 4


def test_clips_have_returns_stays_and_all_hues():
    clips = world.random_clips(512, 8, torch.Generator().manual_seed(3))
    switch = clips.who[:, 1:] != clips.who[:, :-1]
    assert 0.08 < (~switch.any(1)).float().mean() < 0.25  # clips in which one character stays
    earlier = (clips.who[:, 2:, None] == clips.who[:, None, :-2]) & (torch.arange(6)[:, None] >= torch.arange(6))
    returns = switch[:, 1:] & earlier.any(-1) & (clips.who[:, 2:] < world.EMPTY_INDEX)
    assert returns.float().mean() > 0.15
    bins = torch.histc(clips.hue, bins=6, min=0, max=1) / clips.hue.numel()
    assert (bins - 1 / 6).abs().max() < 0.03


def test_clips_repeat_with_their_seed():
    one, two = (world.random_clips(3, 4, torch.Generator().manual_seed(5), size=16) for _ in range(2))
    assert torch.equal(one.frames, two.frames)
    assert not torch.equal(one.frames, world.random_clips(3, 4, torch.Generator().manual_seed(6), size=16).frames)


def test_prompt_ids_are_the_vocabulary_s():
    ids = world.prompt_ids(torch.tensor([0, 4]), torch.tensor([3, 1]))
    assert torch.equal(embed_ids(ids), embed_prompts(["a ball at night", "an empty desert"]))


def test_coordinates_run_from_edge_to_edge():
    xy = world.coordinates(2, 4, 8)
    assert xy.shape == (1, 2, 2, 4, 8)
    torch.testing.assert_close(xy[0, 0, 1, 2], torch.linspace(-0.875, 0.875, 8))
    torch.testing.assert_close(xy[0, 1, 0, :, 5], torch.linspace(-0.75, 0.75, 4))
