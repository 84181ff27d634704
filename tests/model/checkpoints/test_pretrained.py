"""Checkpoints of others' making come back as the weights they were; what does not fit is named as its file names it.

Every file is made here, from one small random model. diffusers' own folders are in test_diffusers.py.
"""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from memflow_ops.model.checkpoints.layouts import bare_name, diffusers_name, original_name
from memflow_ops.model.checkpoints.native import load_checkpoint, save_checkpoint
from memflow_ops.model.checkpoints.pretrained import convert, load_pretrained, read_pretrained, tuned_for
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CONFIG = ModelConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
)
SAID = {"num_heads": 2, "text_len": 6}  # what the shapes do not tell


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = CausalVideoModel(CONFIG).state_dict()
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def prefixed(weights, prefix):
    return {prefix + name: tensor for name, tensor in weights.items()}


def wrapped(weights, wrapper):
    """As a wrapper around every block leaves the names."""
    return {name.replace("blocks.0.", f"blocks.0.{wrapper}.").replace("blocks.1.", f"blocks.1.{wrapper}."): tensor
            for name, tensor in weights.items()}  # fmt: skip


def write_folder(folder, weights, shards=0, **said):
    folder.mkdir(parents=True)
    if said:
        (folder / "config.json").write_text(json.dumps(said))
    if not shards:
        save_file(weights, folder / "diffusion_pytorch_model.safetensors")
        return folder
    names = sorted(weights)
    listed = {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: weights[name] for name in names[i::shards]}, folder / file)
        listed |= dict.fromkeys(names[i::shards], file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return folder


def saved(path, content, **options):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, **options)
    return path


ORIGINAL_CONFIG = {
    "_class_name": "WanModel",
    **{name: value for name, value in vars(CONFIG).items() if name not in ("patch_size", "prediction")},
}
EMPTY = {"critic": {}, "step": 3}
FORMATS = {
    "safetensors": lambda path, w: saved(path / "w.safetensors", w),
    "state dict in a pt": lambda path, w: saved(path / "w.pt", w),
    "old pt": lambda path, w: saved(path / "w.pt", w, _use_new_zipfile_serialization=False),
    "generator_ema": lambda path, w: saved(path / "w.pt", {"generator_ema": prefixed(w, "model."), **EMPTY}),
    "generator": lambda path, w: saved(path / "w.pt", {"generator": prefixed(w, "model.")}),
    "model": lambda path, w: saved(path / "w.pth", {"model": w}),
    "FSDP": lambda path, w: saved(
        path / "w.pt", {"generator": prefixed(wrapped(w, "_fsdp_wrapped_module"), "model._fsdp_wrapped_module.")}
    ),
    "checkpointing and compile": lambda path, w: saved(
        path / "w.pt", prefixed(wrapped(w, "_checkpoint_wrapped_module"), "_orig_mod.module.model.")
    ),
    "among other models": lambda path, w: saved(path / "w.safetensors", prefixed(w, "model.diffusion_model.")),
    "original folder": lambda path, w: write_folder(path / "Wan", w, **ORIGINAL_CONFIG),
    "file of an original folder": lambda path, w: (
        write_folder(path / "Wan", w, **ORIGINAL_CONFIG) / "diffusion_pytorch_model.safetensors"
    ),
    "original folder in shards": lambda path, w: write_folder(path / "Wan", w, 3, **ORIGINAL_CONFIG),
    "folder of a pipeline": lambda path, w: write_folder(path / "Wan" / "transformer", w).parent,
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS.keys())
def test_every_container_and_wrapper(tmp_path, weights, write):
    read = read_pretrained(write(tmp_path, weights), **SAID)
    assert read.config == CONFIG and read.layout == "original" and read.dtype == torch.float32
    assert read.weights.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(read.weights[name], tensor), name


def test_config_of_a_folder_tells_what_shapes_do_not(tmp_path, weights):
    folder = write_folder(tmp_path / "Wan", weights, **{**ORIGINAL_CONFIG, "eps": 1e-5})
    assert read_pretrained(folder).config == replace(CONFIG, eps=1e-5)
    assert read_pretrained(folder, num_heads=4).config.num_heads == 4


def test_heads_and_text_length_of_released_models():
    config = ModelConfig(dim=256, ffn_dim=8, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_dim=4, text_len=512)
    from memflow_ops.model.checkpoints.layouts import infer_config

    assert infer_config(CausalVideoModel(config).state_dict(), {}, "here") == config


def test_averaged_weights_come_first(tmp_path, weights):
    other = {name: tensor + 1 for name, tensor in weights.items()}
    path = saved(tmp_path / "w.pt", {"generator": other, "generator_ema": weights})
    read = read_pretrained(path, **SAID)
    assert read.part == "generator_ema"
    assert torch.equal(read.weights["head.modulation"], weights["head.modulation"])


def test_from_pretrained_runs_like_the_model_it_came_from(tmp_path, weights):
    ours = CausalVideoModel(CONFIG)
    ours.load_state_dict(weights)
    path = saved(tmp_path / "w.pt", {"generator_ema": prefixed(weights, "model.")})
    loaded = load_pretrained(path, **SAID)
    assert not loaded.training
    x, t, text = torch.randn(1, 4, 3, 4, 6), torch.full((1, 3), 500.0), torch.randn(1, 5, 8)

    def run(model):
        return model(x, t, model.encode_text(text), lambda layer, q, k, v: v)

    with torch.no_grad():
        assert torch.equal(run(loaded), run(ours))
        half = load_pretrained(path, dtype=torch.bfloat16, **SAID)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        assert (run(half) - run(ours)).abs().max() < 0.1 * run(ours).abs().max()


def test_the_model_does_not_depend_on_its_file_any_more(tmp_path, weights):
    path = saved(tmp_path / "w.pt", weights)
    loaded = load_pretrained(path, **SAID)
    content = path.read_bytes()
    with open(path, "r+b") as file:  # in place: a mapping of the file would see it
        file.write(bytes(len(content)))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())


def test_converted_file_carries_everything(tmp_path, weights):
    path = saved(tmp_path / "w.pt", {"generator": prefixed(weights, "model.")})
    out = tmp_path / "new" / "ours.safetensors"
    convert(read_pretrained(path, memory="released", **SAID), out, torch.bfloat16)
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    read = read_pretrained(out)
    assert (read.config, read.layout, read.memory) == (CONFIG, "our", "released")
    for name, tensor in load_file(out).items():
        assert torch.equal(tensor, weights[name].bfloat16())
    assert load_checkpoint(out).config == CONFIG
    assert str(tmp_path).encode() not in out.read_bytes()


def test_a_converted_file_says_for_which_positions_it_was_tuned(tmp_path, weights):
    path, out, again = saved(tmp_path / "w.pt", weights), tmp_path / "ours.safetensors", tmp_path / "again.safetensors"
    assert read_pretrained(path, **SAID).positions == "absolute"
    convert(read_pretrained(path, positions="bounded", **SAID), out)
    assert read_pretrained(out).positions == "bounded"
    assert read_pretrained(out, positions="absolute").positions == "absolute"
    convert(read_pretrained(out), again)
    assert read_pretrained(again).positions == "bounded"


def test_toy_checkpoints_are_read_too():
    model = load_pretrained("model/weights/toy.safetensors")
    assert model.config == load_checkpoint(TOY_WEIGHTS).config and model.config.prediction == "x0"


@pytest.mark.parametrize(
    ("path", "memory"),
    [
        ("MemFlow/base.pt", "released"),
        ("weights/memflow_base.safetensors", "released"),
        ("weights/memflow-ops/base.pt", "memflow"),
        ("LongLive/base.pt", "memflow"),
        ("Memflow", "released"),
    ],
)
def test_name_of_a_released_checkpoint(tmp_path, path, memory):
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix:
        file.touch()
    else:
        file.mkdir()
    assert tuned_for(file) == memory


def test_names_translate_both_ways():
    for ours in CausalVideoModel(CONFIG).state_dict():
        assert original_name(diffusers_name(ours)) == ours
        assert bare_name(f"model._fsdp_wrapped_module.{ours}") == ours


# ----------------------------------------------------------------------------------------------------------------- LoRA


def make_lora(weights, rank=3, layers=("self_attn.q", "cross_attn.o", "ffn.0"), prefix="base_model.model.", name=""):
    generator = torch.Generator().manual_seed(5)
    lora = {}
    for block in range(CONFIG.num_layers):
        for layer in layers:
            out, into = weights[f"blocks.{block}.{layer}.weight"].shape
            module = f"{prefix}blocks.{block}.{layer}"
            lora[f"{module}.lora_A{name}.weight"] = torch.randn(rank, into, generator=generator)
            lora[f"{module}.lora_B{name}.weight"] = torch.randn(out, rank, generator=generator)
    return lora


def expected_with(weights, lora, scale):
    """In float64, from the definition."""
    after = {name: tensor.double() for name, tensor in weights.items()}
    for name, a in lora.items():
        if ".lora_A" in name:
            module, rest = name.split(".lora_A")
            after[bare_name(module) + ".weight"] += scale * lora[f"{module}.lora_B{rest}"].double() @ a.double()
    return after


def close(read, expected):
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert (tensor - expected[name]).abs().max() <= 1e-5, name


def adapter_config(path, **said):
    path.write_text(json.dumps({"peft_type": "LORA", "bias": "none", **said}))


LORA_CASES = {
    # writes the LoRA and returns (the path, the scale that it states)
    "bare pt, no alpha": lambda path, lora: (saved(path / "lora.pt", lora), 1),
    "generator_lora": lambda path, lora: (saved(path / "lora.pt", {"generator_lora": lora, "critic_lora": {}}), 1),
    "peft folder": lambda path, lora: (
        saved(path / "adapter_model.safetensors", lora),
        adapter_config(path / "adapter_config.json", r=3, lora_alpha=12),
        (path, 4),
    )[-1],
    "rank-stabilised": lambda path, lora: (
        saved(path / "adapter_model.safetensors", lora),
        adapter_config(path / "adapter_config.json", r=3, lora_alpha=12, use_rslora=True),
        (path / "adapter_model.safetensors", 12 / 3**0.5),
    )[-1],
    "alpha in the file": lambda path, lora: (
        saved(
            path / "lora.safetensors",
            lora | {name.split(".lora_A")[0] + ".alpha": torch.tensor(6.0) for name in lora if "lora_A" in name},
        ),
        2,
    ),
}


@pytest.mark.parametrize("write", LORA_CASES.values(), ids=LORA_CASES.keys())
def test_lora_is_merged(tmp_path, weights, write):
    base = saved(tmp_path / "base.pt", {"generator": prefixed(weights, "model.")})
    (tmp_path / "lora").mkdir()
    lora = make_lora(weights)
    path, scale = write(tmp_path / "lora", lora)
    read = read_pretrained(base, lora=path, **SAID)
    close(read.weights, expected_with(weights, lora, scale))
    assert "6 layers, rank 3" in read.lora and f"scale {scale:g}" in read.lora


def test_alpha_that_is_given_wins(tmp_path, weights):
    base, lora = saved(tmp_path / "base.pt", weights), make_lora(weights)
    saved(tmp_path / "adapter_model.safetensors", lora)
    adapter_config(tmp_path / "adapter_config.json", r=3, lora_alpha=12)
    read = read_pretrained(base, lora=tmp_path / "adapter_model.safetensors", lora_alpha=1.5, **SAID)
    close(read.weights, expected_with(weights, lora, 0.5))
    assert "alpha given" in read.lora


def test_patterns_of_an_adapter_config(tmp_path, weights):
    base = saved(tmp_path / "base.safetensors", weights)
    lora = make_lora(weights)
    saved(tmp_path / "adapter_model.safetensors", lora)
    adapter_config(tmp_path / "adapter_config.json", r=3, lora_alpha=3, alpha_pattern={"ffn.0": 30})
    expected = expected_with(weights, {k: v for k, v in lora.items() if "ffn" not in k}, 1)
    expected |= {k: v for k, v in expected_with(weights, lora, 10).items() if "ffn.0" in k}
    close(read_pretrained(base, lora=tmp_path / "adapter_model.safetensors", **SAID).weights, expected)


def test_lora_that_training_left_in_the_checkpoint(tmp_path, weights):
    """peft's own state dict, with the name of its adapter; and a LoRA filed beside its base."""
    lora = make_lora(weights, prefix="", name=".default")
    layered = {
        name.replace(".q.", ".q.base_layer.") if "self_attn" in name else name: tensor
        for name, tensor in weights.items()
    }
    state = prefixed(layered | lora, "base_model.model.")
    close(read_pretrained(saved(tmp_path / "a.pt", state), **SAID).weights, expected_with(weights, lora, 1))
    beside = saved(tmp_path / "b.pt", {"generator": weights, "generator_lora": make_lora(weights)})
    close(read_pretrained(beside, **SAID).weights, expected_with(weights, make_lora(weights), 1))


def test_merging_rounds_once(tmp_path, weights):
    half = {name: tensor.bfloat16() for name, tensor in weights.items()}
    base, lora = saved(tmp_path / "w.safetensors", half), make_lora(weights)
    read = read_pretrained(base, lora=saved(tmp_path / "lora.pt", lora), **SAID).weights
    for name, exact in expected_with(half, lora, 1).items():
        assert read[name].dtype == torch.bfloat16
        bound = exact.abs() * 2**-8 + 1e-6
        assert ((read[name].double() - exact).abs() <= bound).all(), name


def without(name):
    return lambda lora: lora.pop(name)


Q = "base_model.model.blocks.0.self_attn.q"
BAD_LORAS = {
    "half a pair": (without(f"{Q}.lora_B.weight"), rf"missing {Q}.lora_B.weight"),
    "another model's": (lambda lora: lora.update({
        "base_model.model.blocks.7.ffn.0.lora_A.weight": torch.zeros(3, 24),
        "base_model.model.blocks.7.ffn.0.lora_B.weight": torch.zeros(40, 3),
    }), "blocks.7.ffn.0 is not in the model"),
    "another width": (lambda lora: lora.update({
        f"{Q}.lora_A.weight": torch.zeros(3, 25),
    }), r"blocks.0.self_attn.q has a weight \(24, 24\), the LoRA's is \(24, 25\)"),
    "ranks differ": (lambda lora: lora.update({f"{Q}.lora_A.weight": torch.zeros(2, 24)}), r"lora_A \(2, 24\)"),
    "a magnitude too few": (
        lambda lora: lora.update({f"{Q}.lora_magnitude_vector": torch.zeros(23)}), "are no magnitudes of 24 rows"
    ),
    "nothing of the kind": (lambda lora: [lora.clear(), lora.update(x=torch.zeros(1))], "no LoRA"),
    "two adapters": (lambda lora: lora.update({f"{Q}.lora_A.b.weight": torch.zeros(3, 24)}), "several adapters"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_LORAS.values(), ids=BAD_LORAS.keys())
def test_lora_that_does_not_fit_is_refused(tmp_path, weights, change, message):
    base, lora = saved(tmp_path / "w.safetensors", weights), make_lora(weights)
    change(lora)
    with pytest.raises(ValueError, match=message):
        read_pretrained(base, lora=saved(tmp_path / "lora.pt", lora), **SAID)


@pytest.mark.parametrize("said", [{"use_dora": True}, {"bias": "all"}, {"r": 4}], ids=str)
def test_adapter_config_that_says_otherwise_is_refused(tmp_path, weights, said):
    base = saved(tmp_path / "w.safetensors", weights)
    saved(tmp_path / "adapter_model.safetensors", make_lora(weights))
    adapter_config(tmp_path / "adapter_config.json", lora_alpha=3, **said)
    with pytest.raises(ValueError, match=next(iter(said)) if "r" not in said else "has rank 3, by its config 4"):
        read_pretrained(base, lora=tmp_path / "adapter_model.safetensors", **SAID)


def test_a_lora_is_no_checkpoint(tmp_path, weights):
    path = saved(tmp_path / "lora.pt", {"generator_lora": make_lora(weights)})
    with pytest.raises(ValueError, match=r"only a LoRA.*--lora"):
        read_pretrained(path, **SAID)


# ------------------------------------------------------------------------------------------------------------ bad files

BAD_WEIGHTS = {
    "missing": (without("blocks.1.norm3.bias"), r"missing model.blocks.1.norm3.bias \(24,\)"),
    "missing block": (
        lambda w: [w.pop(name) for name in list(w) if name.startswith("blocks.0.self_attn")],
        r"missing model.blocks.0.self_attn.k.weight \(24, 24\)",
    ),
    "unexpected": (
        lambda w: w.update({"img_emb.proj.0.bias": torch.zeros(3)}),
        r"unexpected model.img_emb.proj.0.bias",
    ),
    "shape": (
        lambda w: w.update({"head.modulation": torch.zeros(1, 3, 24)}),
        r"model.head.modulation has shape \(1, 3, 24\), expected \(1, 2, 24\)",
    ),
    "rank": (lambda w: w.update({"patch_embedding.weight": torch.zeros(24, 16)}), "patch_embedding.weight must have 5"),
    "another model": (
        lambda w: [w.clear(), w.update(conv=torch.zeros(1))],
        "missing patch_embedding.weight.*first.*conv",
    ),
    "quantised": (
        lambda w: w.update({"head.head.weight": torch.zeros(16, 24, dtype=torch.int8)}),
        r"model.head.head.weight \(torch.int8\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_weights_that_do_not_fit_are_named_as_in_the_file(tmp_path, weights, change, message):
    changed = dict(weights)
    change(changed)
    with pytest.raises(ValueError, match=message):
        read_pretrained(saved(tmp_path / "w.pt", {"generator_ema": prefixed(changed, "model.")}), **SAID)


def test_one_weight_under_two_names_is_refused(tmp_path, weights):
    doubled = {**weights, "model.head.head.bias": weights["head.head.bias"] + 1}
    with pytest.raises(ValueError, match=r"head.head.bias and model.head.head.bias are both"):
        read_pretrained(saved(tmp_path / "w.pt", doubled), **SAID)


def test_unknown_heads_are_asked_for(tmp_path, weights):
    with pytest.raises(ValueError, match="--num-heads"):
        read_pretrained(saved(tmp_path / "w.safetensors", weights))
    with pytest.raises(ValueError, match="num_heads times an even number"):
        read_pretrained(saved(tmp_path / "w.safetensors", weights), num_heads=7)


def test_config_that_contradicts_the_shapes_is_refused(tmp_path, weights):
    folder = write_folder(tmp_path / "Wan", weights, **{**ORIGINAL_CONFIG, "ffn_dim": 41})
    with pytest.raises(ValueError, match="ffn_dim is 41, by the shapes 40"):
        read_pretrained(folder)
    folder = write_folder(tmp_path / "diffusers", weights, num_attention_heads=2, attention_head_dim=16)
    with pytest.raises(ValueError, match="2 heads of 16, by the shapes the width is 24"):
        read_pretrained(folder)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))], ids=["torch", "pickle"]
)
def test_nothing_in_a_file_is_run(tmp_path, weights, save):
    save({"generator": weights, "config": Trap(tmp_path / "caught")}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="could run code") as refused:
        read_pretrained(tmp_path / "w.pt", **SAID)
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "caught").exists()


def test_files_that_hold_no_weights(tmp_path, weights):
    (tmp_path / "w.pt").write_text("hello")
    (tmp_path / "w.safetensors").write_text("hello, this is no tensor")
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "list.pt", [torch.zeros(1)])
    saved(tmp_path / "steps.pt", {"optimizer": {"step": 3}})
    cut = saved(tmp_path / "cut.safetensors", weights)
    cut.write_bytes(cut.read_bytes()[:-100])
    torch.save(weights, tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-2000])
    for name, message in {
        "w.pt": "w.pt",
        "w.safetensors": "not a safetensors file",
        "list.pt": "state dict, got list",
        "steps.pt": "optimizer must be a tensor",
        "cut.safetensors": "cut.safetensors",
        "cut.pt": "cut.pt",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_pretrained(tmp_path / name, **SAID)
    for name in ("empty", "nothing.pt"):
        with pytest.raises(FileNotFoundError, match=name):
            read_pretrained(tmp_path / name, **SAID)


def test_shards_that_do_not_fit_their_index(tmp_path, weights):
    folder = write_folder(tmp_path / "Wan", weights, 2)
    index, shard = next(folder.glob("*.json")), sorted(folder.glob("*.safetensors"))[0]
    listed, content = json.loads(index.read_text()), load_file(shard)
    name = sorted(content)[0]
    save_file({k: v for k, v in content.items() if k != name}, shard)
    with pytest.raises(ValueError, match=rf"{shard.name} does not hold .* missing {name}"):
        read_pretrained(folder, **SAID)
    save_file(content | {"extra": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match="unexpected extra"):
        read_pretrained(folder, **SAID)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        read_pretrained(folder, **SAID)
    listed["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="outside its folder"):
        read_pretrained(folder, **SAID)
    index.unlink()
    save_file(content, folder / "a.safetensors")
    with pytest.raises(ValueError, match="more than one set"):
        read_pretrained(folder, **SAID)


def test_our_own_file_without_a_usable_config(tmp_path, weights):
    save_checkpoint(tmp_path / "w.safetensors", weights, CONFIG, {})
    file = load_file(tmp_path / "w.safetensors")
    save_file(file, tmp_path / "w.safetensors", {"config": '{"width": 3}'})
    with pytest.raises(ValueError, match="cannot be used"):
        read_pretrained(tmp_path / "w.safetensors")
