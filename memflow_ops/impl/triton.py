"""`impl="triton"`: our kernels. Triton is imported with this module and nowhere before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention import backward, forward
from memflow_ops.kernels.cache_write import write_projections
from memflow_ops.kernels.retrieval.choose import retrieve_frames
from memflow_ops.kernels.selection import groups
from memflow_ops.kernels.selection.describe import describe_blocks

__all__ = [
    "attend",
    "attend_backward",
    "describe_blocks",
    "retrieve_frames",
    "select_and_attend",
    "select_blocks",
    "write_projections",
]


def select_blocks(q: Tensor, descriptors: Tensor, top_k: int, geometry: Geometry) -> Tensor:
    return groups.select_blocks(
        q,
        descriptors,
        top_k,
        geometry.query_group,
        geometry.memory_frames,
        geometry.memory_slots,
        geometry.blocks_per_frame,
    )


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    indices: Tensor,
    geometry: Geometry,
    resume: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    return forward.attend(q, k, v, memory_k, memory_v, indices, **_sizes(geometry), **_resumed(resume))


def select_and_attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    memory_k: Tensor,
    memory_v: Tensor,
    descriptors: Tensor,
    top_k: int,
    geometry: Geometry,
    resume: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return forward.select_and_attend(
        q,
        k,
        v,
        memory_k,
        memory_v,
        descriptors,
        top_k=top_k,
        memory_frames=geometry.memory_frames,
        **_sizes(geometry),
        **_resumed(resume),
    )


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    return backward.attend_backward(
        grad_out, grad_lse, q, k, v, memory_k, memory_v, indices, out, lse, wanted=wanted, **_sizes(geometry)
    )


def _sizes(geometry: Geometry) -> dict[str, Any]:
    names = ("block_size", "frame_tokens", "query_group", "softmax_scale", "memory_slots")
    return {name: getattr(geometry, name) for name in names}


def _resumed(resume: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    return {} if resume is None else {"resume_out": resume[0], "resume_lse": resume[1]}
