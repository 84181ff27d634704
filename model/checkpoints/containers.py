"""Reads the files in which weights are kept: safetensors, folders of them, and torch's .pt. No code in a file is run.

Whatever is wrong with a file is a ValueError that names it; a missing file is a FileNotFoundError.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_PARTS = ("generator_ema", "generator", "model", "state_dict")
"""Entries of a .pt under which training code keeps the generator's weights; averaged weights are preferred."""
_LORA_PART = "generator_lora"


@dataclass(frozen=True)
class WeightFile:
    """The content of a file or folder of weights."""

    path: Path
    """The file, or the folder that its shards lie in."""
    tensors: Mapping[str, Tensor]
    """On the CPU, under the file's own names."""
    lora: Mapping[str, Tensor] = field(default_factory=dict)
    """The entry `generator_lora` of a .pt."""
    part: str = ""
    """The entry of a .pt that the tensors come from."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata of a safetensors file."""
    stated: Mapping[str, Any] = field(default_factory=dict)
    """The config.json of a model's folder."""
    mapped: bool = False
    """Whether the tensors are memory-mapped views of the file, which must then not change while they are used."""


def read_weights(path: Path, names: tuple[str, ...] = ("diffusion_pytorch_model",)) -> WeightFile:
    """Reads a .safetensors file, a .pt (any other suffix), a model's folder, or a pipeline's with `transformer/` in it.

    names: of the safetensors file to take from a folder, without suffix, in order of preference.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path / "transformer" if (path / "transformer").is_dir() else path, names)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        tensors, metadata = read_safetensors(path)
        stated = _stated(path.parent) if path.stem in names else {}
        return WeightFile(path, tensors, metadata=metadata, stated=stated)
    return _read_pt(path)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or not all of one: {error}") from error


def _read_folder(folder: Path, names: tuple[str, ...]) -> WeightFile:
    """Reads the preferred or only safetensors file of a folder, or the shards that its index lists."""
    stated = _stated(folder)
    indices = sorted(folder.glob("*.safetensors.index.json"))
    files = sorted(folder.glob("*.safetensors"))
    preferred = [file for name in names for file in files if file.stem == name]
    if preferred or (len(files) == 1 and not indices):
        tensors, metadata = read_safetensors((preferred or files)[0])
        return WeightFile(folder, tensors, metadata=metadata, stated=stated)
    if len(indices) == 1:
        return WeightFile(folder, _read_shards(indices[0]), stated=stated)
    if indices or files:
        found = ", ".join(file.name for file in [*indices, *files])
        raise ValueError(f"{folder} holds more than one set of weights, or shards without their index: {found}")
    raise FileNotFoundError(f"no .safetensors file in the folder {folder}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Reads all tensors that the index lists, from the files beside it."""
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} has no weight_map from weights to files")
    outside = sorted({name for name in listed.values() if Path(name).name != name})
    if outside:
        raise ValueError(f"{index} lists files outside its folder: {', '.join(outside)}")
    absent = sorted({name for name in listed.values() if not (index.parent / name).is_file()})
    if absent:
        raise FileNotFoundError(f"{index} lists files that are not there: {', '.join(absent)}")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(listed.values())):
        found, _ = read_safetensors(index.parent / shard)
        missing = sorted(name for name, file in listed.items() if file == shard and name not in found)
        unexpected = sorted(name for name in found if listed.get(name) != shard)
        if missing or unexpected:
            words = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected]
            raise ValueError(f"{index.parent / shard} does not hold what {index.name} says: {'; '.join(words)}")
        tensors |= found
    return tensors


def _stated(folder: Path) -> dict[str, Any]:
    """The folder's config.json; {} without one."""
    path = folder / "config.json"
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(said).__name__}")
    return said


def _read_pt(path: Path) -> WeightFile:
    """Reads a file of torch.save. Only tensors and plain containers are unpickled, because anything else could run
    code."""
    mapped = zipfile.is_zipfile(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # The message of torch recommends to load the file unsafely, so only its line about the object is kept.
        what = next((line for line in str(error).splitlines() if "GLOBAL" in line), "").strip()
        raise ValueError(
            f"{path} is no file of torch.save, or holds more than tensors, which is not loaded because it could run "
            f"code; save its state dict alone {what}".strip()
        ) from error
    except Exception as error:  # the unpickler raises errors of any type for a file that is no pickle
        raise ValueError(
            f"{path} is not a file of torch.save, or not all of one: {type(error).__name__} {error}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} must hold a state dict, got {type(loaded).__name__}")
    lora = loaded.get(_LORA_PART) or {}
    part = next((name for name in _PARTS if isinstance(loaded.get(name), Mapping) and loaded[name]), "")
    weights = loaded[part] if part else ({} if _LORA_PART in loaded else loaded)
    for name, value in {**weights, **lora}.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {part + ': ' if part else ''}{name} must be a tensor, got {type(value).__name__}; a "
                f"state dict is looked for under {', '.join(_PARTS)}, else at the top"
            )
    return WeightFile(path, dict(weights), lora=dict(lora), part=part, mapped=mapped)
