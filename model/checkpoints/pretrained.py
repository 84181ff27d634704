"""Loads checkpoints of the Wan 2.1 family into our model, merges a LoRA into them, and converts them.

The known layouts are that of the original release, that of diffusers (folders with shards too), and those of the .pt
files of Self-Forcing, LongLive and MemFlow. `layouts` has their names of weights, `containers` their kinds of files.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memflow_ops.model.checkpoints import native
from memflow_ops.model.checkpoints.containers import EMA, PLAIN, WeightFile, read_weights
from memflow_ops.model.checkpoints.fingerprint import fingerprint
from memflow_ops.model.checkpoints.layouts import bare_name, diffusers_name, infer_config, is_diffusers, original_name
from memflow_ops.model.checkpoints.lora import Lora, merge_lora, parse_lora, split_lora
from memflow_ops.model.checkpoints.lora_config import config_of_metadata, read_lora_config
from memflow_ops.model.checkpoints.provenance import prefers_ema, tuned_for
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
    other_part: str = ""
    """The entry with the averaged weights, or with those of the last step, that the .pt holds too."""
    lora: str = ""
    """The LoRA that was merged, in words."""
    memory: str = "memflow"
    """The `StreamSettings.memory` that the weights were tuned for."""
    positions: str = "absolute"
    """The `StreamSettings.positions` that they were tuned for, where memory is memflow."""

    def build(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> CausalVideoModel:
        """The model, in eval mode. It shares the weights that have this dtype and device already. dtype: of the
        weights; None: `self.dtype`."""
        dtype = dtype or self.dtype
        check_dtype(dtype)
        model = native.fill_model(native.empty_model(self.config), self.weights, dtype, device)
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

    def fingerprint(self) -> str:
        """Of the weights, a LoRA included; see `fingerprint`."""
        return fingerprint(self.weights.items())


def read_pretrained(
    path: Path | str,
    *,
    lora: Path | str | None = None,
    lora_alpha: float | None = None,
    num_heads: int | None = None,
    text_len: int | None = None,
    memory: str | None = None,
    positions: str | None = None,
    ema: bool | None = None,
) -> Pretrained:
    """Reads a checkpoint, our own or one of a known layout, and merges a LoRA into it. Nothing that happens to the file
    later changes what was read.

    path: a file of safetensors or torch.save, a model's folder or that of a whole diffusers pipeline.
    lora: a file or folder, of the forms that `lora` knows. A LoRA inside the checkpoint itself is always merged.
    lora_alpha: of that LoRA, or without one of the checkpoint's own, in place of what its file says; see `parse_lora`.
    num_heads, text_len: for checkpoints without a config.json, whose shapes do not tell them. By default width / 128
        and 512.
    memory: the kind of memory that the weights were tuned for. None: as our own checkpoint states it; otherwise
        "released" if the names of the file and its folders speak of MemFlow, and "memflow" if not.
    positions: those that the weights were tuned for. None: as our own checkpoint states them, else "absolute".
    ema: whether to take the averaged weights of a .pt (`generator_ema`) or those of the last step (`generator`). None:
        what there is; where both are, the averaged ones, but not of LongLive and MemFlow, by the names.

    A ValueError names every weight that is missing, unexpected or of the wrong shape, as the file names it.
    """
    path = Path(path)
    file = read_weights(path, ema=ema, prefer_ema=prefers_ema(path))
    if ema is not None and file.part not in (EMA, PLAIN):
        raise ValueError(
            f"{path} is no .pt with {EMA} or {PLAIN}, between which {'--ema' if ema else '--no-ema'} chooses: leave it "
            f"out"
        )
    if native.is_ours(file.metadata) or ("origin" in file.metadata and "config" in file.metadata):
        pretrained = _ours(file, str(path), num_heads, text_len, memory)
        own_lora: dict[str, Tensor] = {}
    else:
        try:
            pretrained, own_lora = _foreign(file, str(path), num_heads, text_len, memory)
        except ValueError as error:
            if "config" not in file.metadata:
                raise
            raise ValueError(f"{error} (the config in its metadata is none of ours and cannot be used)") from error
    merged = []
    pretrained = replace(pretrained, positions=positions or _said(file, "positions") or "absolute")
    if own_lora:
        alpha = lora_alpha if lora is None else None
        merged.append(parse_lora(own_lora, read_lora_config(file.path), str(path), alpha))
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
    config = config_of_metadata(file.metadata, str(path))
    if config is None:
        config = read_lora_config(file.path)
    return parse_lora(tensors, config, str(path), alpha)


def convert(pretrained: Pretrained, out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a checkpoint of our own; its metadata has config, origin, and the memory and positions it was tuned for.

    dtype: of every tensor in the file; None keeps each tensor's own. A ValueError names the tensors with numbers that
        this dtype cannot hold.
    """
    native.save_checkpoint(out, in_dtype(pretrained, dtype), pretrained.config, {"origin": origin(pretrained)})


def in_dtype(pretrained: Pretrained, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The weights in this dtype (None: each in its own). A ValueError names those with numbers that it cannot hold."""
    check_dtype(dtype or pretrained.dtype)
    weights = {name: tensor.to(dtype or tensor.dtype) for name, tensor in pretrained.weights.items()}
    native.check_finite(weights, f"{pretrained.source} in {dtype or pretrained.dtype}")
    return weights


def origin(pretrained: Pretrained) -> str:
    """Where the weights come from, for the metadata of a file, as JSON. It has the file's name and not the whole path,
    which is private to the user."""
    said = {name: getattr(pretrained, name) for name in ("layout", "part", "lora", "memory", "positions")}
    return json.dumps({**said, "source": Path(pretrained.source).name})


def check_dtype(dtype: torch.dtype) -> None:
    """A ValueError for a dtype that the model cannot compute in."""
    if dtype not in FLOATS:
        raise ValueError(f"the weights' dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")


def _ours(file: WeightFile, source: str, num_heads: int | None, text_len: int | None, memory: str | None) -> Pretrained:
    config = native.config_of(file.metadata, source)
    for name, value in (("num_heads", num_heads), ("text_len", text_len)):
        if value not in (None, getattr(config, name)):
            raise ValueError(f"{source} says itself that {name} is {getattr(config, name)}, got {value}; leave it out")
    native.check_state_dict(native.empty_model(config), file.tensors, source)
    native.check_dtypes(file.tensors, source)
    memory = memory or _said(file, "memory") or "memflow"
    return Pretrained(dict(file.tensors), config, source, "our", memory=memory)


def _said(file: WeightFile, name: str) -> str:
    """The memory or the positions that a file which we have written says its weights were tuned for; "" of others."""
    try:
        said = json.loads(file.metadata.get("origin", "{}"))
    except ValueError:
        return ""
    value = said.get(name) if isinstance(said, dict) else ""
    return value if isinstance(value, str) else ""


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
    native.check_dtypes(weights, source, names.__getitem__)
    stated = file.stated or native.stated_config(file.metadata)
    config = infer_config(weights, stated, source, num_heads=num_heads, text_len=text_len)
    # The prefix before every name in the file, so that a missing weight is named as the file would name it.
    prefix = names["patch_embedding.weight"].removesuffix("patch_embedding.weight")

    def in_file(ours: str) -> str:
        return names.get(ours) or prefix + (diffusers_name(ours) if diffusers else ours)

    native.check_state_dict(native.empty_model(config), weights, source, in_file)
    layout = "diffusers" if diffusers else "original"
    memory = memory or _said(file, "memory") or tuned_for(Path(source))
    return Pretrained(weights, config, source, layout, file.part, file.other_part, memory=memory), lora
