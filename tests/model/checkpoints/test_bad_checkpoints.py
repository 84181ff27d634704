"""Damaged weights and LoRAs, and files that cannot be written: said in one line, and nothing is left behind."""

import json
from pathlib import Path

import pytest
import torch
from command_line import memflow
from safetensors.torch import save_file

from memflow_ops.model.checkpoints import native
from memflow_ops.model.checkpoints.lora import LoraConfig
from memflow_ops.model.checkpoints.pretrained import convert, read_pretrained
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CONFIG = ModelConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
)
SAID = {"num_heads": 2, "text_len": 6}


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return {name: torch.randn_like(tensor) for name, tensor in CausalVideoModel(CONFIG).state_dict().items()}


@pytest.fixture
def file(tmp_path, weights) -> Path:
    torch.save(weights, tmp_path / "w.pt")
    return tmp_path / "w.pt"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_named(tmp_path, weights, value):
    weights["head.head.weight"][3, 2] = value
    torch.save(weights, tmp_path / "w.pt")
    read = read_pretrained(tmp_path / "w.pt", **SAID)
    with pytest.raises(
        ValueError, match=r"w.pt in torch.float32 has weights that are not finite .*: head.head.weight$"
    ):
        read.build()
    with pytest.raises(ValueError, match=r"not finite numbers: head.head.weight$"):
        convert(read, tmp_path / "ours.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_weights_that_a_dtype_cannot_hold_are_named(tmp_path, weights):
    weights["blocks.0.ffn.0.bias"][0] = 1e5
    torch.save(weights, tmp_path / "w.pt")
    read = read_pretrained(tmp_path / "w.pt", **SAID)
    for call in (lambda: read.build(torch.float16), lambda: convert(read, tmp_path / "o.safetensors", torch.float16)):
        with pytest.raises(ValueError, match=r"in torch.float16 has weights .*: blocks.0.ffn.0.bias$"):
            call()
    assert read.build(torch.bfloat16).blocks[0].ffn[0].bias[0] == torch.tensor(1e5, dtype=torch.bfloat16)


@pytest.mark.parametrize("kept", [0, 5, 3000, -1], ids=lambda n: f"{n}-bytes")
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_a_file(tmp_path, weights, capfd, kept, suffix):
    whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    if suffix == ".pt":
        torch.save(weights, whole)
    else:
        save_file(weights, whole)
    half.write_bytes(whole.read_bytes()[:kept])
    assert memflow("convert", half, tmp_path / "ours.safetensors", "--num-heads", 2) == 2
    said = capfd.readouterr().err
    assert str(half) in said and "or not all of one" in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [half, whole]


BAD_CONFIGS = {
    "list": ([], "must hold a JSON object, got list"),
    "alpha is a word": ({"lora_alpha": "eight"}, "lora_alpha must be a number, got 'eight'"),
    "rank is true": ({"r": True}, "r must be a number, got True"),
    "patterns are a list": ({"alpha_pattern": ["q"]}, "alpha_pattern must map patterns of names to numbers"),
    "no pattern": ({"rank_pattern": {"(": 4}}, "rank_pattern must map patterns of names to numbers"),
    "pattern to a word": ({"alpha_pattern": {"q": "4"}}, r"alpha_pattern\['q'\] must be a number, got '4'"),
}


@pytest.mark.parametrize(("said", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_adapter_config_of_another_form(said, message):
    with pytest.raises(ValueError, match=f"here:? {message}"):
        LoraConfig.from_json(said, "here")


@pytest.mark.parametrize("where", ["option", "config", "file"])
def test_alpha_that_is_no_number(tmp_path, file, where):
    a, b = torch.randn(4, 24), torch.randn(24, 4)
    lora = {"blocks.0.self_attn.q.lora_A.weight": a, "blocks.0.self_attn.q.lora_B.weight": b}
    if where == "file":
        lora["blocks.0.self_attn.q.alpha"] = torch.tensor(torch.nan)
    if where == "config":
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": torch.inf}))
    save_file(lora, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the alpha of blocks.0.self_attn.q must be a finite number, got (nan|inf)"):
        read_pretrained(
            file,
            lora=tmp_path / "adapter_model.safetensors",
            lora_alpha=torch.nan if where == "option" else None,
            **SAID,
        )


def test_an_alpha_without_a_lora_is_refused(file):
    with pytest.raises(ValueError, match=r"lora_alpha=4 is given .* holds no LoRA"):
        read_pretrained(file, lora_alpha=4, **SAID)


def test_what_our_own_file_says_is_not_overridden(tmp_path, file):
    ours = tmp_path / "ours.safetensors"
    convert(read_pretrained(file, **SAID), ours)
    assert read_pretrained(ours, **SAID).config == CONFIG
    for name in SAID:
        with pytest.raises(ValueError, match=f"says itself that {name} is {SAID[name]}, got 4"):
            read_pretrained(ours, **{name: 4})


def test_a_full_disk(tmp_path, file, capfd, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"a part")
        raise native.SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr(native, "save_file", full)
    assert memflow("convert", file, tmp_path / "ours.safetensors", "--num-heads", 2) == 2
    said = capfd.readouterr().err
    assert "ours.safetensors: Error while serializing: No space" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


def test_places_that_cannot_be_written_to_are_refused_before_reading(tmp_path, file, capfd):
    for out, says in (
        ("/proc/x.safetensors", "cannot write to the folder /proc"),
        (file / "x.safetensors", "is a file"),
    ):
        assert memflow("convert", tmp_path / "not there", out) == 2
        assert says in capfd.readouterr().err
