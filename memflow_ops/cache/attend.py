"""The contract between a model and its past, and the `Attend` that fulfils it with a cache.

A model computes queries, keys and values of a chunk in every self-attention layer and leaves the attention itself to an
`Attend` that it is called with. The model knows no cache, no positions and no memory; the `Attend` rotates queries and
keys to their absolute frames (RoPE), writes keys and values to the cache, and attends to what the cache offers. So any
model that calls an `Attend` can be given any kind of memory. `attend_to_memory` makes one for a pass over a chunk:

    cache.begin_chunk()
    attend = attend_to_memory(cache, rotation, BlockSelection(top_k=24))
    out = attend(layer, q, k, v)  # in every layer, in order
    cache.commit()
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from memflow_ops.cache.chosen import ChosenBlocks
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.views import Memory, Past
from memflow_ops.ops import registration
from memflow_ops.ops.attention import attend_selected, memory_attention
from memflow_ops.ops.cache_write import QKNorm
from memflow_ops.ops.registration.dispatch import needs_grad
from memflow_ops.ops.selection import select_blocks
from memflow_ops.rotary import apply_rotation, move_frames, move_rotation

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q, k, v) -> out: the self-attention of a layer over a chunk and its past.

q and out (B, chunk tokens, H, D), k and v (B, chunk tokens, Hkv, D); q and k are normalised and not rotated. A pass
calls it once per layer, in order.
"""


@dataclass(frozen=True)
class AttendProjections:
    """An `Attend` that can also normalise queries and keys, so that norm, RoPE and write are one pass over memory.

    Under `torch.no_grad` a model may call `projections` with q and k as their linear layers give them; the fused
    operator behind it has no backward.
    """

    projections: Callable[[int, Tensor, Tensor, Tensor, QKNorm | None], Tensor]
    """projections(layer, q, k, v, norm) -> out; without a norm, q and k are normalised already."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.projections(layer, q, k, v, None)


class HeadShare(NamedTuple):
    """Some of the heads of a model, consecutive ones: those of one process, where several share a video."""

    first: int
    own: int
    whole: int
    """The heads of the model."""

    def of(self, x: Tensor) -> Tensor:
        """These heads of x (..., whole, D), as a view."""
        return x[..., self.first : self.first + self.own, :]


@dataclass(frozen=True)
class BlockSelection:
    """How many blocks of the bank each query group attends to: MemFlow's activation (arXiv 2512.14699)."""

    top_k: int
    """Blocks per query group and head."""
    query_group: int | None = 128
    """Consecutive queries that share a selection; None: the whole chunk."""
    random: torch.Generator | None = None
    """Draws the blocks at random instead of taking the most relevant; a control."""
    heads: HeadShare | None = None
    """Of which heads of the model this is the selection; None: of all. With `random`, blocks are drawn for all heads,
    so that each has the same ones however many processes there are."""


Observer = Callable[[int, Tensor, Memory], None]
"""observe(layer, q, memory) sees a chunk's queries (B, tokens, H, D), rotated for the bank, and the bank that they
choose from."""


def attend_to_memory(
    cache: RingCache,
    rotation: tuple[Tensor, Tensor],
    selection: BlockSelection | None,
    *,
    remember: bool = False,
    keys_only: bool = False,
    observe: Observer | None = None,
    chosen: ChosenBlocks | None = None,
    reuse: bool = False,
    impl: str = "auto",
) -> Attend:
    """An `Attend` for one pass over the open chunk of a cache; it overwrites what an earlier pass has written.

    rotation: cosines and sines of the chunk's tokens, see `rope_rotation`.
    selection: the pass attends to the local window in full and to the selected blocks of sink and bank; None: to all
        that the cache keeps, in full.
    remember: this is the clean pass of a new chunk, whose means of keys retrieval will go by.
    keys_only: the last layer writes and does not attend, for a pass that is only made for its keys and values. Its
        result is then the rotated q.
    observe: sees what each layer chooses from, where there is a choice.
    chosen: takes what the pass chooses, made with the same layout and selection; None: nothing is kept.
    reuse: the pass attends to what `chosen` holds and chooses nothing. A RuntimeError in a layer where no pass over the
        open chunk has chosen.
    impl: of `memory_attention`.

    Returns an `AttendProjections` where the cache can write from projections.
    """
    active = selection if selection is not None and cache.has_bank() else None
    layout = cache.layout
    if reuse and chosen is None:
        raise ValueError("attend_to_memory: reuse=True needs the choices of an earlier pass, see chosen")
    if selection is None and layout.positions == "bounded":
        raise ValueError(
            "attend_to_memory: with positions='bounded' the past is attended to block by block: give a selection"
        )
    if chosen is not None and selection is not None:
        made_for = (chosen.layout, chosen.top_k, chosen.query_group)
        if made_for != (layout, selection.top_k, selection.query_group):
            raise ValueError("attend_to_memory: chosen was made for another layout, top_k or query_group")
    if selection is not None and selection.random is not None and layout.bank_dtype:
        raise ValueError(
            "attend_to_memory: random descriptors cannot stand in for those that an int8 bank is read with"
        )

    turn = None if active is None else cache.bank_turn()
    moved: list[tuple[Tensor, Tensor]] = []  # `rotation` as it is for the bank; the first layer of a pass works it out

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, norm: QKNorm | None) -> Tensor:
        last = keys_only and layer == layout.layers - 1
        beside = reuse and chosen is not None and _lies_beside(chosen, cache)
        memory_q = None
        if turn is not None and (observe is not None or not (last or beside)) and not needs_grad(q, k, v):
            if layer == 0 or not moved:  # what a recording that failed has left is never read
                moved[:] = [move_rotation(rotation, turn)]
            memory_q = q.new_empty(q.shape, dtype=layout.dtype)
        q = cache.write_projections(
            layer, q, k, v, rotation, norm, remember=remember,
            memory_rotation=None if memory_q is None else moved[0], memory_q=memory_q, impl=impl,
        )  # fmt: skip
        if turn is not None and memory_q is None and (observe is not None or not (last or beside)):
            memory_q = move_frames(q, turn)
        memory = cache.memory(layer)
        if active is not None and active.random is not None and not reuse:
            # Of descriptors without meaning, every subset of the blocks is as likely as any other.
            drawn = _drawn_like(memory.descriptors, active.random, active.heads)
            memory = memory._replace(descriptors=drawn)
        if active is not None and observe is not None:
            observe(layer, q if memory_q is None else memory_q, memory)
        if last:
            return q
        keys, values, valid = cache.attended(layer, sparse=selection is not None)
        if active is None:
            return memory_attention(q, keys, values, seqused_k=valid, impl=impl)
        if chosen is not None:
            seeking = q if memory_q is None else memory_q
            return _attend_to_chosen(
                chosen, reuse, layer, q, seeking, (keys, values), valid, cache, memory, active, impl
            )
        return _attend_to_both(q, (keys, values), memory, active, layout, impl, valid, memory_q)

    def attend_normalised(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(layer, q, k, v, None)

    return AttendProjections(attend) if cache.takes_projections else attend_normalised


def _drawn_like(descriptors: Tensor, random: torch.Generator, heads: HeadShare | None) -> Tensor:
    """Random numbers in place of descriptors (B, N, Hkv, D): the part of these heads of what is drawn for all."""
    batch, blocks, own, width = descriptors.shape
    shape = batch, blocks, own if heads is None else heads.whole, width
    drawn = torch.randn(shape, generator=random, dtype=torch.float32, device=random.device)
    return (drawn if heads is None else heads.of(drawn)).to(descriptors)


def attend_to_past(
    past: Past,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: tuple[Tensor, Tensor],
    selection: BlockSelection,
    layout: CacheLayout,
    impl: str = "auto",
) -> Tensor:
    """What an `Attend` gives for a layer, worked out anew from a copy of the past; reads and writes no cache.

    Gradients reach q, k and v. Gradient checkpointing, which computes a pass again when the cache may have gone on,
    and any other differentiable pass can therefore use this. past: what `RingCache.past` has returned for the layer.
    """
    q, k = apply_rotation(q, *rotation), apply_rotation(k, *rotation)
    window = torch.cat([past.keys, k], 1), torch.cat([past.values, v], 1)
    if past.memory is None:
        return memory_attention(q, *window, impl=impl)
    memory_q = None if past.turn is None else move_frames(q, past.turn)
    return _attend_to_both(q, window, past.memory, selection, layout, impl, memory_q=memory_q)


def _lies_beside(chosen: ChosenBlocks, cache: RingCache) -> bool:
    """Whether the pass attends to copies of the chosen blocks, as if they were of the window."""
    return bool(chosen.copied_tokens) and not cache.recaches and not torch.is_grad_enabled()


def _attend_to_chosen(
    chosen: ChosenBlocks,
    reuse: bool,
    layer: int,
    q: Tensor,
    memory_q: Tensor,
    window: tuple[Tensor, Tensor],
    valid: Tensor | None,
    cache: RingCache,
    memory: Memory,
    selection: BlockSelection,
    impl: str,
) -> Tensor:
    """As `_attend_to_both`, with the blocks that an earlier pass over the chunk has chosen, or that this one keeps.

    memory_q: the queries as they are for the bank.
    """
    layout, copied = cache.layout, chosen.copied_tokens
    if not reuse:
        indices = select_blocks(
            memory_q,
            memory.descriptors,
            selection.top_k,
            query_group=selection.query_group,
            memory_frames=memory.frames,
            memory_slots=memory.slots,
            block_size=layout.block_size,
            frame_tokens=layout.frame_tokens,
            score=layout.score,
            impl=impl,
        )
        chosen.take(layer, indices, memory, cache.copies(layer, copied), cache.bank_turn())
        cache.chosen.add(layer)
    elif layer not in cache.chosen:
        raise RuntimeError(
            f"attend_to_memory: layer {layer} has chosen no blocks for the open chunk that could be reused"
        )
    if _lies_beside(chosen, cache):
        keys_values = cache.window_with_copies(layer, copied)
        return registration.attend_with_copies(q, *keys_values, chosen.hidden[layer], layout.head_dim**-0.5)
    # A backward pass must find the choice as it was.
    indices = chosen.indices[layer].clone() if torch.is_grad_enabled() else chosen.indices[layer]
    state = memory_attention(q, *window, seqused_k=valid, return_lse=True, impl=impl)
    out, _ = attend_selected(
        memory_q,
        memory.keys,
        memory.values,
        indices,
        block_size=layout.block_size,
        frame_tokens=layout.frame_tokens,
        query_group=selection.query_group,
        memory_descriptors=memory.descriptors,
        memory_k_scale=memory.k_scale,
        memory_v_scale=memory.v_scale,
        memory_slots=memory.slots,
        resume=state,
        impl=impl,
    )
    return out


def _attend_to_both(
    q: Tensor,
    window: tuple[Tensor, Tensor],
    memory: Memory,
    selection: BlockSelection,
    layout: CacheLayout,
    impl: str,
    valid: Tensor | None = None,
    memory_q: Tensor | None = None,
) -> Tensor:
    """Attention to the window in full, or to its leading `valid` keys, and to the selected blocks of the bank."""
    return memory_attention(
        q,
        *window,
        memory.keys,
        memory.values,
        memory_q=memory_q,
        memory_descriptors=memory.descriptors,
        memory_k_scale=memory.k_scale,
        memory_v_scale=memory.v_scale,
        top_k=selection.top_k,
        block_size=layout.block_size,
        frame_tokens=layout.frame_tokens,
        query_group=selection.query_group,
        memory_frames=memory.frames,
        memory_slots=memory.slots,
        seqused_k=valid,
        score=layout.score,
        impl=impl,
    )
