"""LoRA files: each layer W that they name becomes W + scale B A, once, in its weights.

With magnitudes m (DoRA, arXiv 2402.09353) it becomes m (W + scale B A) / |W + scale B A|, by rows.

Read are the forms of peft and diffusers (`lora_A`, `lora_B`) and those that programs around Wan write (`lora_down`,
`lora_up`, `.alpha`, and the whole differences `.diff`, `.diff_b` and `.diff_m` of weights, biases and modulations).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memflow_ops.model.checkpoints.containers import some
from memflow_ops.model.checkpoints.layouts import (
    bare_name,
    dotted_name,
    is_diffusers,
    original_name,
    trained_names,
)
from memflow_ops.model.checkpoints.lora_config import LoraConfig
from memflow_ops.ops.checks import FLOATS

_HALF = re.compile(r"(.+)\.lora(?:_([AB])|[._](down|up))(?:\.(\w+))?\.(weight|bias)")
"""Groups: the module; A or B, or down or up; the adapter's name, which only peft's own state dict has; what it is."""
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.(?!weight$)(\w+))?(?:\.weight)?")
"""Groups: the module; the adapter's name."""
_DIFFERENCE = re.compile(r"(.+)\.(diff|diff_b|diff_m)")
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


@dataclass(frozen=True)
class Adapter:
    """The change of the weight of one layer, linear or a convolution: scale * b @ a is added to it."""

    a: Tensor  # (rank, in), a convolution's (rank, in, its kernel)
    b: Tensor  # (out, rank), a convolution's (out, rank, 1, 1, 1)
    scale: float
    magnitude: Tensor | None = None
    """The norms that the rows of the sum are given, of `out` entries (DoRA). None: they are what they are."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that it changes."""
        return (self.b.shape[0], *self.a.shape[1:])

    def added_to(self, weight: Tensor) -> Tensor:
        """The weight with the change, in the dtype of the weight."""
        a, b = self.a.flatten(1).to(weight.dtype), self.b.flatten(1).to(weight.dtype)
        total = weight + self.scale * (b @ a).view(self.shape)
        if self.magnitude is None:
            return total
        rows = total.flatten(1)
        return (rows * (self.magnitude.flatten().to(weight.dtype) / rows.norm(dim=1))[:, None]).view(self.shape)


@dataclass(frozen=True)
class Lora:
    """What a LoRA changes, by names in the original layout."""

    adapters: Mapping[str, Adapter]
    """By module."""
    source: str
    alpha_from: str
    """Where alpha was found, in words."""
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    """By weight: what is added to it as it is."""
    unused_patterns: Sequence[str] = ()
    """Patterns of its config that match no layer, which is more often a slip than meant."""

    def __str__(self) -> str:
        ranks = sorted({adapter.rank for adapter in self.adapters.values()})
        scales = sorted({adapter.scale for adapter in self.adapters.values()})
        words = (
            f"{len(self.adapters)} layers, rank {', '.join(map(str, ranks))}, scale "
            f"{some([f'{scale:g}' for scale in scales]).replace(';', ',')} (alpha {self.alpha_from})"
        )
        if any(adapter.magnitude is not None for adapter in self.adapters.values()):
            words += ", with magnitudes (DoRA)"
        if self.differences:
            words += f", and {len(self.differences)} whole differences"
        if self.unused_patterns:
            words += f"; patterns that match none of its layers: {some(self.unused_patterns)}"
        return words


def split_lora(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state dict into the weights of the model itself, under their names without peft, and those of a LoRA."""
    weights, adapters = {}, {}
    has_lora = any(_HALF.fullmatch(name) for name in tensors)
    for name, tensor in tensors.items():
        beside = has_lora and (_DIFFERENCE.fullmatch(name) or name.endswith(".alpha"))
        if beside or _HALF.fullmatch(name) or _MAGNITUDE.fullmatch(name):
            adapters[name] = tensor
        else:
            weights[name.replace(".base_layer.", ".")] = tensor
    return weights, adapters


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass
class _Parts:
    """The tensors of a LoRA, sorted: module of the file -> what the file has for it."""

    halves: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By "A weight", "B weight", "B bias" and "magnitude"."""
    names: dict[str, dict[str, str]] = field(default_factory=dict)
    """What the file calls the halves."""
    alphas: dict[str, float] = field(default_factory=dict)
    differences: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By "weight", "bias" and "modulation"."""

    @property
    def modules(self) -> list[str]:
        return list(dict.fromkeys([*self.halves, *self.differences]))


def parse_lora(tensors: Mapping[str, Tensor], config: LoraConfig, source: str, alpha: float | None = None) -> Lora:
    """The changes in a LoRA's tensors.

    alpha: in place of the one that the file states for all layers alike, in entries `<module>.alpha` or in config;
        what `alpha_pattern` states for some of them stays. If neither is there, alpha is the rank, so that the scale
        is 1, as for the released files.

    A ValueError names every tensor that has no other half, does not fit its other half, has a rank that contradicts
    config, is no floating-point tensor or holds no finite numbers.
    """
    parts = _sort(tensors, source)
    problems = _problems(parts, config)
    if problems:
        raise ValueError(f"{source} is no LoRA that can be merged: {some(sorted(problems))}")
    names = _original_names(parts.modules, source)
    if alpha is not None and len(set(parts.alphas.values())) > 1:
        raise ValueError(
            f"{source} states alphas of its own for its layers, from {min(parts.alphas.values()):g} to "
            f"{max(parts.alphas.values()):g}, so that lora_alpha={alpha:g} (--lora-alpha) cannot stand for all: "
            f"leave it out"
        )
    adapters, differences, origins = {}, {}, set()
    for module, halves in parts.halves.items():
        a, b = halves["A weight"], halves["B weight"]
        value, origin = _alpha(module, a.shape[0], config, parts.alphas.get(module), alpha)
        if not math.isfinite(value):
            raise ValueError(f"{source}: the alpha of {module} must be a finite number, got {value} ({origin})")
        origins.add(origin)
        scale = value / (math.sqrt(a.shape[0]) if config.rank_stabilised else a.shape[0])
        adapters[names[module]] = Adapter(a, b, scale, halves.get("magnitude"))
        if "B bias" in halves:
            differences[f"{names[module]}.bias"] = halves["B bias"].double() * scale
    for module, found in parts.differences.items():
        for what, tensor in found.items():
            weight = f"{names[module]}.{what}"
            differences[weight] = tensor if weight not in differences else differences[weight] + tensor
    unused = config.unused_patterns([trained_names(module) for module in parts.halves])
    return Lora(adapters, source, " and ".join(sorted(origins)), differences, unused)


def _alpha(module: str, rank: int, config: LoraConfig, in_file: float | None, given: float | None) -> tuple[float, str]:
    """The alpha of a module, and where it comes from, in words."""
    of_config = config.alpha_of(trained_names(module))
    if given is not None:
        if of_config is not None and of_config != config.alpha:
            return of_config, "from its config's alpha_pattern"
        return given, "given"
    for value, words in ((in_file, "from the file"), (of_config, "from its config")):
        if value is not None:
            return value, words
    return rank, "not stated, taken as the rank"


def _original_names(modules: Sequence[str], source: str) -> dict[str, str]:
    """Module of the file -> its original name."""
    bare = {module: dotted_name(bare_name(module)) for module in modules}
    diffusers = is_diffusers(f"{name}." for name in bare.values())
    names = {module: original_name(name) if diffusers else name for module, name in bare.items()}
    first: dict[str, str] = {}
    for module, name in names.items():
        if first.setdefault(name, module) != module:
            raise ValueError(f"{source}: {first[name]} and {module} are both {name}")
    return names


def _sort(tensors: Mapping[str, Tensor], source: str) -> _Parts:
    """The tensors by module. A ValueError for what belongs to no LoRA, or to several."""
    parts, adapter_names, unexpected = _Parts(), set(), []
    for name, tensor in tensors.items():
        if half := _HALF.fullmatch(name):
            which = half[2] or {"down": "A", "up": "B"}[half[3]]
            kept = parts.halves.setdefault(half[1], {})
            if f"{which} {half[5]}" in kept and not half[4]:
                unexpected.append(f"{name}, of which it has another under another name")
            kept[f"{which} {half[5]}"] = tensor
            parts.names.setdefault(half[1], {})[f"{which} {half[5]}"] = name
            adapter_names.add(half[4])
        elif magnitude := _MAGNITUDE.fullmatch(name):
            parts.halves.setdefault(magnitude[1], {})["magnitude"] = tensor
            parts.names.setdefault(magnitude[1], {})["magnitude"] = name
            adapter_names.add(magnitude[2])
        elif difference := _DIFFERENCE.fullmatch(name):
            parts.differences.setdefault(difference[1], {})[_DIFFERENCES[difference[2]]] = tensor
        elif name.endswith(".alpha") and tensor.numel() == 1 and tensor.dtype not in (torch.bool, torch.complex64):
            parts.alphas[name.removesuffix(".alpha")] = float(tensor)
        else:
            unexpected.append(f"unexpected {name} {tuple(tensor.shape)}")
    if len(adapter_names) > 1:
        raise ValueError(f"{source} holds several adapters, {sorted(map(str, adapter_names))}; expected one")
    if not parts.halves and not parts.differences:
        first = ", ".join(sorted(tensors)[:5])
        raise ValueError(
            f"{source} holds no LoRA: no name ends in .lora_A.weight or .lora_down.weight; the first it has: {first}"
        )
    if unexpected:
        raise ValueError(f"{source} is no LoRA that can be merged: {some(sorted(unexpected))}")
    return parts


def _problems(parts: _Parts, config: LoraConfig) -> list[str]:
    """What is wrong with the tensors of a LoRA, in words."""
    problems = [f"{module}.alpha belongs to no LoRA" for module in parts.alphas if module not in parts.modules]
    for module, halves in parts.halves.items():
        names = parts.names[module]
        problems += [f"missing {_other_half(names)}" for half in "AB" if f"{half} weight" not in halves]
        problems += _bad_numbers({names[what]: tensor for what, tensor in halves.items()})
        if "A weight" in halves and "B weight" in halves:
            problems += _bad_pair(module, halves, config)
    for module, found in parts.differences.items():
        if "weight" in found and "magnitude" in parts.halves.get(module, {}):
            problems.append(f"{module} has a magnitude and a whole difference, and which comes first is not known")
        problems += _bad_numbers({f"{module}: the difference of {what}": tensor for what, tensor in found.items()})
    return problems


def _other_half(names: Mapping[str, str]) -> str:
    """What the file would call the half of a module that it lacks."""
    name = next((name for what, name in names.items() if what != "B bias"), next(iter(names.values())))
    for a, b in (
        ("lora_A", "lora_B"),
        ("lora_down", "lora_up"),
        ("lora.down", "lora.up"),
        ("lora_magnitude_vector", "lora_A.weight"),
    ):
        if a in name or b in name:
            return name.replace(a, b) if a in name else name.replace(b, a)
    return name


def _bad_numbers(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            problems.append(f"{name} is in {tensor.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} holds numbers that are not finite")
    return problems


def _bad_pair(module: str, halves: Mapping[str, Tensor], config: LoraConfig) -> list[str]:
    """What is wrong with the shapes of A and B, or with the module by the config."""
    a, b, names = halves["A weight"], halves["B weight"], trained_names(module)
    shapes, rank, problems = (tuple(a.shape), tuple(b.shape)), config.rank_of(names), []
    if not (a.dim() == b.dim() >= 2 and shapes[0][0] == shapes[1][1] and set(shapes[1][2:]) <= {1}):
        problems.append(f"{module}: lora_A {shapes[0]} and lora_B {shapes[1]} are no (rank, in) and (out, rank)")
    elif shapes[0][0] == 0:
        problems.append(f"{module} has rank 0: its file is incomplete, as when shards of a training were not gathered")
    elif rank is not None and rank != shapes[0][0]:
        problems.append(f"{module} has rank {shapes[0][0]}, by its config {rank}")
    if "magnitude" in halves:
        if halves["magnitude"].numel() != shapes[1][0]:
            problems.append(f"{module}: {tuple(halves['magnitude'].shape)} are no magnitudes of {shapes[1][0]} rows")
        if "B bias" in halves:
            problems.append(f"{module} has magnitudes and a bias in lora_B, which peft does not train together")
        if config.has_magnitudes is False:
            problems.append(f"{module} has magnitudes, by its config (use_dora) none")
    elif config.has_magnitudes:
        problems.append(f"missing {module}.lora_magnitude_vector (use_dora in its config)")
    if "A bias" in halves:
        problems.append(f"unexpected {module}.lora_A.bias")
    if "B bias" in halves and config.biased is False:
        problems.append(f"{module} has a bias in lora_B, by its config (lora_bias) none")
    if not config.covers(names):
        problems.append(f"{module} has a LoRA, though its config leaves it out (target_modules, layers_to_transform)")
    return problems


# -------------------------------------------------------------------------------------------------------------- merging


def merge_lora(weights: dict[str, Tensor], lora: Lora, source: str) -> None:
    """Adds every change to its weight in `weights` (original names). The sum is computed in float32, or in float64
    where the weight is, and rounded once.

    A ValueError, before any weight is changed, names every change without a weight or with one of another shape; and
    one says whose numbers they are, where the sum is not finite.
    """
    shapes = {f"{module}.weight": adapter.shape for module, adapter in lora.adapters.items()}
    problems = []
    for name, shape in [*shapes.items(), *((name, tuple(x.shape)) for name, x in lora.differences.items())]:
        weight = weights.get(name)
        if weight is None:
            problems.append(f"{name.removesuffix('.weight')} is not in the model")
        elif tuple(weight.shape) != shape:
            problems.append(f"{name.removesuffix('.weight')} has a weight {tuple(weight.shape)}, the LoRA's is {shape}")
    if problems:
        raise ValueError(f"{lora.source} does not fit {source}: {some(problems)}")
    for name in dict.fromkeys([*shapes, *lora.differences]):
        weight = weights[name]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(dtype)
        if adapter := lora.adapters.get(name.removesuffix(".weight")) if name in shapes else None:
            total = adapter.added_to(total)
        if name in lora.differences:
            total = total + lora.differences[name].to(dtype)
        merged = total.to(weight.dtype)
        if not merged.isfinite().all():
            blamed = f"{lora.source} makes" if weight.isfinite().all() else f"{source} has, before its LoRA is merged,"
            raise ValueError(f"{blamed} numbers that are not finite in {weight.dtype}: {name}")
        weights[name] = merged
