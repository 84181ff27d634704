"""Loads checkpoints of the Wan 2.1 family into our model, merges a LoRA into them, and converts them.

The known layouts are that of the original release, that of diffusers (folders with shards too), and those of the .pt
files of Self-Forcing, LongLive and MemFlow. `layouts` has their names of weights, `containers` their kinds of files.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memflow_ops.model.checkpoints import native
from memflow_ops.model.checkpoints.containers import WeightFile, read_weights
from memflow_ops.model.checkpoints.layouts import bare_name, diffusers_name, infer_config, is_diffusers, original_name
from memflow_ops.model.checkpoints.lora import Lora, LoraConfig, merge_lora, parse_lora, read_lora_config, split_lora
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig
from memflow_ops.ops.checks import FLOATS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LORA_FILES = ("adapter_model", "pytorch_lora_weights")


@dataclass(frozen=True)
class Pretrained:
    """The weights of a model under our names, and where they come from."""

    weights: dict[str, Tensor]
    config: ModelConfig
    source: str
    layout: str
    """"our", "original" or "diffusers"."""
    part: str = ""
    """The entry of a .pt that was taken."""
    lora: str = ""
    """The LoRA that was merged, in words."""
    memory: str = "memflow"
    """The `StreamSettings.memory` that the weights were tuned for."""
    mapped: bool = False
    """Whether the weights are memory-mapped views of the file."""

    def build(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> CausalVideoModel:
        """The model, in eval mode, with memory of its own. dtype: of the weights; None: `self.dtype`."""
        dtype = dtype or self.dtype
        model = native.fill_model(empty_model(self.config), self.weights, dtype, device, copy=self.mapped)
        native.check_finite(model.state_dict(), f"{self.source} in {dtype}")
        return model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the numbers."""
        numbers: dict[torch.dtype, int] = {}
        for tensor in self.weights.values():
            numbers[tensor.dtype] = numbers.get(tensor.dtype, 0) + tensor.numel()
        return max(numbers, key=lambda dtype: numbers[dtype])

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        return sum(tensor.numel() for tensor in self.weights.values())


def read_pretrained(
    path: Path | str,
    *,
    lora: Path | str | None = None,
    lora_alpha: float | None = None,
    num_heads: int | None = None,
    text_len: int | None = None,
    memory: str | None = None,
) -> Pretrained:
    """Reads a checkpoint, our own or one of a known layout, and merges a LoRA into it.

    path: a .safetensors or .pt file, a model's folder or that of a whole diffusers pipeline.
    lora: a file or folder in peft's form. A LoRA inside the checkpoint itself is always merged.
    lora_alpha: overrides what the LoRA says; see `parse_lora`.
    num_heads, text_len: for checkpoints without a config.json, whose shapes do not tell them. By default width / 128
        and 512.
    memory: the kind of memory that the weights were tuned for. None: as our own checkpoint states it; otherwise
        "released" if the name of the file or its folder contains MemFlow, and "memflow" if not.

    A ValueError names every weight that is missing, unexpected or of the wrong shape, as the file names it.
    """
    path = Path(path)
    file = read_weights(path)
    if "config" in file.metadata:
        pretrained = _ours(file, str(path), num_heads, text_len, memory)
        own_lora: dict[str, Tensor] = {}
    else:
        pretrained, own_lora = _foreign(file, str(path), num_heads, text_len, memory)
    merged = []
    if own_lora:
        merged.append(parse_lora(own_lora, read_lora_config(file.path), str(path), lora_alpha))
    if lora is not None:
        merged.append(read_lora(lora, lora_alpha))
    if lora_alpha is not None and not merged:
        raise ValueError(
            f"lora_alpha={lora_alpha:g} is given (--lora-alpha), but {path} holds no LoRA and none is given"
        )
    for one in merged:
        merge_lora(pretrained.weights, one, str(path))
    return replace(pretrained, lora="; ".join(f"{Path(one.source).name}: {one}" for one in merged))


def load_pretrained(
    path: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", **options: Any
) -> CausalVideoModel:
    """The model of a checkpoint, in eval mode: one of ours, of the original Wan 2.1 layout, a .pt of Self-Forcing,
    LongLive or MemFlow, or a diffusers folder.

    Args:
        path: the file or folder.
        dtype: of the weights (None: that of most of the file's numbers).
        device: of the model.
        options: further arguments of `read_pretrained`, which also states the errors.
    """
    return read_pretrained(path, **options).build(dtype, device)


def read_lora(path: Path | str, alpha: float | None = None) -> Lora:
    """Reads a LoRA from a file or folder, or from the entry `generator_lora` of a .pt. Its config comes from diffusers'
    metadata in the file or from an adapter_config.json beside it."""
    file = read_weights(Path(path), _LORA_FILES)
    tensors = file.lora or file.tensors
    if "lora_adapter_metadata" in file.metadata:
        said = json.loads(file.metadata["lora_adapter_metadata"])
        config = LoraConfig.from_json({name.removeprefix("transformer."): said[name] for name in said}, str(path))
    else:
        config = read_lora_config(file.path if file.path.is_file() else file.path / "adapter_model.safetensors")
    return parse_lora(tensors, config, str(path), alpha)


def convert(pretrained: Pretrained, out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a checkpoint of our own, with config, origin and the memory it was tuned for in its metadata.

    dtype: of every tensor in the file; None keeps each tensor's own. A ValueError names the tensors with numbers that
        this dtype cannot hold.
    """
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in pretrained.weights.items()}
    native.check_finite(weights, f"{pretrained.source} in {dtype or pretrained.dtype}")
    origin = {name: getattr(pretrained, name) for name in ("layout", "part", "lora", "memory")}
    origin["source"] = Path(pretrained.source).name  # not the whole path, which is private to the user
    native.save_checkpoint(out, weights, pretrained.config, {"origin": json.dumps(origin)})


def tuned_for(path: Path) -> str:
    """The kind of memory that the weights at this path were tuned for, judged by its name: "released" for MemFlow."""
    words = (path.stem if path.is_file() else path.name, path.resolve().parent.name)
    released = any(re.search(r"memflow(?![-_ ]?ops)", word.lower()) for word in words)
    return "released" if released else "memflow"


def empty_model(config: ModelConfig) -> CausalVideoModel:
    """A model on the meta device, which spares initial values for billions of weights that will be replaced."""
    with torch.device("meta"):
        return CausalVideoModel(config)


def _ours(file: WeightFile, source: str, num_heads: int | None, text_len: int | None, memory: str | None) -> Pretrained:
    config = native.config_of(file.metadata, source)
    for name, value in (("num_heads", num_heads), ("text_len", text_len)):
        if value not in (None, getattr(config, name)):
            raise ValueError(f"{source} says itself that {name} is {getattr(config, name)}, got {value}; leave it out")
    native.check_state_dict(empty_model(config), file.tensors, source)
    origin = json.loads(file.metadata.get("origin", "{}"))
    return Pretrained(dict(file.tensors), config, source, "our", memory=memory or origin.get("memory", "memflow"))


def _foreign(
    file: WeightFile, source: str, num_heads: int | None, text_len: int | None, memory: str | None
) -> tuple[Pretrained, dict[str, Tensor]]:
    """Reads a checkpoint of another project: its weights under our names, checked, and its LoRA."""
    base, lora = split_lora(file.tensors)
    lora |= file.lora
    if not base:
        only = "only a LoRA" if lora else "no weights"
        raise ValueError(
            f"{source} holds {only}; give the checkpoint that it belongs to, and this as its LoRA (--lora)"
        )
    bare = {name: bare_name(name) for name in base}
    diffusers = is_diffusers(bare.values())
    names: dict[str, str] = {}  # ours -> the file's
    for theirs, name in bare.items():
        ours = original_name(name) if diffusers else name
        if ours in names:
            raise ValueError(f"{source}: {names[ours]} and {theirs} are both {ours}")
        names[ours] = theirs
    weights = {ours: base[theirs] for ours, theirs in names.items()}
    odd = [f"{names[ours]} ({tensor.dtype})" for ours, tensor in weights.items() if tensor.dtype not in FLOATS]
    if odd:
        raise ValueError(f"{source}: weights must be in {', '.join(map(str, FLOATS))}, got {native.some(odd)}")
    config = infer_config(weights, file.stated, source, num_heads=num_heads, text_len=text_len)
    # The prefix before every name in the file, so that a missing weight is named as the file would name it.
    prefix = names["patch_embedding.weight"].removesuffix("patch_embedding.weight")

    def in_file(ours: str) -> str:
        return names.get(ours) or prefix + (diffusers_name(ours) if diffusers else ours)

    native.check_state_dict(empty_model(config), weights, source, in_file)
    layout = "diffusers" if diffusers else "original"
    memory = memory or tuned_for(Path(source))
    return Pretrained(weights, config, source, layout, file.part, memory=memory, mapped=file.mapped), lora
