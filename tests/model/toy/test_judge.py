"""The pixel judge: perfect on rendered ground truth, at chance on shuffled identities, blind to nobody."""

import pytest
import torch
from toy_scenes import all_scenes, empty_scenes

from memflow_ops.model.toy import judge, world


def test_ground_truth_is_judged_without_a_mistake():
    scenes = all_scenes(hues=24)
    verdict = judge.judge(world.render(**vars(scenes)))
    assert verdict.present.all()
    assert torch.equal(verdict.shape, scenes.who[:, 0])
    assert torch.equal(verdict.pattern, scenes.pattern[:, 0])
    assert judge.hue_difference(verdict.hue, scenes.hue[:, 0] * 360).max() < 4
    assert verdict.area.min() > 0.07 and verdict.area.max() < 0.16


@pytest.mark.parametrize("side", [0, 1])
def test_each_of_two_is_judged_without_a_mistake(side):
    one, other = all_scenes(), all_scenes(seed=1)
    turn = torch.randperm(len(one.place), generator=torch.Generator().manual_seed(2))
    x = torch.tensor([world.LEFT, world.RIGHT])
    both = {
        name: torch.cat([getattr(one, name), getattr(other, name)[turn]][:: 1 - 2 * side], dim=1)
        for name in ("who", "hue", "pattern", "centre")
    }
    both["centre"] = torch.stack([x.expand(len(turn), 2), both["centre"][..., 1]], dim=-1)
    verdict = judge.judge(judge.halves(world.render(place=one.place, **both)))
    assert verdict.present.all()
    assert torch.equal(verdict.shape[:, side], one.who[:, 0])
    assert torch.equal(verdict.pattern[:, side], one.pattern[:, 0])
    assert judge.hue_difference(verdict.hue[:, side], one.hue[:, 0] * 360).max() < 4


def test_shuffled_identities_are_at_chance():
    """What the judge says of one scene, held against another's truth."""
    scenes = all_scenes(hues=24)
    verdict = judge.judge(world.render(**vars(scenes)))
    other = torch.randperm(len(scenes.place), generator=torch.Generator().manual_seed(3))
    same_hue = judge.hue_difference(verdict.hue, scenes.hue[other, 0] * 360) < judge.SAME_HUE_DEGREES
    assert same_hue.float().mean() == pytest.approx(1 / 6, abs=0.035)
    assert (verdict.shape == scenes.who[other, 0]).float().mean() == pytest.approx(1 / 4, abs=0.04)
    assert (verdict.pattern == scenes.pattern[other, 0]).float().mean() == pytest.approx(1 / 3, abs=0.045)


def test_nobody_is_seen_in_empty_places():
    verdict = judge.judge(empty_scenes())
    assert not verdict.present.any()
    assert verdict.area.max() == 0
    assert not judge.judge(judge.halves(empty_scenes())).present.any()


@pytest.mark.parametrize(("pixels", "present"), [(19, False), (21, True)])
def test_two_percent_of_the_frame_are_needed(pixels, present):
    """Of the frame, 1024 pixels, also where only half of it is looked at."""
    frame = empty_scenes()[:1].clone()
    frame[0, :, 10, :13], frame[0, :, 11, : pixels - 13] = torch.tensor([[[0.9], [-0.9], [-0.9]]]).expand(2, 3, 1)
    assert judge.judge(frame).present.item() == present
    assert judge.judge(judge.halves(frame)).present.tolist() == [[present, False]]


def test_verdicts_are_steady_under_noise_and_blur():
    scenes = all_scenes()
    frames = world.render(**vars(scenes))
    noisy = frames + 0.1 * torch.randn(frames.shape, generator=torch.Generator().manual_seed(1))
    blurred = torch.nn.functional.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    for changed, patterns in ((noisy, 0.95), (blurred, 0.85)):
        verdict = judge.judge(changed)
        assert verdict.present.all()
        assert judge.hue_difference(verdict.hue, scenes.hue[:, 0] * 360).median() < 3
        assert (verdict.shape == scenes.who[:, 0]).float().mean() > 0.95
        assert (verdict.pattern == scenes.pattern[:, 0]).float().mean() > patterns


def test_a_chunk_s_frames_are_taken_together():
    """Red and magenta frames average on the circle; a character absent in most frames is absent."""
    scenes = all_scenes(hues=12)
    frames = world.render(**vars(scenes))
    red, magenta = (int((scenes.hue[:12, 0] - hue).abs().argmin()) for hue in (0.01, 11 / 12 + 0.01))
    chunk = torch.stack([frames[red], frames[magenta], empty_scenes()[0]], dim=1)
    gone = torch.stack([frames[red], empty_scenes()[0], empty_scenes()[0]], dim=1)
    seen, absent = judge.look_at(torch.stack([chunk, gone]), [None, None])
    assert seen.present and not absent.present
    middle = torch.tensor(348.6)
    assert judge.hue_difference(torch.tensor(seen.hue), middle) < 3
    assert (seen.shape, seen.pattern) == (0, 0)


@pytest.mark.parametrize(("a", "b", "expected"), [(350, 10, 20), (10, 350, 20), (90, 270, 180), (5, 5, 0)])
def test_hue_difference_goes_around_the_circle(a, b, expected):
    assert judge.hue_difference(torch.tensor(float(a)), torch.tensor(float(b))) == expected
