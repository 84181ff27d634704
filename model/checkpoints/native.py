"""Our own checkpoints: one safetensors file with the model's configuration in its metadata."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from memflow_ops.files import replacing
from memflow_ops.model.checkpoints.containers import read_safetensors, some
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig
from memflow_ops.ops.checks import FLOATS


def save_checkpoint(
    path: Path, weights: Mapping[str, Tensor], config: ModelConfig, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes weights (a state dict of `CausalVideoModel(config)`) and config to one safetensors file, atomically.

    metadata: further entries for the file's metadata.
    """
    write_safetensors(path, weights, {**(metadata or {}), "config": json.dumps(dataclasses.asdict(config))})


def write_safetensors(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors to a safetensors file, atomically. Those that share memory are written each as a whole."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, weight in weights.items():
        tensor = weight.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if memory in seen else tensor  # the library refuses shared memory
        seen.add(memory)
    with replacing(Path(path)) as temporary:
        try:
            save_file(tensors, temporary, dict(metadata))
        except SafetensorError as error:  # for example, if the disk is full
            raise OSError(f"cannot write {path}: {error}") from error


def load_checkpoint(path: Path, device: str | torch.device = "cpu") -> CausalVideoModel:
    """The model of a checkpoint that `save_checkpoint` wrote, in eval mode, on `device`. `load_pretrained` reads the
    checkpoints of other projects.

    A FileNotFoundError if there is no file. A ValueError if the file is no such checkpoint, or if its tensors are not
    exactly the model's: missing, unexpected or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; `memflow toy train` makes them")
    weights, metadata = read_safetensors(path)
    model = empty_model(config_of(metadata, str(path)))
    check_state_dict(model, weights, str(path))
    check_dtypes(weights, str(path))
    return fill_model(model, weights, None, device)


def empty_model(config: ModelConfig) -> CausalVideoModel:
    """A model on the meta device, which spares initial values for billions of weights that will be replaced."""
    with torch.device("meta"):
        return CausalVideoModel(config)


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether this is the metadata of a file that `save_checkpoint` wrote: other programs have a "config" too."""
    fields = dataclasses.fields(ModelConfig)
    required = {field.name for field in fields if field.default is dataclasses.MISSING}
    return required <= stated_config(metadata).keys() <= {field.name for field in fields}


def stated_config(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration in a file's metadata, whosever it is; {} if it is no JSON object."""
    try:
        config = json.loads(metadata.get("config", ""))
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def config_of(metadata: Mapping[str, str], source: str) -> ModelConfig:
    """The configuration in the metadata of one of our checkpoints; a ValueError if there is none."""
    if "config" not in metadata:
        raise ValueError(f"{source} carries no model configuration in its metadata; expected a 'config' entry")
    try:
        return ModelConfig(**json.loads(metadata["config"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source} carries a model configuration that cannot be used: {error}") from error


def fill_model(
    model: CausalVideoModel,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> CausalVideoModel:
    """Gives a model, which may be on the meta device, these weights on `device`, and sets it to eval mode. Weights that
    have the right dtype and device already are shared.

    dtype: of the weights; None keeps each weight's own.
    """
    own = {name: tensor.to(device, dtype or tensor.dtype) for name, tensor in weights.items()}
    model.load_state_dict(own, assign=True)
    return model.eval()


def check_state_dict(
    model: CausalVideoModel, weights: Mapping[str, Tensor], source: str, name_in_source: Callable[[str], str] = str
) -> None:
    """A ValueError that names every tensor which is missing, unexpected or of the wrong shape.

    name_in_source: maps our name of a tensor to the name in the source.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    missing = [f"missing {name_in_source(name)} {shape}" for name, shape in expected.items() if name not in got]
    unexpected = [f"unexpected {name_in_source(name)} {shape}" for name, shape in got.items() if name not in expected]
    wrong = [
        f"{name_in_source(name)} has shape {got[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in got and got[name] != shape
    ]
    problems = [some(kind) for kind in (missing, unexpected, wrong) if kind]
    if problems:
        raise ValueError(f"{source} does not fit the model: {'; '.join(problems)}")


def check_dtypes(weights: Mapping[str, Tensor], source: str, name_in_source: Callable[[str], str] = str) -> None:
    """A ValueError that names every weight in a dtype that the model cannot compute in, such as integers."""
    odd = [f"{name_in_source(name)} ({tensor.dtype})" for name, tensor in weights.items() if tensor.dtype not in FLOATS]
    if odd:
        raise ValueError(f"{source}: weights must be in {', '.join(map(str, FLOATS))}, got {some(odd)}")


def check_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """A ValueError that names every tensor with infinities or NaN, because one such number would spoil every frame."""
    flags = [torch.stack(tensor.aminmax()).isfinite().all() for tensor in weights.values() if tensor.numel()]
    names = [name for name, tensor in weights.items() if tensor.numel()]
    finite = torch.stack(flags).tolist() if flags else []
    broken = [name for name, good in zip(names, finite, strict=True) if not good]
    if broken:
        raise ValueError(f"{source} has weights that are not finite numbers: {some(broken)}")
