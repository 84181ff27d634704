"""The renderer's claims about colour and area, and what its random clips hold."""

import itertools

import torch
from toy_scenes import all_scenes, empty_scenes

from memflow_ops.model.streaming.inputs import pixel_coordinates
from memflow_ops.model.toy import judge, world
from memflow_ops.model.toy.language import CHARACTERS, NOBODY, PLACES


def saturation_and_value(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rgb = (frames + 1) / 2
    value, darkest = rgb.amax(-3), rgb.amin(-3)
    return (value - darkest) / value, value


def test_places_are_pale_and_differ():
    frames = empty_scenes()
    saturation, _ = saturation_and_value(frames)
    assert saturation.max() < 0.3
    for a, b in itertools.combinations(range(len(PLACES)), 2):
        assert (frames[a] - frames[b]).abs().mean() > 0.05, f"{PLACES[a]} and {PLACES[b]} look alike"


def test_characters_are_vivid_and_in_two_tones():
    scenes = all_scenes()
    frames = world.render(**vars(scenes))
    behind = empty_scenes()[scenes.place]
    touched = ((frames - behind).abs().amax(-3) > 0.01).float().mean((-2, -1))
    assert touched.min() > 0.08 and touched.max() < 0.2
    saturation, value = saturation_and_value(frames)
    vivid = saturation > 0.89  # pixels wholly inside
    area = vivid.float().mean((-2, -1))
    assert area.min() > 0.05 and area.max() < 0.15
    for tone in (world.BRIGHT, world.DARK):
        pixels = (vivid & ((value - tone).abs() < 1e-3)).float().mean((-2, -1))
        assert pixels.min() * world.FRAME_SIZE**2 >= 8, "a tone that is hardly to be seen"


def test_two_stand_side_by_side_without_touching():
    who = torch.tensor(list(itertools.permutations(range(len(CHARACTERS)), 2)))
    place = torch.zeros(len(who), dtype=torch.long)
    looks = torch.zeros(len(who), 2)
    centre = torch.tensor([[world.LEFT, 0.5], [world.RIGHT, 0.5]]).expand(len(who), 2, 2)
    frames = world.render(who, place, looks, looks.long(), centre)
    for side in (0, 1):
        alone = who.clone()
        alone[:, 1 - side] = NOBODY
        apart = world.render(alone, place, looks, looks.long(), centre)
        assert torch.equal(judge.halves(frames)[:, side], judge.halves(apart)[:, side])


def test_half_resolution_shows_the_same_scene():
    """Training starts at 16 x 16; the picture must be the same one, only coarser."""
    scenes = vars(all_scenes())
    coarse = world.render(**scenes, size=16)
    averaged = torch.nn.functional.avg_pool2d(world.render(**scenes), 2)
    assert (coarse - averaged).abs().mean() < 0.03


def test_clips_keep_a_character_s_look():
    clips = world.random_clips(64, 8, torch.Generator().manual_seed(2))
    for ids, hue, pattern in zip(clips.ids[..., :2], clips.hue, clips.pattern, strict=True):
        for character in range(NOBODY):
            assert len(hue[ids == character].unique()) <= 1
            assert len(pattern[ids == character].unique()) <= 1


def test_clips_show_what_they_say():
    clips = world.random_clips(64, 8, torch.Generator().manual_seed(4))
    frames = clips.frames.transpose(1, 2)  # (B, F, 3, H, W)
    who, hue, pattern = (x.repeat_interleave(3, 1) for x in (clips.ids[..., :2], clips.hue * 360, clips.pattern))
    alone, two = (who[..., 0] < NOBODY) & (who[..., 1] == NOBODY), who[..., 1] < NOBODY
    whole, sides = judge.judge(frames), judge.judge(judge.halves(frames))
    assert torch.equal(whole.present, alone | two)
    for verdict, here, slot in ((whole, alone, 0), (sides, two, slice(None))):
        assert verdict.present[here].all()
        assert torch.equal(verdict.shape[here], who[..., slot][here])
        assert torch.equal(verdict.pattern[here], pattern[..., slot][here])
        assert judge.hue_difference(verdict.hue, hue[..., slot])[here].max() < 4


def test_characters_hop_and_start_over_when_the_scene_changes():
    clips = world.random_clips(64, 8, torch.Generator().manual_seed(7))
    frames = clips.frames.transpose(1, 2).unflatten(1, (8, 3))  # (B, C, 3, 3, H, W)
    rows = judge.colour_mask(frames).any(-1).float()
    middle = (rows * torch.arange(32)).sum(-1) / rows.sum(-1)  # of the rows that show a character (B, C, 3)
    same = (clips.ids[:, 1:] == clips.ids[:, :-1]).all(-1)
    somebody = clips.ids[..., 0] < NOBODY
    fresh = torch.cat([torch.ones(64, 1, dtype=torch.bool), ~same], dim=1)
    rising, falling = torch.tensor([-4.0, -4.0]), torch.tensor([4.0, 4.0])
    steps = middle.diff(dim=-1)
    torch.testing.assert_close(
        steps[fresh & somebody], rising.expand(int((fresh & somebody).sum()), 2), atol=0.6, rtol=0
    )
    second = torch.zeros_like(fresh)
    second[:, 1:] = same & fresh[:, :-1]
    torch.testing.assert_close(
        steps[second & somebody], falling.expand(int((second & somebody).sum()), 2), atol=0.6, rtol=0
    )


def test_clips_have_returns_pairs_stays_and_all_looks():
    clips = world.random_clips(512, 8, torch.Generator().manual_seed(3))
    who = clips.ids[..., :2]
    changed = (clips.ids[:, 1:] != clips.ids[:, :-1]).any(-1)
    assert 0.08 < (~changed.any(1)).float().mean() < 0.25  # clips in which one scene stays
    shows = (who[..., None] == torch.arange(NOBODY)).any(-2)  # (B, C, characters)
    earlier = shows.cumsum(1) > 0
    returns = shows[:, 2:] & ~shows[:, 1:-1] & earlier[:, :-2]
    assert returns.any(-1).float().mean() > 0.15
    assert 0.2 < (who[..., 1] < NOBODY).float().mean() < 0.5
    assert (who[..., 0] != who[..., 1])[who[..., 0] < NOBODY].all()
    bins = torch.histc(clips.hue, bins=6, min=0, max=1) / clips.hue.numel()
    assert (bins - 1 / 6).abs().max() < 0.03
    assert (clips.pattern.flatten().bincount() / clips.pattern.numel() - 1 / 3).abs().max() < 0.03


def test_clips_repeat_with_their_seed():
    one, two = (world.random_clips(3, 4, torch.Generator().manual_seed(5), size=16) for _ in range(2))
    assert torch.equal(one.frames, two.frames)
    assert not torch.equal(one.frames, world.random_clips(3, 4, torch.Generator().manual_seed(6), size=16).frames)


def test_coordinates_run_from_edge_to_edge():
    xy = pixel_coordinates(2, 4, 8)
    assert xy.shape == (1, 2, 2, 4, 8)
    torch.testing.assert_close(xy[0, 0, 1, 2], torch.linspace(-0.875, 0.875, 8))
    torch.testing.assert_close(xy[0, 1, 0, :, 5], torch.linspace(-0.75, 0.75, 4))
