"""Loading the toy world's model."""

from pathlib import Path

import torch

from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.toy.language import TEXT_DIM
from memflow_ops.model.wan.transformer import CausalVideoModel

TOY_WEIGHTS = Path(__file__).parents[1] / "weights" / "toy.safetensors"
"""The toy world's trained weights, shipped with the package."""


def load_model(weights: Path, device: torch.device) -> CausalVideoModel:
    """The model in a file of weights.

    Raises a FileNotFoundError where there is no file, and a ValueError where it is damaged or of another world.
    """
    model = load_checkpoint(weights, device)
    config = model.config
    if config.out_dim != 3 or config.text_dim != TEXT_DIM:
        raise ValueError(
            f"{weights} is no model of the toy world: expected 3 channels (RGB) and a vocabulary of {TEXT_DIM} words, "
            f"got {config.out_dim} channels and {config.text_dim} words"
        )
    return model
