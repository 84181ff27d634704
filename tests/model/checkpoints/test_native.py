"""Weights survive a round trip; files that do not fit are refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from memflow_ops.model.checkpoints.native import load_checkpoint, save_checkpoint
from memflow_ops.model.toy import checkpoint
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CONFIG = ModelConfig(dim=16, ffn_dim=8, num_heads=2, num_layers=1, in_dim=5, out_dim=3, text_dim=4, text_len=2)


@pytest.fixture
def model() -> CausalVideoModel:
    torch.manual_seed(0)
    return CausalVideoModel(CONFIG)


def test_round_trip(tmp_path, model):
    path = tmp_path / "folder" / "weights.safetensors"
    save_checkpoint(path, model.state_dict(), CONFIG)
    loaded = load_checkpoint(path)
    assert loaded.config == CONFIG and not loaded.training
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert [file.name for file in path.parent.iterdir()] == ["weights.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.0.self_attn.q.bias"), r"missing blocks.0.self_attn.q.bias \(16,\)"),
        (lambda w: w.update(extra=torch.zeros(3)), r"unexpected extra \(3,\)"),
        (lambda w: w.update({"head.head.bias": torch.zeros(5)}), r"head.head.bias has shape \(5,\), expected \(12,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, model, change, message):
    weights = dict(model.state_dict())
    change(weights)
    save_checkpoint(tmp_path / "w.safetensors", weights, CONFIG)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "w.safetensors")


def test_loading_makes_no_initial_values(tmp_path, model):
    """Which would be held beside the weights, and would take numbers from the generator of whoever loads."""
    save_checkpoint(tmp_path / "w.safetensors", model.state_dict(), CONFIG)
    state = torch.get_rng_state()
    load_checkpoint(tmp_path / "w.safetensors")
    assert torch.equal(torch.get_rng_state(), state)


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="memflow toy train"):
        load_checkpoint(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_checkpoint(tmp_path / "text.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="no model configuration"):
        load_checkpoint(tmp_path / "bare.safetensors")


def test_shipped_weights_load_and_are_small():
    model = load_checkpoint(TOY_WEIGHTS)
    assert checkpoint.TOY_WEIGHTS.stat().st_size < 3_000_000
    assert model.config.prediction == "x0"
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    notes = json.loads(checkpoint.TOY_WEIGHTS.with_suffix(".json").read_text())
    assert notes["seconds"] < 3 * 3600 and notes["threads"] <= 2
