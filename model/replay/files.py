"""The two files of a fixture, read with checks: every problem is a FixtureError that names the file."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


class FixtureError(ValueError):
    """The fixture cannot be replayed. The message says what was found and what is expected."""


class Description:
    """The JSON of a fixture."""

    def __init__(self, path: Path):
        self._path = path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FixtureError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
            raise FixtureError(f"{path} is not JSON: {error}") from error
        if not isinstance(content, dict):
            raise FixtureError(f"{path} must hold an object, got a {type(content).__name__}")
        self._content: dict[str, Any] = content

    def has(self, name: str) -> bool:
        return name in self._content

    def value(self, name: str, default: object = None) -> Any:
        """A value of the entry "config", or else of the JSON itself. A null counts as absent."""
        config = self._content.get("config")
        if not isinstance(config, dict):
            raise self.error(f"config must be an object, got {config!r}")
        found = (values[name] for values in (config, self._content) if values.get(name) is not None)
        return next(found, default)

    def whole(self, name: str, least: int, default: int | None = None, most: int = 2**20) -> int:
        """A `value` that is a whole number from `least` to `most`."""
        return self.check_whole(name, self.value(name, default), least, most)

    def check_whole(self, name: str, value: object, least: int, most: int = 2**20) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.error(f"{name} must be a whole number from {least} to {most}, got {value!r}")
        return value

    def number(self, name: str, value: object) -> float:
        """The value, if it is a finite number. name: for the error."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(f"{name} must be a finite number, got {value!r}")
        return float(value)

    def entries(self, name: str, may_be_empty: bool = False) -> list[Any]:
        """A list of the JSON itself."""
        value = self._content.get(name)
        if not isinstance(value, list) or not (value or may_be_empty):
            raise self.error(f"{name} must be a list, got {value!r}")
        return value

    def error(self, message: str) -> FixtureError:
        return FixtureError(f"{self._path}: {message}")


class Tensors:
    """The tensors of a fixture, read one by one."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise FixtureError(f"cannot read {path}: no such file")
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise FixtureError(f"{path} is not a safetensors file: {error}") from error
        self.names = set(self._file.keys())

    def need(self, name: str) -> None:
        if name not in self.names:
            raise FixtureError(f"{self.path}: the tensor {name} is missing")

    def shape(self, name: str) -> tuple[int, ...]:
        self.need(name)
        return tuple(self._file.get_slice(name).get_shape())

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor as float32. shape: that it must have."""
        self.need(name)
        tensor = self._file.get_tensor(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise FixtureError(f"{self.path}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise FixtureError(f"{self.path}: {name} must hold floating-point numbers, got {tensor.dtype}")
        return tensor.float()
