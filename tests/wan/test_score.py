"""`memflow score` through files: videos of the toy world, and encoders from folders of transformers."""

import json

import numpy as np
import pytest
import torch
from command_line import memflow, write_story

from memflow_ops.model.score.encoders import load_encoder
from memflow_ops.model.stories.video import VideoWriter

STORY = ["a red ball here", "an empty sea", "the ball again"]
CPU = torch.device("cpu")


def write_video(path, frames):
    with VideoWriter(path, *frames.shape[1:3], fragment_frames=4, scale=1) as writer:
        writer.write(frames)
        writer.publish()
    return path


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A small random DINOv2 with its mean and spread of pixels."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "dino"
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}')
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders") / "clip"
    sides = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = {**sides, "image_size": 32, "patch_size": 16}, {**sides, "vocab_size": 99}
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moving():
    """24 frames that show one picture, another, and the first again, with some noise."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (2, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    frames = pictures[[0] * 8 + [1] * 8 + [0] * 8] + rng.integers(-12, 13, (24, 32, 32, 3))
    return frames.clip(0, 255).astype(np.uint8)


def test_transformers_folders_give_what_transformers_gives(dino, clip, moving):
    from transformers import AutoModel

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(moving).permute(0, 3, 1, 2) / 255, (28, 28), mode="bicubic", antialias=True
    ).clamp(0, 1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    with torch.no_grad():
        expected = AutoModel.from_pretrained(dino)(pixel_values=(resized - mean) / std).pooler_output
    torch.testing.assert_close(load_encoder(str(dino), CPU).whole(moving), expected)
    seen = load_encoder(str(clip), CPU).whole(moving)
    assert seen.shape == (24, 8) and seen.isfinite().all()


def test_a_video_is_scored_with_an_encoder_from_a_folder(tmp_path, dino, clip, moving, capfd):
    video, story = write_video(tmp_path / "v.mp4", moving), write_story(tmp_path / "s.jsonl", STORY)
    words = ("--encoder", dino, "--background-encoder", clip, "--subject", "ball", "--out", tmp_path / "score.json")
    assert memflow("score", video, story, *words) == 0
    said = json.loads((tmp_path / "score.json").read_text())
    assert said["encoder"] == "dino" and said["background_encoder"] == "clip" and said["returns"] == 1
    (there,) = said["videos"][0]["returns"]
    assert (there["first"], there["back"], there["away"]) == (0, 2, 1)
    assert there["similarity"] > there["chance"] and 0.9 < said["retained"] <= 1
    assert 0 < said["background_consistency"] <= 1 and str(tmp_path) not in json.dumps(said)
    assert "retained (0 chance, 1 the same)" in capfd.readouterr().out


def test_a_frozen_video_ends_with_a_word(tmp_path, dino, moving, capfd):
    video = write_video(tmp_path / "v.mp4", moving[:1].repeat(24, 0))
    story = write_story(tmp_path / "s.jsonl", STORY)
    words = ("--encoder", dino, "--subject", "ball", "--out", tmp_path / "score.json")
    assert memflow("score", video, story, *words) == 1
    assert "not scored, because hardly a frame differs from the one before: v.mp4" in capfd.readouterr().err
    said = json.loads((tmp_path / "score.json").read_text())
    assert said["retained"] is None and said["subject_consistency"] is None and said["frozen"] == ["v.mp4"]


def test_what_cannot_be_scored_is_refused_in_one_line(tmp_path, dino, moving, capfd):
    video, story = write_video(tmp_path / "v.mp4", moving), write_story(tmp_path / "s.jsonl", STORY)
    two = write_story(tmp_path / "two.jsonl", STORY, STORY)
    pickled, named = tmp_path / "pickled", tmp_path / "named"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    named.mkdir()
    (named / "model.safetensors").write_bytes((dino / "model.safetensors").read_bytes())
    (named / "config.json").write_text("{}")
    for words, said in (
        ((video, story, "--encoder", dino), "--subject"),
        ((video, story, "--encoder", dino, "--subject", "fox"), "nobody leaves and returns"),
        ((video, two, "--encoder", dino, "--subject", "ball"), "VIDEO must be the folder"),
        ((tmp_path, story, "--encoder", dino, "--subject", "ball"), "there is no video at"),
        ((story, story, "--encoder", dino, "--subject", "ball"), "cannot be read as a video"),
        ((video, story, "--encoder", tmp_path / "none", "--subject", "ball"), "no encoder at"),
        ((video, story, "--encoder", pickled, "--subject", "ball"), "no weights in safetensors"),
        ((video, story, "--encoder", named, "--subject", "ball"), "names neither an architecture of timm"),
        ((video, story, "--encoder", "toy"), "unknown word"),
        ((video, story, "--encoder", "toy", "--subject", "ball"), "leave --subject out"),
    ):
        assert memflow("score", *words) == 2, words
        assert said in capfd.readouterr().err, words


def test_the_demo_is_scored_by_its_own_judge(tmp_path, capfd):
    prompts = ["an empty sea", "a ball in the meadow", "an empty sea", "the ball at night"]
    story = write_story(tmp_path / "s.jsonl", prompts)
    options = ("--steps", 4, "--no-baseline", "--frames-per-prompt", 3)
    assert memflow("toy", "generate", story, "--out", tmp_path / "out", *options) == 0
    assert memflow("score", tmp_path / "out", story, "--encoder", "toy", "--out", tmp_path / "score.json") == 0
    said = json.loads((tmp_path / "score.json").read_text())
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert said["returns"] == 1 and said["videos"][0]["cache_bytes"] == run["cache_bytes"] > 0
    assert said["retained_per_gb"] == pytest.approx(said["retained"] / (run["cache_bytes"] / 1e9))
    (tmp_path / "out" / "run.json").write_text("{}")
    assert memflow("score", tmp_path / "out", story, "--encoder", "toy") == 2
    assert "does not say how long the prompts were" in capfd.readouterr().err
