"""The passes of a transformer over an open chunk, and how they are computed again for gradients.

A pass writes the cache and attends to it. Where it needs gradients, it attends to a copy of the past instead, so that
the cache may go on before the backward pass. Gradient checkpointing computes the blocks of a pass a second time, in
the backward pass, when another chunk may be open or none. It calls them with the same `rotary_emb`, which the
transformer makes once per pass: that is how a pass is known again.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from memflow_ops.cache.attend import attend_to_memory, attend_to_past
from memflow_ops.cache.views import Past
from memflow_ops.ops.registration.dispatch import needs_grad


class Pass:
    """One pass over an open chunk, or all passes of a kind that need no gradient."""

    def __init__(self, memory: Any, rotation: tuple[Tensor, Tensor], clean: bool, hidden_from_autograd: bool = False):
        """rotation: of the chunk's tokens. clean: this is the pass that leaves the keys which later chunks see.

        hidden_from_autograd: blocks run without gradients and will be computed again with them (reentrant checkpoints).
        """
        self.memory, self.rotation, self.clean = memory, rotation, clean
        self._hidden_from_autograd = hidden_from_autograd
        self._copies: dict[int, Past] = {}  # by layer, where the pass will be computed again
        self._again: set[int] = set()  # the layers for which it has been

    @property
    def is_awaited(self) -> bool:
        """Whether gradient checkpointing has still to compute layers of this pass again."""
        return not self._again.issuperset(self._copies)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of a layer; q, k, v (B, chunk tokens, H, D) are normalised and not rotated."""
        memory = self.memory
        sizes = (self.rotation, memory.selection, memory.layout, memory.impl)
        if in_backward():
            if layer not in self._copies:
                raise RuntimeError(
                    "memory: the backward pass computes a pass again that was not made for it; say "
                    "transformer.enable_gradient_checkpointing() before the pass"
                )
            self._again.add(layer)
            return attend_to_past(self._copies[layer], q, k, v, *sizes)
        if not (self._hidden_from_autograd or needs_grad(q, k, v)):
            attend = attend_to_memory(
                memory.cache,
                self.rotation,
                memory.selection,
                remember=self.clean,
                chosen=memory.chosen,
                reuse=memory.reuses_choice(layer, self.clean),
                impl=memory.impl,
            )
            out = attend(layer, q, k, v)
            memory.mark_chosen(layer, self.clean)
        else:
            with torch.no_grad():
                memory.cache.write_projections(layer, q, k, v, self.rotation, remember=self.clean, impl=memory.impl)
            past = memory.cache.past(layer, memory.cache.has_bank())
            if getattr(memory.transformer, "gradient_checkpointing", False):
                self._copies[layer] = past
            out = attend_to_past(past, q, k, v, *sizes)
        memory.mark_written(layer, self.clean)
        return out


class Passes:
    """Which pass a block is called in."""

    def __init__(self) -> None:
        self.current: Pass | None = None
        """What a pass over the open chunk does now; None between chunks."""
        self.called_with_grad = False
        """Whether the transformer was last called with gradients enabled."""
        # By the first tensor of `rotary_emb`; None: a pass without memory.
        self._differentiable = WeakIdKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Passes:
        other = Passes()
        other.current = copy.deepcopy(self.current, memo)
        return other

    def of(self, rotary_emb: Any) -> Pass | None:
        """The pass that calls a block with this `rotary_emb`; None: one without memory.

        A RuntimeError where a pass is computed again that is not known.
        """
        key = rotary_emb[0] if isinstance(rotary_emb, (tuple, list)) else None
        if in_backward():
            if key in self._differentiable:
                return self._differentiable[key]
            if self.current is not None or self.are_awaited:
                raise RuntimeError(
                    "memory: the backward pass calls the transformer as a whole again, and which chunk it was called "
                    "for is not known; use transformer.enable_gradient_checkpointing(), which goes block by block"
                )
            return None
        if key is None or not (torch.is_grad_enabled() or self.called_with_grad):
            return self.current
        if key not in self._differentiable:
            now = self.current
            hidden = not torch.is_grad_enabled()
            self._differentiable[key] = now and Pass(now.memory, now.rotation, now.clean, hidden)
        return self._differentiable[key]

    @property
    def are_awaited(self) -> bool:
        """Whether gradient checkpointing has still to compute passes over chunks again."""
        return any(known is not None and known.is_awaited for known in self._differentiable.values())


def in_backward() -> bool:
    """Whether autograd is at work in this thread, so that what is called now is computed again for it."""
    return torch._C._current_graph_task_id() != -1
