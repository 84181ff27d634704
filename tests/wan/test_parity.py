"""The same functions as diffusers, transformers and peft compute, from files that those have written."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from memflow_ops.model.checkpoints.pretrained import convert, load_pretrained, read_pretrained
from memflow_ops.model.pipeline.settings import WAN_SETTINGS
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.wan.text_encoder import EncodedPrompts, UMT5TextEncoder, clean_prompt
from memflow_ops.model.wan.vae import StreamingDecoder, load_vae

TEXT_LEN = 12


def full_attention(model, frames, height, width):
    """What a chunk sees when it is alone: itself."""

    def attend(layer, q, k, v):
        q, k = (model.rotate(x, torch.arange(frames), model.grid(height, width)) for x in (q, k))
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


@torch.no_grad()
def check_parity(theirs, ours, frames=3, height=6, width=10):
    x, text = torch.randn(2, 16, frames, height, width), torch.randn(2, TEXT_LEN, 32)
    assert ours.config.text_len == TEXT_LEN
    attend = full_attention(ours, frames, height, width)
    # One timestep per story, and one per frame (theirs takes it per token).
    per_story = torch.tensor([937.5, 12.0])
    for t, their_t in (
        (per_story[:, None].expand(2, frames), per_story),
        (steps := torch.rand(2, frames) * 1000, steps.repeat_interleave(height * width // 4, dim=1)),
    ):
        expected = theirs(x, their_t, text).sample
        assert expected.abs().max() > 1
        assert (ours(x, t, ours.encode_text(text), attend) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_transformer_of_a_diffusers_folder(tmp_path, transformer, shards):
    transformer.save_pretrained(tmp_path / "t", max_shard_size="40KB" if shards else "1GB")
    assert len(list((tmp_path / "t").glob("*.safetensors"))) > 1 or not shards
    ours = load_pretrained(tmp_path / "t", text_len=TEXT_LEN)
    assert (ours.config.num_heads, ours.config.eps) == (2, 1e-6)
    check_parity(transformer, ours)


def test_transformer_of_a_pipeline_by_way_of_our_own_file(tmp_path, transformer, pipeline):
    read = read_pretrained(pipeline, text_len=TEXT_LEN)
    assert read.layout == "diffusers"
    convert(read, tmp_path / "ours.safetensors")
    check_parity(transformer, load_pretrained(tmp_path / "ours.safetensors"))


def test_missing_weights_are_named_as_diffusers_names_them(tmp_path, transformer):
    state = transformer.state_dict()
    del state["blocks.1.attn2.to_out.0.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"missing blocks.1.attn2.to_out.0.bias \(24,\)"):
        read_pretrained(tmp_path / "w.pt", num_heads=2)


def test_lora_as_peft_trains_and_merges_it(tmp_path, transformer, pipeline):
    """Adapters with random B, saved by peft, merged by peft and by us."""
    import copy

    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(
        copy.deepcopy(transformer),
        LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "ffn.net.2"], init_lora_weights=False),
    )
    wrapped.save_pretrained(tmp_path / "lora")
    ours = load_pretrained(pipeline, lora=tmp_path / "lora", text_len=TEXT_LEN)
    merged = wrapped.merge_and_unload()
    assert not torch.equal(merged.blocks[0].ffn.net[2].weight, transformer.blocks[0].ffn.net[2].weight)
    check_parity(merged, ours)


def test_lora_that_diffusers_saves(tmp_path, transformer, pipeline):
    import copy

    from diffusers import WanPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    trained, config = copy.deepcopy(transformer), LoraConfig(r=2, lora_alpha=7, target_modules=["to_k"])
    trained.add_adapter(config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    WanPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(trained), transformer_lora_adapter_metadata=config.to_dict()
    )
    read = read_pretrained(pipeline, lora=tmp_path, text_len=TEXT_LEN)
    assert "4 layers, rank 2, scale 3.5 (alpha from its config)" in read.lora
    check_parity(trained, read.build())


# ----------------------------------------------------------------------------------------------------------------- text

PROMPTS = ["The ball in the meadow", "a  star &amp; a box\n at night", "sea"]


def test_text_is_encoded_as_the_pipeline_does(pipeline):
    """Against diffusers' pipeline, which pads to the full length."""
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    theirs = WanPipeline(
        tokenizer=AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(pipeline / "text_encoder"),
        vae=None,
        scheduler=None,
        transformer=None,
    )
    with torch.no_grad():
        expected = theirs._get_t5_prompt_embeds(PROMPTS, max_sequence_length=TEXT_LEN, device="cpu")
    encode = UMT5TextEncoder.from_folder(pipeline, text_len=TEXT_LEN)
    got = encode(PROMPTS)
    lengths = [6, 8, 2]  # words and the end
    assert got.shape == (3, max(lengths), 32)
    for row, length in zip(got, lengths, strict=True):
        assert (row[:length] != 0).any(-1).all() and (row[length:] == 0).all()
    assert (F.pad(got, (0, 0, 0, TEXT_LEN - got.shape[1])) - expected).abs().max() <= 1e-5

    beforehand = EncodedPrompts(encode, [*PROMPTS, PROMPTS[0]])
    assert (beforehand(PROMPTS) - got).abs().max() <= 1e-5
    assert torch.equal(beforehand([PROMPTS[2]]), beforehand(PROMPTS)[2:, :2])
    with pytest.raises(ValueError, match="a box"):
        beforehand(["a box"])


def test_prompts_are_cleaned():
    assert clean_prompt("  a&amp;amp;b \n\t c ") == "a&b c"
    assert clean_prompt("schÃ¶n") == "schön"


def test_a_prompt_that_is_too_long_is_cut_aloud(pipeline):
    encode = UMT5TextEncoder.from_folder(pipeline, text_len=4)
    with pytest.warns(UserWarning, match="8 tokens and is cut to 4"):
        cut = encode(["the ball in the sea at night"])
    assert cut.shape == (1, 4, 32)


# ------------------------------------------------------------------------------------------------------------------ VAE


def test_the_decoder_streams_what_decoding_everything_at_once_gives(pipeline):
    from diffusers import AutoencoderKLWan

    vae = load_vae(pipeline)
    latents = torch.randn(2, 16, 7, 4, 2)
    shape = (1, 16, 1, 1, 1)
    mean, std = (torch.tensor(x).view(shape) for x in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        whole = AutoencoderKLWan.from_pretrained(pipeline / "vae").decode(latents * std + mean).sample
    assert whole.shape == (2, 3, 25, 32, 16) and whole.std() > 0.01
    streams = {sizes: StreamingDecoder(vae) for sizes in ((7,), (3, 3, 1), (1,) * 7)}
    parts = {sizes: [] for sizes in streams}
    for i in range(7):  # in turn: each stream has its own memory
        for sizes, stream in streams.items():
            if i < len(sizes):
                start = sum(sizes[:i])
                parts[sizes].append(stream.decode(latents[:, :, start : start + sizes[i]]))
    for sizes, frames in parts.items():
        # diffusers runs its first 1 x 1 x 1 convolution over all frames at once, whose sums may then round differently.
        torch.testing.assert_close(torch.cat(frames, 2), whole, rtol=0, atol=1e-5 if len(sizes) > 1 else 0)
        assert streams[sizes].state_bytes > 0
    assert [x.shape[2] for x in parts[3, 3, 1]] == [9, 12, 4]


@pytest.mark.parametrize("memory", ["memflow", "released"])
def test_a_video_that_is_stopped_goes_on_to_the_same_pixels(tmp_path, pipeline, memory):
    """Two stories, from files on disk, with a switch after the stop; all of it by what torch.load reads safely."""
    sizes = {"height": 4, "width": 6, "bank_frames": 2, "top_k": 3, "query_group": 4, "block_size": 4}
    settings = replace(WAN_SETTINGS, memory=memory, **sizes)
    prompts = [("a ball", "the sea")] * 4 + [("a ball", "the ball returns")] * 3

    def parts():
        encode, vae = UMT5TextEncoder.from_folder(pipeline), load_vae(pipeline)
        streamer = Streamer(load_pretrained(pipeline), 2, settings, [3, 8], encode=encode)
        return streamer, [StreamingDecoder(vae) for _ in range(2)]

    def watch(streamer, decoders, coming):
        latents = [streamer.next_chunk(spoken).frames for spoken in coming]
        return [[d.decode(x[i : i + 1]) for x in latents] for i, d in enumerate(decoders)]

    whole = watch(*parts(), prompts)
    streamer, decoders = parts()
    watch(streamer, decoders, prompts[:3])
    state = {"stream": streamer.state_dict(), "decoders": [decoder.state_dict() for decoder in decoders]}
    torch.save(state, tmp_path / "state.pt")
    watch(streamer, decoders, prompts[3:])  # what was saved does not move with it
    streamer, decoders = parts()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    streamer.load_state_dict(state["stream"])
    for decoder, saved in zip(decoders, state["decoders"], strict=True):
        decoder.load_state_dict(saved)
    for got, want in zip(watch(streamer, decoders, prompts[3:]), whole, strict=True):
        assert all(map(torch.equal, got, want[3:])) and got[0].std() > 0.01
    for bad in ({}, [], {**state["decoders"][0], "memory": []}):
        with pytest.raises(ValueError, match=r"no state of a decoder with \d+ causal"):
            decoders[0].load_state_dict(bad)


# ---------------------------------------------------------------------------------------------------- what is not there


def test_folders_that_hold_something_else(tmp_path, pipeline):
    for load in (load_vae, UMT5TextEncoder.from_folder):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            load(tmp_path)
    with pytest.raises(ValueError, match="WanTransformer3DModel"):
        load_vae(pipeline / "transformer")
    with pytest.raises(ValueError, match="umt5"):
        UMT5TextEncoder.from_folder(pipeline / "vae")


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_loaded_part_does_not_depend_on_its_file_any_more(tmp_path, pipeline, part):
    import shutil

    shutil.copytree(pipeline, tmp_path / "p")
    loaded = load_vae(tmp_path / "p") if part == "vae" else UMT5TextEncoder.from_folder(tmp_path / "p").model
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    (path,) = (tmp_path / "p" / part).glob("*.safetensors")
    with open(path, "r+b") as file:  # in place: a mapping of the file would see it
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def copied_without(source, target, name):
    """A model folder whose safetensors file lacks one weight."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    weights = load_file(file)
    del weights[name]
    save_file(weights, file, {"format": "pt"})
    return target


def test_weights_that_would_be_made_up_are_named(tmp_path, pipeline):
    encoder = copied_without(pipeline / "text_encoder", tmp_path / "text_encoder", "encoder.final_layer_norm.weight")
    (tmp_path / "tokenizer").symlink_to(pipeline / "tokenizer")
    with pytest.raises(ValueError, match=r"missing encoder.final_layer_norm.weight"):
        UMT5TextEncoder.from_folder(encoder)
    with pytest.raises(ValueError, match=r"decoder.conv_out.weight"):
        load_vae(copied_without(pipeline / "vae", tmp_path / "vae", "decoder.conv_out.weight"))


def test_nothing_asks_the_network(pipeline, monkeypatch):
    import socket

    from huggingface_hub import constants

    def refuse(*arguments, **options):
        raise AssertionError(f"somebody asked for {arguments}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    UMT5TextEncoder.from_folder(pipeline)
    load_vae(pipeline)


def test_package_does_without_them():
    """Everything imports with the extra's packages blocked, and says what to install when one is needed."""
    program = """
import sys
others = ("starlette", "uvicorn", "websockets", "timm", "open_clip")
for name in ("diffusers", "transformers", "peft", "accelerate", "ftfy", "sentencepiece", "tokenizers", *others):
    sys.modules[name] = None
import memflow_ops, memflow_ops.cli
import memflow_ops.integrations.diffusers, memflow_ops.integrations.self_forcing
from memflow_ops.model.checkpoints.pretrained import load_pretrained
from memflow_ops.model.live import checkpoint, engine
from memflow_ops.model.pipeline import generate, verify
from memflow_ops.model.score import encoders
from memflow_ops.model.wan import text_encoder, transformer, vae
assert load_pretrained("model/weights/toy.safetensors").config.out_dim == 3
for load in (vae.load_vae, text_encoder.UMT5TextEncoder.from_folder):
    try:
        load(sys.argv[1])
    except ModuleNotFoundError as error:
        assert "memflow-ops[wan]" in str(error), error
    else:
        raise SystemExit(f"{load} did without")
"""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        for name, config in (
            ("vae", '{"_class_name": "AutoencoderKLWan"}'),
            ("text_encoder", '{"model_type": "umt5"}'),
            ("tokenizer", "{}"),
        ):
            (Path(folder) / name).mkdir()
            (Path(folder) / name / ("tokenizer.json" if name == "tokenizer" else "config.json")).write_text(config)
        done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
