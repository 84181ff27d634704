"""The names that other projects give to the weights of Wan 2.1, and the sizes of a model by the shapes of its weights.

Our names are those of the original release. diffusers has its own, and training code adds wrappers and prefixes to
either.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from memflow_ops.model.wan.transformer import ModelConfig

_WRAPPERS = frozenset(("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"))
"""Parts of names that FSDP, activation checkpointing, torch.compile and DDP add."""
PEFT = "base_model.model."
"""What peft puts before the name that a module has in the model that was trained."""
_PREFIXES = (PEFT, "generator.", "diffusion_model.", "transformer.", "model.")
"""Prefixes that training code (such as Self-Forcing), peft and collections of several models put before all names."""

_DIFFUSERS = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k"}
_DIFFUSERS_BLOCK = {
    **{f"attn1.{theirs}": f"self_attn.{ours}" for theirs, ours in _ATTENTION.items()},
    **{f"attn2.{theirs}": f"cross_attn.{ours}" for theirs, ours in _ATTENTION.items()},
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}

_STATED = {
    "num_attention_heads": "num_heads",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    **{name: name for name in ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim")},
    **{name: name for name in ("text_len", "freq_dim", "patch_size", "eps")},
}
"""Entries of a config.json, the original's or diffusers' -> fields of `ModelConfig`."""

_TEXT_TO_VIDEO = ("t2v", "ti2v")
"""What the config.json of Wan's releases calls the models that make a video of text alone."""
_COUNTS = ("num_heads", "text_len")

HEAD_DIM = 128
"""Head size of every released Wan model; the shapes of the weights do not tell it."""
TEXT_LEN = 512
"""Text length of every released Wan model; the shapes of the weights do not tell it."""


def bare_name(name: str) -> str:
    """A weight's name without wrappers and without the prefixes that its file puts before all names."""
    return _without_prefixes(name)[-1]


def trained_names(module: str) -> list[str]:
    """The names that a module of a LoRA's file may have had in the model that was trained. Where peft's own prefix
    stands before it, this is exactly one. Otherwise it is the name with and without the known prefixes, and in both
    layouts, because programs that convert a file seldom touch its config."""
    names = _without_prefixes(module)
    if names[0].startswith(PEFT):
        return [names[0].removeprefix(PEFT)]
    bare = dotted_name(names[-1])
    return list(dict.fromkeys([*names, bare, original_name(bare), diffusers_name(bare)]))


def dotted_name(module: str) -> str:
    """A module's name with dots, where a program for LoRAs has written it with underscores, such as
    `lora_unet_blocks_0_ffn_0`; any other name as it is."""
    found = re.fullmatch(r"lora_unet_+(?:blocks_(\d+)_)?(\w+)", module)
    if not found:
        return module
    tables = (_DIFFUSERS_BLOCK if found[1] else _DIFFUSERS).items()
    modules = {name.replace(".", "_"): name for pair in tables for name in pair}
    return (f"blocks.{found[1]}." if found[1] else "") + modules.get(found[2], found[2])


def _without_prefixes(name: str) -> list[str]:
    """A name without wrappers, and what remains of it each time that a prefix is taken off."""
    names = [".".join(part for part in name.split(".") if part not in _WRAPPERS)]
    while prefix := next((prefix for prefix in _PREFIXES if names[-1].startswith(prefix)), ""):
        names.append(names[-1][len(prefix) :])
    return names


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these bare names are those of diffusers."""
    return any(re.match(r"condition_embedder\.|proj_out\.|blocks\.\d+\.attn[12]\.", name) for name in names)


def original_name(name: str) -> str:
    """The original name for a bare name of diffusers. A name that diffusers does not have is returned as it is."""
    return _renamed(name, _DIFFUSERS, _DIFFUSERS_BLOCK)


def diffusers_name(name: str) -> str:
    """The inverse of `original_name`."""
    return _renamed(
        name,
        {ours: theirs for theirs, ours in _DIFFUSERS.items()},
        {ours: theirs for theirs, ours in _DIFFUSERS_BLOCK.items()},
    )


def _renamed(name: str, outside: Mapping[str, str], inside: Mapping[str, str]) -> str:
    """name: of a parameter or a module. outside, inside: the tables for names outside and inside of the blocks."""
    found = re.match(r"blocks\.\d+\.", name)
    prefix, table = (found[0], inside) if found else ("", outside)
    rest = name[len(prefix) :]
    module, dot, leaf = rest.rpartition(".")
    if rest in table:
        return prefix + table[rest]
    return prefix + table.get(module, module) + dot + leaf


def infer_config(
    weights: Mapping[str, Tensor],
    stated: Mapping[str, Any],
    source: str,
    *,
    num_heads: int | None = None,
    text_len: int | None = None,
) -> ModelConfig:
    """The sizes of the model that has these weights (original names).

    stated: the config.json beside the weights, {} if there is none. It gives what shapes do not tell (heads, text
        length, eps) and must agree with the shapes on the rest.
    num_heads, text_len: override `stated`.

    A ValueError names the weights that are missing or of the wrong rank, and refuses a model that needs more than text.
    """
    sizes = _sizes_of_weights(weights, source)
    kind = str(stated.get("model_type") or "t2v")
    if sizes["in_dim"] != sizes["out_dim"] or kind not in _TEXT_TO_VIDEO:
        raise ValueError(
            f"{source} takes {sizes['in_dim']} channels and makes {sizes['out_dim']}"
            + (f", and its config.json calls it {kind!r}" if "model_type" in stated else "")
            + ": it is no text-to-video model (image-to-video models, for example, take a picture as further channels)"
            "; give one that takes as many channels as it makes"
        )
    said = {ours: stated[theirs] for theirs, ours in _STATED.items() if stated.get(theirs) is not None}
    if "patch_size" in said:
        said["patch_size"] = tuple(said["patch_size"])
    wrong = [
        f"{name} is {said[name]}, by the shapes {size}" for name, size in sizes.items() if said.get(name, size) != size
    ]
    if wrong:
        raise ValueError(f"{source}: its config.json contradicts its weights: {'; '.join(wrong)}")
    said |= {name: value for name, value in (("num_heads", num_heads), ("text_len", text_len)) if value is not None}
    for name in _COUNTS:
        if name in said and (isinstance(said[name], bool) or not isinstance(said[name], int) or said[name] < 1):
            raise ValueError(f"{source}: {name} must be a whole number from 1 on, got {said[name]!r}")
    dim, heads = sizes["dim"], said.get("num_heads")
    if heads is None:
        if dim % HEAD_DIM:
            raise ValueError(
                f"{source}: the number of heads is not stated and cannot be seen in the shapes (width {dim} is no "
                f"multiple of {HEAD_DIM}, Wan's head size); give num_heads (--num-heads)"
            )
        heads = dim // HEAD_DIM
    head_dim = stated.get("attention_head_dim")
    if head_dim is not None and num_heads is None and heads * head_dim != dim:
        raise ValueError(
            f"{source}: its config.json says {heads} heads of {head_dim}, by the shapes the width is {dim}"
        )
    eps = said.get("eps", ModelConfig.eps)
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps > 0:
        raise ValueError(f"{source}: eps must be a number above 0, got {eps!r}")
    return ModelConfig(**sizes, num_heads=heads, text_len=said.get("text_len", TEXT_LEN), eps=eps)


def _sizes_of_weights(weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that the shapes of the weights tell."""
    ranks = {"patch_embedding": 5, "text_embedding.0": 2, "time_embedding.0": 2, "head.head": 2, "blocks.0.ffn.0": 2}
    shapes = {name: tuple(weights[f"{name}.weight"].shape) for name in ranks if f"{name}.weight" in weights}
    missing = [f"{name}.weight" for name in ranks if name not in shapes]
    if missing:
        some = ", ".join(sorted(weights)[:5]) or "none"
        raise ValueError(f"{source} is no Wan 2.1 transformer: missing {', '.join(missing)}; the first it has: {some}")
    for name, rank in ranks.items():
        if len(shapes[name]) != rank:
            raise ValueError(f"{source}: {name}.weight must have {rank} dimensions, got shape {shapes[name]}")
    dim, in_dim, *patch_size = shapes["patch_embedding"]
    blocks = {int(found[1]) for found in (re.match(r"blocks\.(\d+)\.", name) for name in weights) if found}
    return {
        "dim": dim,
        "ffn_dim": shapes["blocks.0.ffn.0"][0],
        "num_layers": max(blocks) + 1,
        "in_dim": in_dim,
        "out_dim": shapes["head.head"][0] // math.prod(patch_size),
        "text_dim": shapes["text_embedding.0"][1],
        "freq_dim": shapes["time_embedding.0"][1],
        "patch_size": tuple(patch_size),
    }
