"""From a training's .pt to a folder of diffusers, by the command; and LoRAs as peft and diffusers merge them."""

import copy

import pytest
import torch
from command_line import memflow
from safetensors.torch import save_file

from memflow_ops.model.checkpoints.layouts import original_name
from memflow_ops.model.checkpoints.pretrained import read_pretrained
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS


@pytest.fixture
def checkpoint(tmp_path, transformer):
    """diffusers' transformer under the names of Self-Forcing's training."""
    state = {f"model.{original_name(name)}": tensor for name, tensor in transformer.state_dict().items()}
    torch.save({"generator_ema": state, "step": 7}, tmp_path / "base.pt")
    return tmp_path / "base.pt"


def parts(pipeline):
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer, UMT5EncoderModel

    return {
        "tokenizer": AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
        "text_encoder": UMT5EncoderModel.from_pretrained(pipeline / "text_encoder"),
        "vae": AutoencoderKLWan.from_pretrained(pipeline / "vae"),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def same(state, expected):
    assert state.keys() == expected.keys()
    return all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_a_folder_that_diffusers_loads(tmp_path, transformer, pipeline, checkpoint, capfd):
    from diffusers import WanPipeline, WanTransformer3DModel

    out = tmp_path / "folder"
    words = ("convert", checkpoint, out, "--to", "diffusers", "--num-heads", 2, "--text-len", 12)
    assert memflow(*words) == 0
    said = capfd.readouterr().out
    assert f"Written: {out}" in said and "max_sequence_length=12" in said
    loaded, info = WanTransformer3DModel.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and same(loaded.state_dict(), transformer.state_dict())
    assert set(loaded.config) | {"_diffusers_version", "_use_default_values"} >= set(transformer.config)
    for name, value in transformer.config.items():
        if not name.startswith("_"):
            assert loaded.config[name] == (list(value) if isinstance(value, tuple) else value), name
    whole = WanPipeline.from_pretrained(out, **parts(pipeline))
    assert same(whole.transformer.state_dict(), transformer.state_dict())
    frames = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 12}
    video = whole(prompt="the ball", guidance_scale=1.0, output_type="latent", **frames).frames
    assert video.isfinite().all() and video.shape[1] == 16
    assert memflow(*words, "--dtype", "bfloat16") == 0, "the command may be repeated"
    back = read_pretrained(out, text_len=12)
    assert back.layout == "diffusers" and back.dtype == torch.bfloat16 and back.config.num_heads == 2


def test_the_memory_that_weights_were_tuned_for_goes_with_them(tmp_path, checkpoint):
    words = ("convert", checkpoint, tmp_path / "folder", "--to", "diffusers", "--num-heads", 2, "--memory", "released")
    assert memflow(*words) == 0
    assert read_pretrained(tmp_path / "folder").memory == "released"


def test_folders_that_would_be_loaded_otherwise_are_refused_before_reading(tmp_path, capfd):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    for out, says in (("old", "holds other files (diffusion_pytorch"), ("a.safetensors", "got the name of a file")):
        assert memflow("convert", tmp_path / "not there", tmp_path / out, "--to", "diffusers") == 2
        assert says in capfd.readouterr().err
    assert memflow("convert", TOY_WEIGHTS, tmp_path / "toy", "--to", "diffusers") == 2
    assert "cannot be a WanTransformer3DModel" in capfd.readouterr().err and not (tmp_path / "toy").exists()


# ----------------------------------------------------------------------------------------------------------------- LoRA

PEFT = {
    "anchored patterns": {
        "target_modules": ["to_q", "ffn.net.2"],
        "alpha_pattern": {"^blocks.0.attn1.to_q": 32, r"blocks\.1\..*to_q": 5},
        "rank_pattern": {"^blocks.0.attn1.to_q": 2},
    },
    "rank-stabilised": {"target_modules": ["to_q"], "use_rslora": True, "rank_pattern": {"^blocks.1.attn2.to_q": 7}},
    "biased": {"target_modules": ["to_k", "proj_out"], "lora_bias": True},
    "some layers": {"target_modules": ["to_v"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "a pattern of modules": {"target_modules": r"blocks\.1\..*to_(q|v)"},
    "not all modules": {"target_modules": ["to_q", "to_v"], "exclude_modules": ["blocks.0.attn1.to_q"]},
    "a convolution": {"target_modules": ["patch_embedding"]},
    "mica": {"target_modules": ["to_q"], "init_lora_weights": "mica"},
    "orthogonal": {"target_modules": ["to_q"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("options", PEFT.values(), ids=PEFT.keys())
def test_a_lora_of_peft_is_merged_as_by_peft(tmp_path, transformer, checkpoint, options):
    from peft import LoraConfig, PeftModel, get_peft_model

    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}
    wrapped = get_peft_model(copy.deepcopy(transformer), LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "lora")
    theirs = PeftModel.from_pretrained(copy.deepcopy(transformer), tmp_path / "lora").merge_and_unload()
    expected = {original_name(name): tensor for name, tensor in theirs.state_dict().items()}
    before = read_pretrained(checkpoint, num_heads=2).weights
    ours = read_pretrained(checkpoint, lora=tmp_path / "lora", num_heads=2).weights
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=2e-5)
        changed += not torch.equal(tensor, before[name])
    assert changed and changed == sum(not torch.equal(ours[name], before[name]) for name in before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_peft_itself_takes_these_adapters_out_of_the_base(tmp_path, transformer, checkpoint, start):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=start)
    wrapped = get_peft_model(copy.deepcopy(transformer), config)
    base = wrapped.base_model.model.blocks[0].attn1.to_q.base_layer.weight
    assert not torch.equal(base, transformer.blocks[0].attn1.to_q.weight)
    wrapped.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}'"):
        read_pretrained(checkpoint, lora=tmp_path / "lora", num_heads=2)


@pytest.mark.parametrize("form", ["diffusion_model.", "lora_unet_"])
def test_a_lora_of_the_programs_around_wan_is_merged_as_by_diffusers(tmp_path, transformer, checkpoint, form):
    """diffusers reads the second form only where every layer has an adapter."""
    from diffusers import WanPipeline

    torch.manual_seed(6)
    tensors = {}
    for block in range(2):
        for attention in ("self_attn", "cross_attn"):
            for layer in "qkvo":
                tensors |= adapter(f"blocks.{block}.{attention}.{layer}", 24, 24, form)
        tensors |= adapter(f"blocks.{block}.ffn.0", 48, 24, form) | adapter(f"blocks.{block}.ffn.2", 24, 48, form)
    if form == "diffusion_model.":
        tensors["diffusion_model.blocks.0.self_attn.q.diff_b"] = torch.randn(24)
    save_file(tensors, tmp_path / "lora.safetensors")
    pipe = WanPipeline(
        transformer=copy.deepcopy(transformer), tokenizer=None, text_encoder=None, vae=None, scheduler=None
    )
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    ours = read_pretrained(checkpoint, lora=tmp_path / "lora.safetensors", num_heads=2).weights
    for name, tensor in pipe.transformer.state_dict().items():
        torch.testing.assert_close(ours[original_name(name)], tensor, rtol=1e-5, atol=2e-5)
    assert not torch.equal(ours["blocks.1.ffn.2.weight"], transformer.blocks[1].ffn.net[2].weight)


def adapter(module, out, into, form):
    name = form + (module if form.endswith(".") else module.replace(".", "_"))
    down, up = torch.randn(3, into), torch.randn(out, 3)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
