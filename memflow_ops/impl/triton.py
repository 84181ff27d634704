"""`impl="triton"`: our kernels. Triton is imported with this module and nowhere before it."""

import torch

from memflow_ops.geometry import Geometry, WriteTarget
from memflow_ops.impl.torch import selection
from memflow_ops.kernels.attention.backward import attend_backward
from memflow_ops.kernels.attention.plan import attend
from memflow_ops.kernels.cache_write import write_projections as _write_projections
from memflow_ops.kernels.retrieval.choose import retrieve_frames
from memflow_ops.kernels.selection.describe import describe_blocks
from memflow_ops.kernels.selection.groups import select_blocks as _select_blocks
from memflow_ops.kernels.selection.groups import takes_spans
from memflow_ops.rotary import with_other_pairs

__all__ = [
    "attend",
    "attend_backward",
    "describe_blocks",
    "retrieve_frames",
    "select_blocks",
    "write_projections",
]


def select_blocks(q: torch.Tensor, descriptors: torch.Tensor, top_k: int, geometry: Geometry) -> torch.Tensor:
    """See the kernels' `select_blocks`.

    Where a group has several parts that are normalised by themselves, and more blocks are chosen than registers hold,
    torch ranks them.
    """
    blocks = geometry.bank_blocks(descriptors.shape[1] // geometry.blocks_per_frame)
    if geometry.parts > 1 and not takes_spans(blocks, top_k):
        return selection.select_blocks(q, descriptors, top_k, geometry)
    return _select_blocks(q, descriptors, top_k, geometry)


def write_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float],
    target: WriteTarget,
    memory_rotation: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    memory_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """See the kernels' `write_projections`, whose second rotation has all pairs."""
    cosines, sines = memory_rotation
    if cosines is not None and sines is not None and cosines.shape[-1] < rotation[0].shape[-1]:
        memory_rotation = with_other_pairs((cosines, sines), rotation)
    return _write_projections(q, k, v, rotation, norm, target, memory_rotation, memory_q)
