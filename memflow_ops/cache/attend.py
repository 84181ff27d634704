"""What a chunk attends to: the `attend` that the streaming loop hands to the model, over a cache of the past."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.views import Memory
from memflow_ops.ops.attention import memory_attention
from memflow_ops.ops.cache_write import QKNorm
from memflow_ops.ops.registration.dispatch import needs_grad
from memflow_ops.rotary import apply_rotation

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttendProjections:
    """An `Attend` that takes queries and keys before their norm too, and is given them so under `torch.no_grad`:
    what normalises, rotates and writes them does it in one pass."""

    projections: Callable[[int, Tensor, Tensor, Tensor, QKNorm | None], Tensor]
    """(layer, q, k, v, norm) -> out; without a norm, q and k have theirs behind them."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.projections(layer, q, k, v, None)


Observer = Callable[[int, Tensor, Memory], None]
"""observe(layer, q, memory): a chunk's rotated queries, (B, tokens, heads, head_dim), and what they choose from."""


def attend_to_memory(
    cache: FrameCache,
    rotation: tuple[Tensor, Tensor],
    *,
    sparse: bool,
    top_k: int,
    query_group: int | None,
    impl: str = "auto",
    chance: torch.Generator | None = None,
    remember: bool = False,
    keys_only: bool = False,
    observe: Observer | None = None,
) -> Attend:
    """The local window and what the cache remembers beyond it; writes the chunk's keys and values.

    rotation: of `rope_rotation`, for the chunk's tokens.
    sparse: each query group chooses `top_k` blocks of sink and bank; else everything that the cache keeps is dense.
    chance: the blocks are drawn at random instead, a control.
    remember: the clean pass of a new chunk, which takes the means for retrieval.
    keys_only: the last layer writes and does not attend, for `CausalVideoModel.forward_keys`.
    observe: is shown what each layer chooses from, where there is a choice.
    """
    has_bank = sparse and any(cache.bank_sizes())
    last = cache.layout.layers - 1

    def write(layer: int, q: Tensor, k: Tensor, v: Tensor, norm: QKNorm | None) -> Tensor:
        """Into the cache; the rotated queries."""
        if not needs_grad(q, k, v):
            return cache.write_projections(layer, q, k, v, rotation, norm, remember=remember, impl=impl)
        cache.write(layer, apply_rotation(k, *rotation), v)
        if remember:
            cache.remember(layer, k)
        return apply_rotation(q, *rotation)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, norm: QKNorm | None) -> Tensor:
        q = write(layer, q, k, v, norm)
        memory = cache.memory(layer)
        if has_bank and chance is not None:  # of descriptors without meaning every subset is as likely as any other
            meaningless = torch.randn(memory.descriptors.shape, generator=chance).to(memory.descriptors)
            memory = memory._replace(descriptors=meaningless)
        if has_bank and observe is not None:
            observe(layer, q, memory)
        if keys_only and layer == last:
            return q
        if not has_bank:
            # Sparse without a candidate yet: the window alone.
            keys, values = cache.window(layer) if sparse else cache.dense(layer)
            return cast(Tensor, memory_attention(q, keys, values, impl=impl))
        return _attend_selected(q, cache.window(layer), memory, cache.layout, top_k, query_group, impl)

    return AttendProjections(attend)


def attend_as_released(
    cache: ReleasedCache,
    rotation: tuple[Tensor, Tensor],
    top_frames: int | None,
    *,
    impl: str = "auto",
    keys_only: bool = False,
    observe: Observer | None = None,
) -> Attend:
    """Sink, bank and local window as the released MemFlow attends to them; otherwise as `attend_to_memory`.

    top_frames: frames of sink and bank that each head of a chunk keeps (sparse memory activation); None: all.
    """
    last = cache.layout.layers - 1

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = apply_rotation(q, *rotation)
        cache.write(layer, apply_rotation(k, *rotation), v)
        memory = cache.memory(layer)
        if top_frames is not None and observe is not None:
            observe(layer, q, memory)
        if keys_only and layer == last:
            return q
        if top_frames is None:
            return cast(Tensor, memory_attention(q, *cache.dense(layer), impl=impl))
        return _attend_selected(q, cache.window(layer), memory, cache.layout, top_frames, None, impl)

    return attend


def _attend_selected(
    q: Tensor,
    window: tuple[Tensor, Tensor],
    memory: Memory,
    layout: CacheLayout,
    top_k: int,
    query_group: int | None,
    impl: str,
) -> Tensor:
    attended = memory_attention(
        q,
        *window,
        memory.keys,
        memory.values,
        memory_descriptors=memory.descriptors,
        top_k=top_k,
        block_size=layout.block_size,
        frame_tokens=layout.frame_tokens,
        query_group=query_group,
        memory_frames=memory.frames,
        memory_slots=memory.slots,
        impl=impl,
    )
    return cast(Tensor, attended)
