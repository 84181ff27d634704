"""The attention processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memflow_ops.integrations.diffusers.checks import projections
from memflow_ops.integrations.diffusers.memory import WanMemory
from memflow_ops.integrations.diffusers.operator import attend_in_memory


class WanMemoryProcessor:
    """The processor of one self-attention layer; `before` is the one that it replaced, which runs between chunks."""

    def __init__(self, memory: WanMemory, layer: int, before: Any):
        self.memory, self.layer, self.before = memory, layer, before
        # Compiled code takes numbers in tensors as inputs, where it would compile anew for every int.
        self.number = memory.number
        self.layer_number = torch.tensor(layer, dtype=torch.int64, device="cpu")

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Called by diffusers. rotary_emb begins at frame 0 in every chunk, so the cache's own rotation replaces it."""
        memory = self.memory
        compiling = torch.compiler.is_compiling()
        this_pass = None if compiling else memory.passes.of(rotary_emb)
        if this_pass is None and not (compiling and memory.is_open):
            return self.before(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **options)
        if encoder_hidden_states is not None or attention_mask is not None or options:
            raise ValueError(
                f"memory is for self-attention without a mask or further options; got {', '.join(options) or 'a mask'}"
            )
        memory.check_tokens(hidden_states, rotary_emb)
        if memory.order is not None:
            hidden_states = memory.order.apply(hidden_states)
        projected = projections(attn, hidden_states)
        q, k, v = (x.to(memory.layout.dtype) for x in projected)
        if this_pass is None:
            out = attend_in_memory(q, k, v, self.number, self.layer_number)
        else:
            out = this_pass.attend(self.layer, q, k, v)
        out = attn.to_out[1](attn.to_out[0](out.to(projected[2].dtype).flatten(2)))
        return out if memory.order is None else memory.order.undo(out)
