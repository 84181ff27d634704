"""What the adapter_config.json of a LoRA says, as peft reads it: ranks, alphas, layers. What cannot be merged is
refused."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memflow_ops.model.checkpoints.containers import read_json

_READ = frozenset(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "bias",
        "peft_type",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "init_lora_weights",
    ]
)
_OF_TRAINING = frozenset(
    [
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
        "layers_pattern",
        "eva_config",
        "corda_config",
        "loftq_config",
        "lora_ga_config",
        "velora_config",
    ]
)
"""Entries that say where the adapters come from and nothing about what they are added to. The configurations of ways to
start (`eva_config`, ...) count only where `init_lora_weights` names the way."""
_STARTS_THAT_KEEP_W = ("gaussian", "eva", "orthogonal", "lora_ga", "mica")
_STARTS_THAT_CHANGE_W = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA's adapter_config.json; None or empty for what it does not say."""

    alpha: float | None = None
    rank: int | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    rank_stabilised: bool = False
    """Whether the scale is alpha / sqrt(rank) (rsLoRA) instead of alpha / rank."""
    biased: bool | None = None
    """Whether B has a bias, which is added to the layer's."""
    has_magnitudes: bool | None = None
    """Whether the sum's rows are given norms that were trained (DoRA)."""
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    layers: Collection[int] | None = None
    """The numbers of the blocks that have adapters."""

    @classmethod
    def from_json(cls, said: Mapping[str, Any], source: str) -> "LoraConfig":
        """Reads the content of an adapter_config.json. A ValueError if its form is wrong, or for a variant of LoRA
        other than W + scale B A, or DoRA, on the very W that the checkpoint holds."""
        if not isinstance(said, Mapping):
            raise ValueError(f"{source} must hold a JSON object, got {type(said).__name__}")
        _check_variant(said, source)
        numbers = {name: said.get(name) for name in ("lora_alpha", "r")}
        for name in ("alpha_pattern", "rank_pattern"):
            pattern = said.get(name) or {}
            if not isinstance(pattern, Mapping) or not all(map(_is_pattern, pattern)):
                raise ValueError(f"{source}: {name} must map patterns of names to numbers, got {pattern!r}")
            numbers |= {f"{name}[{module!r}]": value for module, value in pattern.items()}
        for name, value in numbers.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{source}: {name} must be a number, got {value!r}")
        for name in ("use_rslora", "use_dora", "lora_bias"):
            if not isinstance(said.get(name), (bool, type(None))):
                raise ValueError(f"{source}: {name} must be true or false, got {said[name]!r}")
        return cls(
            numbers["lora_alpha"],
            numbers["r"],
            said.get("alpha_pattern") or {},
            said.get("rank_pattern") or {},
            bool(said.get("use_rslora")),
            said.get("lora_bias"),
            said.get("use_dora"),
            _modules(said, "target_modules", source),
            _modules(said, "exclude_modules", source),
            _layers(said, source),
        )

    def alpha_of(self, names: Sequence[str]) -> float | None:
        """The alpha of a module; names: as for `covers`."""
        return _of_module(self.alpha_pattern, names, self.alpha)

    def rank_of(self, names: Sequence[str]) -> int | None:
        return _of_module(self.rank_pattern, names, self.rank)

    def covers(self, names: Sequence[str]) -> bool:
        """Whether a module has an adapter by this config, so that peft would load it.

        names: those that the module may have had in the model that was trained; see `layouts.trained_names`.
        """
        block = re.search(r"(?:^|\.)blocks\.(\d+)\.", names[-1])
        if self.layers is not None and block and int(block[1]) not in self.layers:
            return False
        if self.exclude_modules and any(_is_listed(self.exclude_modules, name) for name in names):
            return False
        targets = self.target_modules
        return not targets or targets == "all-linear" or any(_is_listed(targets, name) for name in names)

    def unused_patterns(self, modules: Collection[Sequence[str]]) -> list[str]:
        """The patterns that match none of these modules, each given by its names."""
        patterns = {**self.alpha_pattern, **self.rank_pattern}
        return [pattern for pattern in patterns if not any(_matches(pattern, names) for names in modules)]


def _check_variant(said: Mapping[str, Any], source: str) -> None:
    """A ValueError unless the config describes a plain LoRA, or one with magnitudes."""
    kind = said.get("peft_type") or "LORA"
    if str(kind).upper() != "LORA":
        raise ValueError(f"{source}: peft_type is {kind!r}; only 'LORA' can be merged")
    for name, value in said.items():
        if value and name not in _READ and name not in _OF_TRAINING:
            raise ValueError(
                f"{source}: {name} is set ({_short(value)}), which merging does not support; plain LoRA and DoRA are. "
                f"Merge it with the program that trained it, and convert the result"
            )
    if (said.get("bias") or "none") != "none":
        raise ValueError(f"{source}: the LoRA trains biases (bias={said['bias']!r}); only bias='none' is supported")
    start = said.get("init_lora_weights")
    word = start.lower() if isinstance(start, str) else ""
    if word.startswith(_STARTS_THAT_CHANGE_W):
        raise ValueError(
            f"{source}: init_lora_weights is {start!r}, which takes the first adapter out of the base weights: added "
            f"to those of the checkpoint, it is not the model that was trained. Save it as a plain LoRA (in peft, "
            f"`save_pretrained` with `path_initial_model_for_weight_conversion`)"
        )
    if not (start is None or isinstance(start, bool) or word in _STARTS_THAT_KEEP_W):
        raise ValueError(
            f"{source}: init_lora_weights is {start!r}, which is not known here; expected true, false, "
            f"{', '.join(_STARTS_THAT_KEEP_W)}"
        )


def _short(value: object, most: int = 60) -> str:
    words = repr(value)
    return words if len(words) <= most else f"{words[:most]}..."


def _modules(said: Mapping[str, Any], name: str, source: str) -> Sequence[str] | str | None:
    value = said.get(name)
    if value is None or (isinstance(value, str) and (value == "all-linear" or _is_pattern(value))):
        return value
    if isinstance(value, list) and all(isinstance(module, str) for module in value):
        return value
    raise ValueError(f"{source}: {name} must be a list of names of modules, or one pattern, got {_short(value)}")


def _layers(said: Mapping[str, Any], source: str) -> Collection[int] | None:
    value = said.get("layers_to_transform")
    if value is None or value == []:
        return None
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise ValueError(f"{source}: layers_to_transform must be a number of a block, or a list, got {_short(value)}")
    return numbers


def _is_pattern(name: str) -> bool:
    try:
        re.compile(name)
    except re.error:
        return False
    return True


def _is_listed(modules: Sequence[str] | str, name: str) -> bool:
    """Whether a module is among those named, as in peft: a pattern fits its whole name, a listed name ends it."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether a pattern matches a module. As in peft, it matches the end of the module's name, from a dot on, and "^"
    stands for the beginning of the whole name."""
    return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)


def _of_module(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that matches the module."""
    return next((value for pattern, value in patterns.items() if _matches(pattern, names)), default)


def read_lora_config(place: Path) -> LoraConfig:
    """Reads the adapter_config.json beside a LoRA's file, or in its folder; an empty config if there is none."""
    path = (place if place.is_dir() else place.parent) / "adapter_config.json"
    return LoraConfig.from_json(read_json(path), str(path)) if path.is_file() else LoraConfig()


def config_of_metadata(metadata: Mapping[str, str], source: str) -> LoraConfig | None:
    """The config that diffusers writes into the metadata of a LoRA's file, for its transformer; None without one."""
    if "lora_adapter_metadata" not in metadata:
        return None
    where = f"{source}: lora_adapter_metadata"
    try:
        said = json.loads(metadata["lora_adapter_metadata"])
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(said).__name__}")
    of_others = any(name.startswith("transformer.") for name in said)
    return LoraConfig.from_json(
        {
            name.removeprefix("transformer."): value
            for name, value in said.items()
            if not of_others or name.startswith("transformer.")
        },
        where,
    )
