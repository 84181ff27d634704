"""States of streams as files: tensors in safetensors, and everything around them as JSON in its header. No pickle.

A state is what a `state_dict` returns: dicts, lists, tuples, tensors, text, numbers, bools and None, one in another.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memflow_ops.files import replacing

FORMAT = "memflow-ops state 1"


def save_state(path: Path, state: Any) -> int:
    """Writes a state whole or not at all: an older file stays until the new one is complete. Returns its bytes.

    Every tensor has a CRC-32, and so has the JSON. An OSError where it cannot be written, on a full disk for one.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(state, tensors))
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    about = {"format": FORMAT, "state": text, "checksums": json.dumps(sums)}
    about["checksum"] = str(zlib.crc32((about["state"] + about["checksums"]).encode()))
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, about)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        return temporary.stat().st_size


def load_state(path: Path) -> Any:
    """What `save_state` has written. A FileNotFoundError where there is no file, a ValueError where it is damaged."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    found, text, sums, total = (about.get(name, "") for name in ("format", "state", "checksums", "checksum"))
    if found != FORMAT:
        raise ValueError(f"{path} is no state, or damaged: expected the format {FORMAT!r}, got {found!r}")
    if str(zlib.crc32((text + sums).encode())) != total:
        raise ValueError(f"{path} is damaged: the checksum of its header differs")
    for name, expected in json.loads(sums).items():
        if name not in tensors or _checksum(tensors[name]) != expected:
            raise ValueError(f"{path} is damaged: the checksum of tensor {name} differs")
    return _unpacked(json.loads(text), tensors)


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON takes it. Its tensors go to `tensors`, in host memory."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        kept = value.detach().to("cpu").contiguous()
        storage = kept.untyped_storage()
        # safetensors refuses tensors that share memory, and would write all of the memory that a view is of.
        shared = any(storage.data_ptr() == other.untyped_storage().data_ptr() for other in tensors.values())
        tensors[name] = kept.clone() if shared or storage.nbytes() > kept.nbytes else kept
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_packed(part, tensors) for part in pair] for pair in value.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_packed(part, tensors) for part in value]
        return parts if isinstance(value, list) else {"tuple": parts}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"a state holds tensors, text, numbers, lists and dicts, got {type(value).__name__}")


def _unpacked(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors) for part in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        if "tuple" in value:
            return tuple(_unpacked(part, tensors) for part in value["tuple"])
        return {_unpacked(key, tensors): _unpacked(part, tensors) for key, part in value["dict"]}
    return value


def _checksum(tensor: Tensor) -> int:
    """The CRC-32 of what a contiguous tensor in host memory is and holds; nothing is copied."""
    about = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, about) if tensor.numel() else about
