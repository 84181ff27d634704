"""LoRAs in every form that programs around Wan write, and configs of peft that change what is merged."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from memflow_ops.model.checkpoints.layouts import diffusers_name
from memflow_ops.model.checkpoints.pretrained import read_pretrained
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CONFIG = ModelConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
)
SAID = {"num_heads": 2, "text_len": 6}
Q0, Q1 = "blocks.0.self_attn.q", "blocks.1.self_attn.q"


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return {name: torch.randn_like(tensor) for name, tensor in CausalVideoModel(CONFIG).state_dict().items()}


@pytest.fixture
def base(tmp_path, weights):
    torch.save(weights, tmp_path / "base.pt")
    return tmp_path / "base.pt"


def pairs(weights, modules, rank=3):
    """Module -> A and B."""
    made = {}
    for module in modules:
        out, *into = weights[f"{module}.weight"].shape
        made[module] = torch.randn(rank, *into), torch.randn(out, rank, *[1 for _ in into[1:]])
    return made


def in_peft(made, prefix="base_model.model."):
    return {
        f"{prefix}{module}.lora_{half}.weight": x
        for module, ab in made.items()
        for half, x in zip("AB", ab, strict=True)
    }


def merged(weights, made, scale):
    """In float64. scale: one for all, or by module."""
    after = {name: tensor.double() for name, tensor in weights.items()}
    for module, (a, b) in made.items():
        by = scale[module] if isinstance(scale, dict) else scale
        after[f"{module}.weight"] += by * torch.einsum("or,ri->oi", b.flatten(1).double(), a.flatten(1).double()).view(
            after[f"{module}.weight"].shape
        )
    return after


def check(read, expected):
    assert read.weights.keys() == expected.keys()
    for name, tensor in read.weights.items():
        assert (tensor - expected[name]).abs().max() <= 1e-5, name


def lora_folder(folder, tensors, **said):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "bias": "none", **said}))
    return folder


# ------------------------------------------------------------------------------------------------------- forms of files

MODULES = (Q0, "blocks.1.cross_attn.o", "blocks.1.ffn.0", "time_projection.1", "head.head")


def named(style):
    """How a program names the parts of a LoRA's module: a function of module and part."""
    down_up = {"A": "lora_down", "B": "lora_up"}
    return {
        "kohya": lambda m, p: f"lora_unet_{m.replace('.', '_')}." + (f"{down_up[p]}.weight" if p in down_up else p),
        "kohya of diffusers": lambda m, p: (
            f"lora_unet__{diffusers_name(m).replace('.', '_')}." + (f"{down_up[p]}.weight" if p in down_up else p)
        ),
        "native": lambda m, p: f"diffusion_model.{m}." + (f"{down_up[p]}.weight" if p in down_up else p),
        "bare": lambda m, p: f"{m}." + (f"{down_up[p]}.weight" if p in down_up else p),
        "dotted": lambda m, p: (
            f"transformer.{diffusers_name(m)}." + (f"{down_up[p].replace('_', '.')}.weight" if p in down_up else p)
        ),
    }[style]


@pytest.mark.parametrize("style", ["kohya", "kohya of diffusers", "native", "bare", "dotted"])
def test_down_and_up_with_an_alpha_of_the_file(tmp_path, weights, base, style):
    made, name = pairs(weights, MODULES), named(style)
    tensors = {}
    for module, (a, b) in made.items():
        tensors |= {name(module, "A"): a, name(module, "B"): b, name(module, "alpha"): torch.tensor(6)}
    save_file(tensors, tmp_path / "lora.safetensors")
    read = read_pretrained(base, lora=tmp_path / "lora.safetensors", **SAID)
    check(read, merged(weights, made, 2))
    assert "5 layers, rank 3, scale 2 (alpha from the file)" in read.lora


def test_whole_differences_of_weights_biases_and_modulations(tmp_path, weights, base):
    made = pairs(weights, (Q0,))
    tensors = {
        **in_peft(made, "diffusion_model."),
        f"diffusion_model.{Q0}.alpha": torch.tensor(6.0),
        f"diffusion_model.{Q0}.diff_b": torch.randn(24),
        "diffusion_model.blocks.0.norm3.diff": torch.randn(24),
        "diffusion_model.blocks.0.norm3.diff_b": torch.randn(24),
        "diffusion_model.blocks.1.diff_m": torch.randn(1, 6, 24),
        "diffusion_model.head.head.diff": torch.randn(16, 24),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    read = read_pretrained(base, lora=tmp_path / "lora.safetensors", **SAID)
    expected = merged(weights, made, 2)
    for name, theirs in {
        f"{Q0}.bias": f"{Q0}.diff_b",
        "blocks.0.norm3.weight": "blocks.0.norm3.diff",
        "blocks.0.norm3.bias": "blocks.0.norm3.diff_b",
        "blocks.1.modulation": "blocks.1.diff_m",
        "head.head.weight": "head.head.diff",
    }.items():
        expected[name] += tensors[f"diffusion_model.{theirs}"].double()
    check(read, expected)
    assert "1 layers, rank 3, scale 2" in read.lora and "5 whole differences" in read.lora


def test_a_lora_of_a_convolution(tmp_path, weights, base):
    made = pairs(weights, ("patch_embedding",))
    save_file(in_peft(made), tmp_path / "lora.safetensors")
    check(read_pretrained(base, lora=tmp_path / "lora.safetensors", **SAID), merged(weights, made, 1))


def test_a_lora_that_is_given_as_the_checkpoint_is_called_one(tmp_path, weights):
    name = named("kohya")
    tensors = {name(m, p): x for m, ab in pairs(weights, (Q0,)).items() for p, x in zip("AB", ab, strict=True)}
    save_file({**tensors, name(Q0, "alpha"): torch.tensor(4.0)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"holds only a LoRA; .*--lora"):
        read_pretrained(tmp_path / "lora.safetensors", **SAID)


@pytest.mark.parametrize("style", ["kohya", "native", "dotted"])
@pytest.mark.parametrize("half", ["A", "B"])
def test_a_missing_half_is_named_as_its_file_would_name_it(tmp_path, weights, base, style, half):
    name, (a, b) = named(style), pairs(weights, (Q0,))[Q0]
    tensors = {name(Q0, "A"): a, name(Q0, "B"): b}
    del tensors[name(Q0, half)]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"missing {re.escape(name(Q0, half))}$"):
        read_pretrained(base, lora=tmp_path / "lora.safetensors", **SAID)


def test_one_layer_under_two_names_is_refused(tmp_path, weights, base):
    made = pairs(weights, (Q0,))
    torch.save({**in_peft(made), **in_peft(made, "diffusion_model.")}, tmp_path / "lora.pt")
    with pytest.raises(ValueError, match=r"base_model.model.(\S+) and diffusion_model.\1 are both \1"):
        read_pretrained(base, lora=tmp_path / "lora.pt", **SAID)


@pytest.mark.parametrize("part", ["dora_scale", "hada_w1_a", "lora_mid.weight", "diff_x"])
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, weights, base, part):
    tensors = in_peft(pairs(weights, (Q0,)), "diffusion_model.")
    save_file({**tensors, f"diffusion_model.{Q0}.{part}": torch.zeros(24)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"unexpected diffusion_model.{Q0}.{part}"):
        read_pretrained(base, lora=tmp_path / "lora.safetensors", **SAID)


# -------------------------------------------------------------------------------------------------- adapter_config.json


@pytest.mark.parametrize("prefix", ["base_model.model.", "diffusion_model.", ""])
@pytest.mark.parametrize(
    "pattern", ["^blocks.0.self_attn.q", r"^blocks\.0\.self_attn\.q", "^blocks.0.attn1.to_q", "0.*q"]
)
def test_patterns_match_the_names_of_the_model_that_was_trained(tmp_path, weights, base, prefix, pattern):
    if "attn1" in pattern and "base" in prefix:
        pytest.skip("after peft's own prefix stands exactly the name that the module had")
    made = pairs(weights, (Q0,), rank=2) | pairs(weights, (Q1,), rank=4)
    said = {"r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 32}, "rank_pattern": {pattern: 2}}
    lora = lora_folder(tmp_path / "lora", in_peft(made, prefix), **said)
    check(read_pretrained(base, lora=lora, **SAID), merged(weights, made, {Q0: 16, Q1: 1}))


def test_a_pattern_that_matches_nothing_is_mentioned(tmp_path, weights, base):
    lora = lora_folder(tmp_path / "lora", in_peft(pairs(weights, (Q0,))), r=3, alpha_pattern={"attn1.to_q": 9})
    assert "patterns that match none of its layers: attn1.to_q" in read_pretrained(base, lora=lora, **SAID).lora


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq"])
def test_adapters_that_were_taken_out_of_the_base_are_refused(tmp_path, weights, base, start):
    lora = lora_folder(tmp_path / "lora", in_peft(pairs(weights, (Q0,))), r=3, init_lora_weights=start)
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}', which takes .* out of the base"):
        read_pretrained(base, lora=lora, **SAID)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "lora_ga", "mica"])
def test_adapters_beside_the_base_are_merged(tmp_path, weights, base, start):
    made = pairs(weights, (Q0,))
    lora = lora_folder(
        tmp_path / "lora", in_peft(made), r=3, lora_alpha=6, init_lora_weights=start, eva_config={"rho": 2}
    )
    check(read_pretrained(base, lora=lora, **SAID), merged(weights, made, 2))


@pytest.mark.parametrize("saved", ["as peft saves it", "peft's own state dict"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}], ids=["", "rsLoRA"])
def test_dora_is_merged_as_peft_merges_it(tmp_path, weights, base, saved, changes):
    """Linear layers and a convolution."""
    peft = pytest.importorskip("peft")
    model = CausalVideoModel(CONFIG)
    model.load_state_dict(weights)
    targets = ["self_attn.q", "ffn.0", "patch_embedding"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, use_dora=True, **changes)
    trained = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    trained.save_pretrained(tmp_path / "lora")
    if saved != "as peft saves it":
        state = {name: x for name, x in trained.state_dict().items() if "lora_" in name}
        save_file(state, tmp_path / "lora" / "adapter_model.safetensors")
    pretrained = read_pretrained(base, lora=tmp_path / "lora", **SAID)
    expected = trained.merge_and_unload().state_dict()
    assert "with magnitudes (DoRA)" in pretrained.lora
    for name, tensor in pretrained.weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    assert (pretrained.weights[f"{Q0}.weight"] - weights[f"{Q0}.weight"]).abs().max() > 0.1


MAGNITUDE = {f"base_model.model.{Q0}.lora_magnitude_vector": torch.ones(24)}


@pytest.mark.parametrize(
    "tensors, said, message",
    [
        ({}, {"use_dora": True}, r"missing \S+q.lora_magnitude_vector \(use_dora in its config\)"),
        (MAGNITUDE, {"use_dora": False}, r"q has magnitudes, by its config \(use_dora\) none"),
        (MAGNITUDE, {"use_dora": "yes"}, "use_dora must be true or false, got 'yes'"),
        ({**MAGNITUDE, f"base_model.model.{Q0}.lora_B.bias": torch.ones(24)}, {}, "magnitudes and a bias in lora_B"),
        ({**MAGNITUDE, f"base_model.model.{Q0}.diff": torch.ones(24, 24)}, {}, "a magnitude and a whole difference"),
        (
            {f"base_model.model.{Q1}.lora_magnitude_vector": torch.ones(24)},
            {},
            r"missing \S+1.self_attn.q.lora_A",
        ),
    ],
    ids=["none", "not meant", "no flag", "bias", "difference", "alone"],
)
def test_magnitudes_that_do_not_fit_are_refused(tmp_path, weights, base, tensors, said, message):
    lora = lora_folder(tmp_path / "lora", in_peft(pairs(weights, (Q0,))) | tensors, r=3, **said)
    with pytest.raises(ValueError, match=message):
        read_pretrained(base, lora=lora, **SAID)


@pytest.mark.parametrize(
    "said",
    [
        {"fan_in_fan_out": True},
        {"modules_to_save": ["head"]},
        {"layer_replication": [[0, 1], [0, 2]]},
        {"trainable_token_indices": [3]},
        {"target_parameters": ["modulation"]},
        {"megatron_config": {"a": 1}},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1}},
        {"arrow_config": {"top_k": 3}},
        {"monteclora_config": {"num_samples": 8}},
        {"alora_invocation_tokens": [1]},
        {"an_option_of_next_year": 1},
        {"bias": "lora_only"},
        {"peft_type": "ADALORA"},
        {"init_lora_weights": "of_next_year"},
        {"use_rslora": "false"},
        {"lora_bias": 1},
    ],
    ids=lambda said: next(iter(said)),
)
def test_what_changes_the_sum_is_refused_by_name(tmp_path, weights, base, said):
    lora = lora_folder(tmp_path / "lora", in_peft(pairs(weights, (Q0,))), r=3, **said)
    with pytest.raises(ValueError, match=rf"adapter_config.json: .*{next(iter(said))}".replace(": .*bias", ":.*bias=")):
        read_pretrained(base, lora=lora, **SAID)


@pytest.mark.parametrize(
    "said",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1},
        {"target_modules": ["self_attn.k"]},
        {"target_modules": r".*\.1\..*q"},
        {"exclude_modules": [Q0]},
    ],
    ids=str,
)
def test_layers_that_the_config_leaves_out_are_refused(tmp_path, weights, base, said):
    lora = lora_folder(tmp_path / "lora", in_peft(pairs(weights, (Q0,))), r=3, **said)
    with pytest.raises(ValueError, match=f"base_model.model.{Q0} has a LoRA, though its config leaves it out"):
        read_pretrained(base, lora=lora, **SAID)


@pytest.mark.parametrize("content", ["[1]", "no JSON"])
def test_bad_metadata_of_a_lora_names_its_file(tmp_path, weights, base, content):
    path = tmp_path / "lora.safetensors"
    save_file(in_peft(pairs(weights, (Q0,))), path, {"lora_adapter_metadata": content})
    with pytest.raises(
        ValueError, match=r"lora.safetensors: lora_adapter_metadata (is not JSON|must hold a JSON object)"
    ):
        read_pretrained(base, lora=path, **SAID)


def test_metadata_of_other_parts_of_a_pipeline_is_not_that_of_the_transformer(tmp_path, weights, base):
    made, path = pairs(weights, (Q0,)), tmp_path / "lora.safetensors"
    said = {"text_encoder.r": 8, "text_encoder.lora_alpha": 99, "transformer.r": 3, "transformer.lora_alpha": 6}
    save_file(in_peft(made, "transformer."), path, {"lora_adapter_metadata": json.dumps(said)})
    check(read_pretrained(base, lora=path, **SAID), merged(weights, made, 2))


# ---------------------------------------------------------------------------------------------------------- bad numbers

BAD = {
    "int8": (lambda x: x.to(torch.int8), "is in torch.int8, expected one of"),
    "bool": (lambda x: x > 0, "is in torch.bool, expected one of"),
    "NaN": (lambda x: x.index_fill(0, torch.tensor([0]), torch.nan), "holds numbers that are not finite"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("half", ["A", "B"])
def test_bad_numbers_of_a_lora_are_blamed_on_it(tmp_path, weights, base, change, message, half):
    tensors = in_peft(pairs(weights, (Q0,)))
    name = f"base_model.model.{Q0}.lora_{half}.weight"
    save_file({**tensors, name: change(tensors[name])}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"lora.safetensors is no LoRA .* {name} {message}"):
        read_pretrained(base, lora=tmp_path / "lora.safetensors", **SAID)


def test_rank_0_is_refused(tmp_path, weights, base):
    save_file(in_peft(pairs(weights, (Q0,), rank=0)), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"{Q0} has rank 0"):
        read_pretrained(base, lora=tmp_path / "lora.safetensors", **SAID)


@pytest.mark.parametrize("whose", ["base", "lora"])
def test_numbers_that_merging_shows_not_to_be_finite_are_blamed_on_the_right_file(tmp_path, weights, whose):
    half = {name: tensor.half() for name, tensor in weights.items()}
    made = pairs(weights, (Q0,))
    if whose == "base":
        half[f"{Q0}.weight"][0, 0] = torch.nan
    else:
        made[Q0] = (made[Q0][0] * 1e6, made[Q0][1])
    torch.save(half, tmp_path / "base.pt")
    save_file(in_peft(made), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=rf"{whose}\.\w+ (has|makes).* not finite in torch.float16: {Q0}.weight"):
        read_pretrained(tmp_path / "base.pt", lora=tmp_path / "lora.safetensors", **SAID)


# -------------------------------------------------------------------------------------------------------- a given alpha


def test_a_given_alpha_is_that_of_one_lora(tmp_path, weights):
    inside, outside = pairs(weights, (Q0,)), pairs(weights, (Q1,))
    torch.save({"generator": weights, "generator_lora": in_peft(inside)}, tmp_path / "base.pt")
    save_file(in_peft(outside), tmp_path / "lora.safetensors")
    both = read_pretrained(tmp_path / "base.pt", lora=tmp_path / "lora.safetensors", lora_alpha=6, **SAID)
    check(both, merged(weights, {**inside, **outside}, {Q0: 1, Q1: 2}))
    check(read_pretrained(tmp_path / "base.pt", lora_alpha=6, **SAID), merged(weights, inside, 2))


def test_the_config_of_a_lora_inside_a_folder_is_that_of_the_folder(tmp_path, weights):
    made = pairs(weights, (Q0,))
    (tmp_path / "Wan").mkdir()
    save_file({**weights, **in_peft(made, "")}, tmp_path / "Wan" / "diffusion_pytorch_model.safetensors")
    for folder, alpha in ((tmp_path, 99), (tmp_path / "Wan", 6)):
        (folder / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": alpha}))
    check(read_pretrained(tmp_path / "Wan", **SAID), merged(weights, made, 2))


def test_a_given_alpha_leaves_the_patterns_of_the_config(tmp_path, weights, base):
    made = pairs(weights, (Q0, Q1))
    lora = lora_folder(tmp_path / "lora", in_peft(made), r=3, lora_alpha=3, alpha_pattern={"blocks.0.*": 12})
    read = read_pretrained(base, lora=lora, lora_alpha=6, **SAID)
    check(read, merged(weights, made, {Q0: 4, Q1: 2}))
    assert "alpha from its config's alpha_pattern and given" in read.lora


def test_a_given_alpha_cannot_stand_for_several_of_the_file(tmp_path, weights, base):
    tensors = in_peft(pairs(weights, (Q0, Q1)), "")
    tensors |= {f"{Q0}.alpha": torch.tensor(4.0), f"{Q1}.alpha": torch.tensor(8.0)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"alphas of its own .* from 4 to 8, so that lora_alpha=2"):
        read_pretrained(base, lora=tmp_path / "lora.safetensors", lora_alpha=2, **SAID)
