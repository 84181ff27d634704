"""Whether a transformer is one whose self-attention our processor can take the place of."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memflow_ops.rotary import apply_rotation, rope_rotation

CALLED_WITH = ("hidden_states", "encoder_hidden_states", "attention_mask", "rotary_emb")
"""What Wan's attention is called with. Whatever takes more, computes more."""
TOKENS = 32
"""Tokens of the random input on which their attention and ours are compared."""


def check_structure(transformer: Any) -> None:
    """A TypeError unless the model is built like diffusers' WanTransformer3DModel, all of its attention included."""
    name = type(transformer).__name__

    def refuse(reason: str) -> TypeError:
        return TypeError(f"attach_memory takes a model that is built like diffusers' WanTransformer3DModel; {reason}")

    for path in ("config.patch_size", "blocks", "patch_embedding.weight", "rope", "condition_embedder.text_embedder"):
        if _at(transformer, path) is None:
            raise refuse(f"{name} has no {path}")
    patch = transformer.config.patch_size
    if not isinstance(patch, Sequence) or len(patch) != 3 or patch[0] != 1:
        raise refuse(f"a patch of {name} is {patch} frames, rows and columns (expected one frame)")
    if not len(transformer.blocks):
        raise refuse(f"{name} has no blocks")
    known = set()
    for number, block in enumerate(transformer.blocks):
        for attention, parts in (
            ("attn1", "to_q to_k to_v to_out norm_q norm_k heads processor"),
            ("attn2", "to_k norm_k heads"),
        ):
            module = getattr(block, attention, None)
            lacking = [part for part in parts.split() if getattr(module, part, None) is None]
            if lacking:
                raise refuse(f"blocks.{number}.{attention} of {name} has no {', '.join(lacking)}")
            known.add(module)
        taken = inspect.signature(block.attn1.forward).parameters.values()
        names = tuple(p.name for p in taken if p.kind is not p.VAR_KEYWORD)
        if names != CALLED_WITH:
            raise refuse(f"blocks.{number}.attn1 of {name} takes {', '.join(names)}, expected {', '.join(CALLED_WITH)}")
    others = [
        path for path, module in transformer.named_modules() if hasattr(module, "set_processor") and module not in known
    ]
    if others:
        raise refuse(f"{name} has further attention, which would see no memory: {', '.join(others[:3])}")


def check_attention(
    transformer: Any, size: tuple[int, int], grid: tuple[int, int], frames: int, device: torch.device
) -> None:
    """A ValueError unless RoPE and self-attention compute what ours will, for a chunk of `frames` frames of latents.

    size: rows and columns of the latents. grid: those of the tokens. Every layer is called once, with little input.
    """
    latents = torch.zeros((), dtype=torch.float32, device=device).expand(
        1, transformer.config.in_channels, frames, *size
    )
    theirs = transformer.rope(latents)
    ours = wan_rotation(transformer.config.attention_head_dim, frames, grid, device)
    check_rotation(theirs, ours)
    for number, block in enumerate(transformer.blocks):
        attn = block.attn1
        few = min(TOKENS, ours[0].shape[1])
        with evaluated(attn), torch.no_grad():
            cosines, sines = ours
            generator, shape = torch.Generator("cpu").manual_seed(number), (1, few, attn.to_out[0].in_features)
            x = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            x = x.to(device, transformer.patch_embedding.weight.dtype)
            expected = attn(x, None, None, (theirs[0][:, :few], theirs[1][:, :few]))
            got = _plain_attention(attn, x, (cosines[:, :few], sines[:, :few]))
        off, largest = (float(y.abs().max()) for y in (got.float() - expected.float(), expected.float()))
        if math.isfinite(largest) and not off <= (0.05 if expected.dtype.itemsize < 4 else 0.01) * largest:
            raise ValueError(
                f"blocks.{number}.attn1 does not compute softmax attention with Wan's RoPE, which memory would take "
                f"the place of: its processor is {type(attn.processor).__name__}, and its output differs by {off:.3g} "
                f"of {largest:.3g}"
            )


def wan_rotation(
    head_dim: int, frames: int, grid: tuple[int, int], device: torch.device, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of Wan's RoPE for a chunk of frames of `grid` tokens whose first frame is `first`."""
    places = (
        torch.arange(start, start + size, dtype=torch.int64, device=device)
        for start, size in ((first, frames), (0, grid[0]), (0, grid[1]))
    )
    return rope_rotation(head_dim, *places)


def check_rotation(theirs: Any, ours: tuple[Tensor, Tensor]) -> None:
    """A ValueError unless diffusers' `rotary_emb` of a chunk turns as ours does with the chunk at frame 0."""
    if not (isinstance(theirs, (tuple, list)) and len(theirs) == 2 and all(isinstance(x, Tensor) for x in theirs)):
        raise ValueError(f"the model's RoPE must be a pair of cosines and sines, got {type(theirs).__name__}")
    for name, x, own, first in (("cosines", theirs[0], ours[0], 0), ("sines", theirs[1], ours[1], 1)):
        expected = (*own.shape[:3], 2 * own.shape[3])
        if tuple(x.shape) != expected:
            raise ValueError(f"the {name} of the model's RoPE must have shape {expected}, got {tuple(x.shape)}")
        off = float((x[..., first::2].float() - own).abs().max())
        if not off <= (1e-4 if x.dtype.itemsize >= 4 else 0.02):
            raise ValueError(
                f"the model's RoPE is not Wan's: the frames, rows and columns of a chunk turn by other angles ({name} "
                f"differ by {off:.3g}), and memory would rotate by Wan's"
            )


def uncompiled(transformer: Any) -> Any:
    """The module that `torch.compile(transformer)` has wrapped; others as they are."""
    return getattr(transformer, "_orig_mod", transformer)


def device_of(transformer: Any) -> torch.device:
    """Where the model runs: for a model that is offloaded between calls, where its hook takes it."""
    hook = getattr(transformer, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return torch.device(transformer.patch_embedding.weight.device if device is None else device)


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, without dropout, and then each of its parts in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def projections(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, L, H, D) of a self-attention, normalised and not rotated."""
    if getattr(attn, "fused_projections", False):
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    q, k = attn.norm_q(q), attn.norm_k(k)
    return q.unflatten(2, (attn.heads, -1)), k.unflatten(2, (attn.heads, -1)), v.unflatten(2, (attn.heads, -1))


def _plain_attention(attn: Any, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """The output of a self-attention over x alone."""
    q, k, v = projections(attn, x)
    q, k = apply_rotation(q.to(v.dtype), *rotation), apply_rotation(k.to(v.dtype), *rotation)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return attn.to_out[1](attn.to_out[0](out.flatten(2)))


def _at(x: Any, path: str) -> Any:
    for name in path.split("."):
        x = getattr(x, name, None)
    return x
