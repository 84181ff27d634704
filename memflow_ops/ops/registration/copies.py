"""The operators on copies of selected blocks, as torch sees them: schema and fake. They have no gradient.

What they do stands in memflow_ops/impl/torch/copies.py. `attend_to_memory`, which calls them, has checked everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry, Int8Bank
from memflow_ops.impl.precision import without_autocast
from memflow_ops.impl.torch import copies


@torch.library.custom_op("memflow_ops::copy_selected", mutates_args=("target_k", "target_v", "hidden"))
def copy_selected(
    memory_k: Tensor,
    memory_v: Tensor,
    indices: Tensor,
    memory_descriptors: Tensor | None,
    memory_k_scale: Tensor | None,
    memory_v_scale: Tensor | None,
    memory_slots: Tensor | None,
    target_k: Tensor,
    target_v: Tensor,
    hidden: Tensor,
    block_size: int,
    frame_tokens: int,
) -> None:
    int8 = Int8Bank.of(memory_descriptors, memory_k_scale, memory_v_scale)
    geometry = Geometry(block_size, frame_tokens, 1, 1.0, memory_slots, int8=int8)
    copies.copy_selected(memory_k, memory_v, indices, geometry, target_k, target_v, hidden)


@copy_selected.register_fake
def _(memory_k, *arguments) -> None:
    return None


@torch.library.custom_op("memflow_ops::attend_with_copies", mutates_args=())
def attend_with_copies(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, softmax_scale: float) -> Tensor:
    with without_autocast(q):
        return copies.attend_with_copies(q, k, v, hidden, softmax_scale)


@attend_with_copies.register_fake
def _(q, *arguments) -> Tensor:
    return q.new_empty(q.shape)
