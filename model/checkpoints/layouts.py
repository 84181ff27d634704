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
_PREFIXES = ("base_model.model.", "generator.", "diffusion_model.", "transformer.", "model.")
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

HEAD_DIM = 128
"""Head size of every released Wan model; the shapes of the weights do not tell it."""
TEXT_LEN = 512
"""Text length of every released Wan model; the shapes of the weights do not tell it."""


def bare_name(name: str) -> str:
    """A weight's name without wrappers and without the prefixes that its file puts before all names."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    found = True
    while found:
        found = False
        for prefix in _PREFIXES:
            if name.startswith(prefix):
                name, found = name[len(prefix) :], True
    return name


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

    A ValueError names the weights that are missing or of the wrong rank.
    """
    sizes = _sizes_of_weights(weights, source)
    said = {ours: stated[theirs] for theirs, ours in _STATED.items() if stated.get(theirs) is not None}
    if "patch_size" in said:
        said["patch_size"] = tuple(said["patch_size"])
    wrong = [
        f"{name} is {said[name]}, by the shapes {size}" for name, size in sizes.items() if said.get(name, size) != size
    ]
    if wrong:
        raise ValueError(f"{source}: its config.json contradicts its weights: {'; '.join(wrong)}")
    dim, heads = sizes["dim"], num_heads or said.get("num_heads")
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
    text_len = text_len or said.get("text_len", TEXT_LEN)
    return ModelConfig(**sizes, num_heads=heads, text_len=text_len, eps=said.get("eps", ModelConfig.eps))


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
