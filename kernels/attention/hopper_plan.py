"""Which launches of the forward pass the kernel for Hopper takes, and how it is launched."""

import torch

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.blocks import Frames, Segment
from memflow_ops.kernels.configs import hopper_config
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import strided

ROWS = 128
"""Queries of a program."""


def plan_hopper_attend(
    q: torch.Tensor,
    segment: Segment,
    frames: Frames | None,
    indices: torch.Tensor | None,
    geometry: Geometry,
    resume: tuple[torch.Tensor, torch.Tensor] | None,
    query_group: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    capability: int,
) -> Launch | None:
    """The launch that fills out and lse; None: attend_kernel does, because it is chosen or because of `hopper_takes`.

    segment: the window, or with `frames` and `indices` the bank. The others: see plan_attend.
    """
    block_size = None if frames is None else geometry.block_size
    config = hopper_config(capability, q.dtype, q.shape[-1], block_size)
    if config is None or not hopper_takes(segment, frames is None, geometry, query_group):
        return None
    # Gluon is imported where it is used, because triton's versions differ in it.
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from memflow_ops.kernels.attention.hopper_forward import hopper_attend_kernel

    block_n, stages = config
    tokens = None if frames is None else frames.tokens
    tensors = [by_head(x, tokens) for x in (segment.k, segment.v)]
    box = [1] * (tensors[0].dim() - 2) + [block_n, q.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(box, getattr(gl, str(q.dtype).removeprefix("torch.")))
    keys, values = (TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout) for x in tensors)
    batch, queries, heads, _ = q.shape
    arguments = dict(
        q=strided(q),
        keys=keys,
        values=values,
        frames=frames,
        indices=None if indices is None else strided(indices),
        resume=None if resume is None else (strided(resume[0]), strided(resume[1])),
        out=strided(out),
        lse=strided(lse),
        queries=queries,
        window_keys=geometry.window_keys(segment.k) if frames is None else 0,
        query_group=query_group,
        entries=0 if indices is None else indices.shape[-1],
        softmax_scale=float(geometry.softmax_scale),
        NEGATIVE_SCALE=geometry.softmax_scale < 0,
        HEADS_PER_KV_HEAD=heads // segment.k.shape[2],
        BLOCK_SIZE=block_size,
        STAGES=stages,
    )
    grid = (cdiv(queries, query_group) * cdiv(query_group, ROWS), heads, batch)
    return Launch(hopper_attend_kernel, grid, arguments, dict(num_warps=4, num_stages=1))


def hopper_takes(segment: Segment, is_window: bool, geometry: Geometry, query_group: int) -> bool:
    """Whether the kernel for Hopper can walk over a window or over a bank.

    It takes a window in one piece whose keys are all valid and seen by all queries, and a bank of half precision whose
    selection more than 64 queries share. Copies by TMA want addresses and strides that 16 bytes divide.
    """
    if is_window and (not geometry.sees_all or segment.frames is not None):
        return False
    if segment.scales is not None or 2 * query_group <= ROWS:
        return False
    return all(aligned(x) for x in (segment.k, segment.v))


def aligned(x: torch.Tensor) -> bool:
    """Whether 16 bytes divide where each row of the tensor begins."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and all(s * size % 16 == 0 for s in x.stride()[:-1])


def by_head(x: torch.Tensor, frame_tokens: int | None) -> torch.Tensor:
    """Keys or values (B, L, Hkv, D) as (B, Hkv, L, D), or with `frame_tokens` as (B, Hkv, frames, frame_tokens, D)."""
    x = x.transpose(1, 2)
    return x if frame_tokens is None else x.unflatten(2, (-1, frame_tokens))
