"""Weights as safetensors, with the model's configuration in the file's metadata."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from memflow_ops.model.transformer import CausalVideoModel, ModelConfig

TOY_WEIGHTS = Path(__file__).parent / "weights" / "toy.safetensors"
"""The toy world's trained weights, shipped with the package."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new one, never a part.

    The temporary file lies beside the target, because only inside one file system is a rename atomic.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, weights: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Writes weights (a state dict of `CausalVideoModel(config)`) and config to one safetensors file, atomically."""
    metadata = {"config": json.dumps(dataclasses.asdict(config))}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(Path(path), save(tensors, metadata))


def load_checkpoint(path: Path = TOY_WEIGHTS, device: str | torch.device = "cpu") -> CausalVideoModel:
    """The model of a checkpoint, in eval mode, on `device`.

    FileNotFoundError when there is no file; ValueError when it is no checkpoint of ours, or when its tensors are not
    exactly the model's: missing, unexpected or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; `memflow train` makes them")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if "config" not in metadata:
        raise ValueError(f"{path} carries no model configuration in its metadata; expected a 'config' entry")
    model = CausalVideoModel(ModelConfig(**json.loads(metadata["config"])))
    check_state_dict(model, weights, str(path))
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def check_state_dict(model: CausalVideoModel, weights: Mapping[str, Tensor], source: str) -> None:
    """A ValueError that names every tensor which is missing, unexpected or of the wrong shape."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in got]
    problems += [f"unexpected {name} {shape}" for name, shape in got.items() if name not in expected]
    problems += [
        f"{name} has shape {got[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in got and got[name] != shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}")
