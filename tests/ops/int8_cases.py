"""Cases of memory_attention with an int8 bank, made from cases with an exact one."""

from __future__ import annotations

from dataclasses import replace

import torch
from attention_cases import Case
from torch import Tensor

import memflow_ops


def int8_case(case: Case, score: str = "mean") -> tuple[Case, Case]:
    """The case with its bank as int8, and one whose bank are the numbers that it stands for, rounded to its dtype.

    Both have the descriptors of the exact keys, and so one selection.
    """
    size, frame = case.options["block_size"], case.options["frame_tokens"]
    descriptors = memflow_ops.describe_blocks(case.memory_k, size, frame, moments=1 if score == "mean" else 2)
    made = memflow_ops.quantise_memory(case.memory_k, case.memory_v, descriptors, block_size=size, frame_tokens=frame)
    k, v = numbers(made, descriptors, size, frame)
    options = {**case.options, "memory_descriptors": descriptors, "score": score}
    scales = {"memory_k_scale": made.memory_k_scale, "memory_v_scale": made.memory_v_scale}
    int8 = replace(case, memory_k=made.memory_k, memory_v=made.memory_v, options={**options, **scales})
    return int8, replace(case, memory_k=k.to(case.q.dtype), memory_v=v.to(case.q.dtype), options=options)


def numbers(
    made: memflow_ops.Int8Memory, descriptors: Tensor, block_size: int, frame_tokens: int
) -> tuple[Tensor, Tensor]:
    """Keys and values that an int8 bank stands for, in float64, token by token."""
    k, v, k_scale, v_scale = (x.double() for x in made)
    per_frame = -(-frame_tokens // block_size)
    token = torch.arange(k.shape[1])
    block = token // frame_tokens * per_frame + token % frame_tokens // block_size
    means = descriptors.double()[:, block, :, : k.shape[3]]
    return means + k_scale[:, block] * k, v_scale[..., None] * v


def in_float64(case: Case) -> Case:
    """The same int8 bank, and all else in float64."""
    wide = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in case.options.items()}
    memory_k, memory_v = case.memory_k, case.memory_v
    return Case(case.q.double(), case.k.double(), case.v.double(), memory_k, memory_v, wide)
