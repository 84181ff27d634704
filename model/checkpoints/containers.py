"""Reads the files in which weights are kept: safetensors, folders of them, and torch's .pt. No code in a file is run.

The tensors have memory of their own: what happens to a file after it has been read changes nothing. What a file is, its
content tells and not its name. Whatever is wrong with a file is a ValueError that names it; a missing file is a
FileNotFoundError.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

EMA, PLAIN = "generator_ema", "generator"
"""Entries of a .pt of training: the averaged weights and those of the last step."""
_PARTS = (EMA, PLAIN, "model", "state_dict")
"""Entries of a .pt under which training code keeps the generator's weights."""
_LORA_PART = "generator_lora"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of safetensors that are read here; tensors of others are copied by the library."""
_POINTER = re.compile(rb"version https?://\S+/spec/v1\b.*?^size (\d+)$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class WeightFile:
    """The content of a file or folder of weights."""

    path: Path
    """The file, or the folder that its shards lie in."""
    tensors: Mapping[str, Tensor]
    """On the CPU, under the file's own names, each with memory of its own."""
    lora: Mapping[str, Tensor] = field(default_factory=dict)
    """The entry `generator_lora` of a .pt."""
    part: str = ""
    """The entry of a .pt that the tensors come from."""
    other_part: str = ""
    """`EMA` or `PLAIN`, where the .pt holds this too and it was not taken."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The metadata of a safetensors file."""
    stated: Mapping[str, Any] = field(default_factory=dict)
    """The config.json of a model's folder."""


def some(words: Sequence[str], most: int = 20) -> str:
    """A list in words, cut after `most` entries."""
    more = [f"and {len(words) - most} more"] if len(words) > most else []
    return "; ".join([*words[:most], *more])


def read_weights(
    path: Path,
    names: tuple[str, ...] = ("diffusion_pytorch_model",),
    ema: bool | None = None,
    prefer_ema: bool = True,
) -> WeightFile:
    """Reads a safetensors file, a file of torch.save, a model's folder, or a pipeline's with `transformer/` in it.

    names: of the safetensors file to take from a folder, without suffix, in order of preference.
    ema: whether to take the averaged weights of a .pt or those of the last step; a ValueError if it lacks them. None:
        what there is, and where both are, `prefer_ema` decides.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path / "transformer" if (path / "transformer").is_dir() else path, names)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if is_safetensors(path):
        tensors, metadata = read_safetensors(path)
        stated = _stated(path.parent) if path.stem in names else {}
        return WeightFile(path, tensors, metadata=metadata, stated=stated)
    return _read_pt(path, ema, prefer_ema)


# ---------------------------------------------------------------------------------------------- what kind of file it is


def is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors and not of torch.save, by its content; where that tells nothing, by its name. A
    ValueError for a file that only stands for another; see `refuse_pointer`."""
    refuse_pointer(path)
    with open(path, "rb") as file:
        start = file.read(9)
    if start[5:] == b"\0\0\0{":  # the header's length, less than 2^40, and the brace that opens it
        return True
    if start[:4] == b"PK\3\4" or start[:1] == b"\x80":  # a zip archive, or a pickle
        return False
    return path.suffix == ".safetensors"


def refuse_pointer(path: Path) -> None:
    """A ValueError if the file is a pointer of Git LFS, a few lines of text in place of the content."""
    with open(path, "rb") as file:
        pointer = _POINTER.match(file.read(1024))
    if pointer:
        raise ValueError(
            f"{path} is a Git LFS pointer, a text that stands for a file of {int(pointer[1]):,} bytes; expected that "
            f"file itself: run `git lfs pull` in its folder, or download it again"
        )


# ---------------------------------------------------------------------------------------------------------- safetensors


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU in memory of their own, and its metadata.

    The library hands out views of the mapped file: whoever overwrites it changes the tensors, and whoever truncates it
    ends the process. Each tensor is therefore read to its place, so that nothing is held twice.
    """
    refuse_pointer(path)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as checked, open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            start = file.tell()
            metadata = header.pop("__metadata__", None) or {}
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                if entry["dtype"] not in _DTYPES:
                    tensors[name] = checked.get_tensor(name).clone()
                    continue
                tensors[name] = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="cpu")
                file.seek(start + entry["data_offsets"][0])
                place = tensors[name].reshape(-1).view(torch.uint8).numpy().data
                if file.readinto(place) != tensors[name].nbytes:
                    raise ValueError(f"{path} became shorter while it was read")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file, or not all of one: {error}") from error
    return tensors, metadata


def count_numbers(path: Path, names: tuple[str, ...], beginnings: tuple[str, ...]) -> int:
    """How many numbers a file or folder of weights holds under names with these beginnings. Reads no weights."""
    shapes = read_shapes(path, names)
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(beginnings))


def read_shapes(path: Path, names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file or folder, without its weights. names: as for `read_weights`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _files_at(path, names):
        if is_safetensors(file):
            try:
                with safe_open(file, framework="pt") as header:
                    shapes |= {name: tuple(header.get_slice(name).get_shape()) for name in header.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise ValueError(f"{file} is not a safetensors file, or not all of one: {error}") from error
        else:
            _, weights, _ = _parts_of(_load_pt(file, "meta"), file, None, True)
            shapes |= {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return shapes


def mapped_weights(path: Path, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file or folder, mapped: what is not looked at is not read. They are for the moment alone,
    because what happens to the file happens to them. names: as for `read_weights`."""
    for file in _files_at(path, names):
        if is_safetensors(file):
            try:
                with safe_open(file, framework="pt", device="cpu") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        yield name, opened.get_tensor(name)
            except SafetensorError as error:
                raise ValueError(f"{file} is not a safetensors file, or not all of one: {error}") from error
        else:
            yield from _parts_of(_load_pt(file, "cpu"), file, None, True)[1].items()


def _files_at(path: Path, names: tuple[str, ...]) -> list[Path]:
    """The file, or those of a folder that hold its weights."""
    if not path.is_dir():
        return [path]
    index, files = _weights_in(path, names)
    return files if index is None else [path / name for name in sorted(set(_listed(index).values()))]


# -------------------------------------------------------------------------------------------------------------- folders


def _read_folder(folder: Path, names: tuple[str, ...]) -> WeightFile:
    """Reads the shards that a folder's index lists, or its preferred or only safetensors file."""
    stated = _stated(folder)
    index, files = _weights_in(folder, names)
    if index is not None:
        return WeightFile(folder, _read_shards(index), stated=stated)
    tensors, metadata = read_safetensors(files[0])
    return WeightFile(folder, tensors, metadata=metadata, stated=stated)


def _weights_in(folder: Path, names: tuple[str, ...]) -> tuple[Path | None, list[Path]]:
    """The index of a folder's shards, or else its one file of weights.

    Where a preferred name has an index, the index decides, as for diffusers, which leaves an older whole file behind
    when it saves shards into the same folder.
    """
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(folder.glob("*.safetensors"))
    for name in names:
        index, file = folder / f"{name}.safetensors.index.json", folder / f"{name}.safetensors"
        if index in indices:
            return index, []
        if file in files:
            return None, [file]
    if len(files) == 1 and not indices:
        return None, files
    if len(indices) == 1:
        return indices[0], []
    if indices or files:
        found = some([file.name for file in [*indices, *files]])
        raise ValueError(f"{folder} holds more than one set of weights, or shards without their index: {found}")
    raise FileNotFoundError(f"no .safetensors file in the folder {folder}")


def _listed(index: Path) -> dict[str, str]:
    """The file of every weight that an index lists; the files are there."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} has no weight_map from weights to files")
    outside = sorted({name for name in listed.values() if Path(name).name != name})
    if outside:
        raise ValueError(f"{index} lists files outside its folder: {some(outside)}")
    absent = sorted({name for name in listed.values() if not (index.parent / name).is_file()})
    if absent:
        raise FileNotFoundError(f"{index} lists files that are not there: {some(absent)}")
    return listed


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Reads all tensors that the index lists, from the files beside it."""
    listed = _listed(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(listed.values())):
        found, _ = read_safetensors(index.parent / shard)
        missing = sorted(name for name, file in listed.items() if file == shard and name not in found)
        unexpected = sorted(name for name in found if listed.get(name) != shard)
        if missing or unexpected:
            words = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected]
            raise ValueError(f"{index.parent / shard} does not hold what {index.name} says: {some(words)}")
        tensors |= found
    return tensors


def _stated(folder: Path) -> dict[str, Any]:
    """The folder's config.json; {} without one."""
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; a ValueError for anything else."""
    refuse_pointer(path)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(said).__name__}")
    return said


# -------------------------------------------------------------------------------------------------- files of torch.save


def _read_pt(path: Path, ema: bool | None, prefer_ema: bool) -> WeightFile:
    """Reads a file of torch.save: the generator's weights and its LoRA."""
    loaded = _load_pt(path, "cpu")
    part, weights, lora = _parts_of(loaded, path, ema, prefer_ema)
    other = {EMA: PLAIN, PLAIN: EMA}.get(part, "")
    other = other if isinstance(loaded.get(other), Mapping) and loaded[other] else ""
    return WeightFile(path, _own(weights.items()), lora=_own(lora.items()), part=part, other_part=other)


def _own(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors, each with memory of its own: in the file they may be mapped, or views of one another."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors}


def _load_pt(path: Path, device: str) -> Mapping[str, Any]:
    """The dictionary in a file of torch.save. Only tensors and plain containers are unpickled, because anything else
    could run code. Archives are mapped, so that what is not taken is not read."""
    options: dict[str, Any] = {"map_location": device, "weights_only": True}
    try:
        if path.suffix == ".safetensors":  # by the name alone, torch would take it for one
            with open(path, "rb") as file:
                loaded = torch.load(file, **options)
        else:
            loaded = torch.load(path, mmap=zipfile.is_zipfile(path), **options)
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
    return loaded


def _parts_of(
    loaded: Mapping[str, Any], path: Path, ema: bool | None, prefer_ema: bool
) -> tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The name of the entry that holds the generator ("": the top), its tensors, and those of its LoRA."""
    there = [name for name in _PARTS if isinstance(loaded.get(name), Mapping) and loaded[name]]
    if ema is None:
        part = PLAIN if not prefer_ema and PLAIN in there else next(iter(there), "")
    else:
        part = EMA if ema else PLAIN
        if part not in there:
            raise ValueError(
                f"{path} holds no {part}, which {'--ema' if ema else '--no-ema'} asks for; it holds "
                f"{some(there) or 'weights at its top'}: leave the option out"
            )
    lora = loaded.get(_LORA_PART) or {}
    if not isinstance(lora, Mapping):
        raise ValueError(f"{path}: {_LORA_PART} must be a state dict, got {type(lora).__name__}")
    weights = loaded[part] if part else ({} if _LORA_PART in loaded else loaded)
    for name, value in [*weights.items(), *lora.items()]:
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {part + ': ' if part else ''}{name} must be a tensor, got {type(value).__name__}; a "
                f"state dict is looked for under {', '.join(_PARTS)}, else at the top"
            )
    return part, weights, lora
