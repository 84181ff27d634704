"""LoRA files in the form of peft: each linear layer W that they name becomes W + scale B A, once, in its weights."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from memflow_ops.model.checkpoints.layouts import bare_name, is_diffusers, original_name

_ADAPTER_WEIGHT = re.compile(r"(.+)\.lora_([AB])(?:\.(\w+))?\.weight")
"""Groups: the module, A or B, and the adapter's name, which only peft's own state dict has."""


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA's adapter_config.json; None or empty for what it does not say."""

    alpha: float | None = None
    rank: int | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    rank_stabilised: bool = False
    """Whether the scale is alpha / sqrt(rank) (rsLoRA) instead of alpha / rank."""

    @classmethod
    def from_json(cls, said: Mapping[str, Any], source: str) -> "LoraConfig":
        """Reads the content of an adapter_config.json. A ValueError if its form is wrong, or for a variant
        of LoRA other than W + scale B A."""
        if not isinstance(said, Mapping):
            raise ValueError(f"{source} must hold a JSON object, got {type(said).__name__}")
        for name in ("use_dora", "fan_in_fan_out", "alora_invocation_tokens"):
            if said.get(name):
                raise ValueError(f"{source}: {name} is set, which merging does not support; only plain LoRA is")
        if said.get("bias", "none") != "none":
            raise ValueError(f"{source}: the LoRA trains biases (bias={said['bias']!r}); only bias='none' is supported")
        numbers = {name: said.get(name) for name in ("lora_alpha", "r")}
        for name in ("alpha_pattern", "rank_pattern"):
            pattern = said.get(name) or {}
            if not isinstance(pattern, Mapping) or not all(map(_is_pattern, pattern)):
                raise ValueError(f"{source}: {name} must map patterns of names to numbers, got {pattern!r}")
            numbers |= {f"{name}[{module!r}]": value for module, value in pattern.items()}
        for name, value in numbers.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"{source}: {name} must be a number, got {value!r}")
        return cls(
            numbers["lora_alpha"],
            numbers["r"],
            said.get("alpha_pattern") or {},
            said.get("rank_pattern") or {},
            bool(said.get("use_rslora")),
        )

    def alpha_of(self, module: str) -> float | None:
        return _of_module(self.alpha_pattern, module, self.alpha)

    def rank_of(self, module: str) -> int | None:
        return _of_module(self.rank_pattern, module, self.rank)


def _is_pattern(name: str) -> bool:
    try:
        re.compile(name)
    except re.error:
        return False
    return True


def _of_module(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the module. As in peft, a pattern matches the end of a module's name,
    from a dot on."""
    for name, value in pattern.items():
        if re.fullmatch(rf"(.*\.)?({name})", module):
            return value
    return default


@dataclass(frozen=True)
class Adapter:
    """The change of one linear layer: scale * b @ a."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class Lora:
    """The adapters of a LoRA, by module name in the original layout."""

    adapters: Mapping[str, Adapter]
    source: str
    alpha_from: str
    """Where alpha was found, in words."""

    def __str__(self) -> str:
        ranks = sorted({adapter.rank for adapter in self.adapters.values()})
        scales = sorted({adapter.scale for adapter in self.adapters.values()})
        return (
            f"{len(self.adapters)} layers, rank {', '.join(map(str, ranks))}, scale "
            f"{', '.join(f'{scale:g}' for scale in scales)} (alpha {self.alpha_from})"
        )


def split_lora(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state dict into the weights of the model itself, under their names without peft, and those of a LoRA."""
    weights, adapters = {}, {}
    for name, tensor in tensors.items():
        if _ADAPTER_WEIGHT.fullmatch(name):
            adapters[name] = tensor
        else:
            weights[name.replace(".base_layer.", ".")] = tensor
    return weights, adapters


def parse_lora(tensors: Mapping[str, Tensor], config: LoraConfig, source: str, alpha: float | None = None) -> Lora:
    """The adapters in a LoRA's tensors, named as peft or diffusers name them.

    alpha: overrides what the files say. Otherwise it is taken from an entry `<module>.alpha` among the tensors, then
        from config. If neither has it, alpha is the rank, so that the scale is 1, as for the released files.

    A ValueError names every tensor that has no other half, does not fit its other half, or has a rank that contradicts
    config.
    """
    pairs, alphas = _pair_halves(tensors, config, source)
    bare = {module: bare_name(module) for module in pairs}
    diffusers = is_diffusers(f"{name}." for name in bare.values())
    adapters, origins = {}, set()
    for module, (a, b) in pairs.items():
        rank = a.shape[0]
        stated = [(alpha, "given"), (alphas.get(module), "from the file"), (config.alpha_of(module), "from its config")]
        value, origin = next(
            ((x, words) for x, words in stated if x is not None), (rank, "not stated, taken as the rank")
        )
        if not math.isfinite(value):
            raise ValueError(f"{source}: the alpha of {module} must be a finite number, got {value} ({origin})")
        origins.add(origin)
        scale = value / (math.sqrt(rank) if config.rank_stabilised else rank)
        adapters[original_name(bare[module]) if diffusers else bare[module]] = Adapter(a, b, scale)
    return Lora(adapters, source, " and ".join(sorted(origins)))


def _pair_halves(
    tensors: Mapping[str, Tensor], config: LoraConfig, source: str
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """Module -> its A and B, checked; and module -> the alpha that stands among the tensors."""
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    adapter_names, problems = set(), []
    for name, tensor in tensors.items():
        found = _ADAPTER_WEIGHT.fullmatch(name)
        if found:
            halves.setdefault(found[1], {})[found[2]] = tensor
            adapter_names.add(found[3])
        elif name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name.removesuffix(".alpha")] = float(tensor)
        else:
            problems.append(f"unexpected {name} {tuple(tensor.shape)}")
    if len(adapter_names) > 1:
        raise ValueError(f"{source} holds several adapters, {sorted(map(str, adapter_names))}; expected one")
    if not halves:
        some = ", ".join(sorted(tensors)[:5])
        raise ValueError(f"{source} holds no LoRA: no name ends in .lora_A.weight; the first it has: {some}")
    problems += [f"{module}.alpha belongs to no LoRA" for module in alphas if module not in halves]
    for module, pair in halves.items():
        problems += [f"missing {module}.lora_{half}.weight" for half in {"A", "B"} - pair.keys()]
        if len(pair) < 2:
            continue
        shapes = tuple(pair["A"].shape), tuple(pair["B"].shape)
        rank = config.rank_of(module)
        if pair["A"].dim() != 2 or pair["B"].dim() != 2 or shapes[0][0] != shapes[1][1]:
            problems.append(f"{module}: lora_A {shapes[0]} and lora_B {shapes[1]} are no (rank, in) and (out, rank)")
        elif rank is not None and rank != shapes[0][0]:
            problems.append(f"{module} has rank {shapes[0][0]}, by its config {rank}")
    if problems:
        raise ValueError(f"{source} is no LoRA that can be merged: {'; '.join(sorted(problems))}")
    return {module: (pair["A"], pair["B"]) for module, pair in halves.items()}, alphas


def merge_lora(weights: dict[str, Tensor], lora: Lora, source: str) -> None:
    """Adds every adapter to its weight in `weights` (original names). The sum is computed in float32 and rounded once.

    A ValueError, before any weight is changed, names every adapter without a weight or with one of another shape.
    """
    problems = []
    for module, adapter in lora.adapters.items():
        weight, shape = weights.get(f"{module}.weight"), (adapter.b.shape[0], adapter.a.shape[1])
        if weight is None:
            problems.append(f"{module} is not in the model")
        elif tuple(weight.shape) != shape:
            problems.append(f"{module} has a weight {tuple(weight.shape)}, the LoRA's is {shape}")
    if problems:
        raise ValueError(f"{lora.source} does not fit {source}: {'; '.join(problems)}")
    for module, adapter in lora.adapters.items():
        weight = weights[f"{module}.weight"]
        change = adapter.b.float() @ adapter.a.float()
        weights[f"{module}.weight"] = (weight.float() + adapter.scale * change).to(weight.dtype)


def read_lora_config(file: Path) -> LoraConfig:
    """Reads the adapter_config.json beside a LoRA's file; an empty config if there is none."""
    path = file.parent / "adapter_config.json"
    if not path.is_file():
        return LoraConfig()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return LoraConfig.from_json(said, str(path))
