"""Memory as one operator for compiled code, the same for every memory, layer and chunk.

Which memory and which layer it is stands in tensors, because torch.compile compiles anew for every int that it meets in
Python. So the blocks of a model share one graph, and memory adds one node to it.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_memories: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(memory: Any) -> int:
    """Gives a memory the number under which `attend_in_memory` finds it, for as long as it lives."""
    number = next(_numbers)
    _memories[number] = memory
    return number


@torch.library.custom_op("memflow_ops::attend_in_memory", mutates_args=())
def attend_in_memory(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, layer: Tensor) -> Tensor:
    """Writes a layer of the open chunk into a memory, and attends to the chunk and its past.

    q, k, v: (B, chunk tokens, H, D), normalised and not rotated. memory, layer: numbers in int64 tensors on the CPU.
    What is written no other operator reads, so it is no argument. Returns (B, chunk tokens, H, D), contiguous.
    """
    attended: Tensor = _memories[int(memory)].passes.current.attend(int(layer), q, k, v)
    return attended.contiguous()


@attend_in_memory.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, layer: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _no_backward(ctx: Any, gradient: Tensor) -> Any:
    raise RuntimeError(NO_COMPILED_GRADIENTS)


attend_in_memory.register_autograd(_no_backward)

NO_COMPILED_GRADIENTS = (
    "a compiled model has no gradients through memory: call it under torch.no_grad(), or train the model without "
    "torch.compile"
)
