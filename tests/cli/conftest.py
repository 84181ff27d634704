"""Weights for the command: the shipped ones, or random ones where there are none."""

from pathlib import Path

import pytest
import torch

from memflow_ops.model.checkpoints.native import save_checkpoint
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.toy.schedule import TOY_CONFIG
from memflow_ops.model.wan.transformer import CausalVideoModel


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    if TOY_WEIGHTS.is_file():
        return TOY_WEIGHTS
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    torch.manual_seed(0)
    save_checkpoint(path, CausalVideoModel(TOY_CONFIG).state_dict(), TOY_CONFIG)
    return path
