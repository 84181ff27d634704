"""Wan's own release in one folder (transformer, models_t5_*.pth, tokenizer, Wan2.1_VAE.pth) is loaded as it is.

The files are made of the small pipeline's weights, under the names that Wan's code has for them.
"""

import json
import re
import shutil

import pytest
import torch
from command_line import memflow, write_story
from safetensors.torch import load_file, save_file

from memflow_ops.model.checkpoints.pretrained import read_pretrained
from memflow_ops.model.pipeline.sources import Sources
from memflow_ops.model.wan.text_encoder import UMT5TextEncoder
from memflow_ops.model.wan.vae import StreamingDecoder, find_vae, load_vae

TEXT = {
    "shared.weight": "token_embedding.weight",
    "encoder.final_layer_norm.weight": "norm.weight",
    r"encoder\.block\.(\d)\.layer\.0\.layer_norm": r"blocks.\1.norm1",
    r"encoder\.block\.(\d)\.layer\.1\.layer_norm": r"blocks.\1.norm2",
    r"encoder\.block\.(\d)\.layer\.0\.SelfAttention\.relative_attention_bias": r"blocks.\1.pos_embedding.embedding",
    r"encoder\.block\.(\d)\.layer\.0\.SelfAttention": r"blocks.\1.attn",
    r"encoder\.block\.(\d)\.layer\.1\.DenseReluDense\.wi_0": r"blocks.\1.ffn.gate.0",
    r"encoder\.block\.(\d)\.layer\.1\.DenseReluDense\.wi_1": r"blocks.\1.ffn.fc1",
    r"encoder\.block\.(\d)\.layer\.1\.DenseReluDense\.wo": r"blocks.\1.ffn.fc2",
}
VAE = {
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
    r"conv_shortcut": "shortcut",
    r"(?<=\.)norm1": "residual.0",
    r"(?<=\.)conv1": "residual.2",
    r"(?<=\.)norm2": "residual.3",
    r"(?<=\.)conv2": "residual.6",
    r"\.conv_in": ".conv1",
    r"\.norm_out": ".head.0",
    r"\.conv_out": ".head.2",
    r"mid_block\.resnets\.0": "middle.0",
    r"mid_block\.attentions\.0": "middle.1",
    r"mid_block\.resnets\.1": "middle.2",
    r"down_blocks": "downsamples",
    # Stages of two residual blocks and one that makes the picture larger.
    r"up_blocks\.(\d)\.resnets\.(\d)": lambda found: f"upsamples.{3 * int(found[1]) + int(found[2])}",
    r"up_blocks\.(\d)\.upsamplers\.0": lambda found: f"upsamples.{3 * int(found[1]) + 2}",
}


def renamed(state, table):
    for pattern, theirs in table.items():
        state = {re.sub(pattern, theirs, name): tensor for name, tensor in state.items()}
    return state


@pytest.fixture(scope="module")
def release(tmp_path_factory, pipeline):
    folder = tmp_path_factory.mktemp("release") / "Wan2.1-T2V-1.3B"
    shutil.copytree(pipeline / "tokenizer", folder / "google" / "umt5-xxl")
    (text,) = (pipeline / "text_encoder").glob("*.safetensors")
    state = {name: tensor for name, tensor in load_file(text).items() if "embed_tokens" not in name}
    torch.save(renamed(state, TEXT), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (vae,) = (pipeline / "vae").glob("*.safetensors")
    torch.save(renamed(load_file(vae), VAE), folder / "Wan2.1_VAE.pth")
    save_file(read_pretrained(pipeline).weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", "num_heads": 2}))
    return folder


@pytest.mark.parametrize("file", ["", "models_t5_umt5-xxl-enc-bf16.pth"], ids=["folder", "file"])
def test_the_text_encoder(pipeline, release, file):
    prompts = ["the ball in the meadow", "sea"]
    ours, theirs = UMT5TextEncoder.from_folder(release / file), UMT5TextEncoder.from_folder(pipeline)
    assert torch.equal(ours(prompts), theirs(prompts)) and theirs(prompts).std() > 0.1
    half = UMT5TextEncoder.from_folder(release / file, dtype=torch.bfloat16)
    embedded = half.model.encoder.embed_tokens.weight
    assert embedded.data_ptr() == half.model.shared.weight.data_ptr(), "held once"


@pytest.mark.parametrize("file", ["", "Wan2.1_VAE.pth"], ids=["folder", "file"])
def test_the_vae(pipeline, release, file):
    ours, theirs, latents = load_vae(release / file), load_vae(pipeline), torch.randn(1, 16, 3, 4, 6)
    assert torch.equal(StreamingDecoder(ours).decode(latents), StreamingDecoder(theirs).decode(latents))
    said = find_vae(release / file)[1]
    assert all(theirs.config[name] == value for name, value in said.items()), said


def test_a_video_from_the_folder_of_the_release(tmp_path, pipeline, release, capfd):
    story = write_story(tmp_path / "story.jsonl", ["the ball"])
    small = ("--height", 32, "--width", 48, "--frames-per-prompt", 3, "--steps", 1, "--device", "cpu")
    for name, place in (("release", release), ("diffusers", pipeline)):
        words = ("--checkpoint", place, "--text-encoder", place, "--vae", place, "--out", tmp_path / name)
        assert memflow("generate", story, *words, *small) == 0
    printed = capfd.readouterr().out
    assert len({line for line in printed.splitlines() if "VAE's weights" in line}) == 1, "counted alike"
    assert (tmp_path / "release" / "video.mp4").read_bytes() == (tmp_path / "diffusers" / "video.mp4").read_bytes()


def without(path, out, name):
    state = torch.load(path)
    del state[name]
    torch.save(state, out)


def test_files_that_are_not_whole_or_something_else(tmp_path, pipeline, release):
    shutil.copytree(release, tmp_path / "Wan")
    text, vae = tmp_path / "Wan" / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "Wan" / "Wan2.1_VAE.pth"
    without(text, text, "blocks.1.ffn.gate.0.weight")
    with pytest.raises(
        ValueError, match=r"models_t5\S+ is not whole.*missing encoder.block.1.layer.1.DenseReluDense.wi_0"
    ):
        UMT5TextEncoder.from_folder(tmp_path / "Wan")
    without(vae, vae, "decoder.head.2.bias")
    with pytest.raises(ValueError, match=r"Wan2.1_VAE.pth is not whole.*missing decoder.conv_out.bias"):
        load_vae(tmp_path / "Wan")
    torch.save({"encoder.conv1.weight": torch.zeros(4, 12, 3, 3, 3), **{
        name: torch.zeros(16, 16) for name in ("conv2.weight", "decoder.head.2.weight")
    }}, vae)  # fmt: skip
    with pytest.raises(ValueError, match=r"VAE of Wan 2.2 \(it takes 12 channels\)"):
        load_vae(vae)
    diffusers = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"holds no VAE under the names of Wan's release.*give its folder"):
        load_vae(diffusers)
    (tmp_path / "Wan" / "models_t5_other.pth").touch()
    with pytest.raises(ValueError, match="holds several"):
        Sources(release, tmp_path / "Wan", None).check()
    shutil.rmtree(tmp_path / "Wan" / "google")
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        UMT5TextEncoder.from_folder(text)


def test_pointers_of_git_lfs_in_the_other_parts_are_called_so(tmp_path, pipeline):
    shutil.copytree(pipeline, tmp_path / "p")
    for part, load in (("vae", load_vae), ("text_encoder", UMT5TextEncoder.from_folder)):
        (file,) = (tmp_path / "p" / part).glob("*.safetensors")
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 507591892\n")
        with pytest.raises(ValueError, match=rf"{file.name} is a Git LFS pointer"):
            load(tmp_path / "p")
