"""A frame cache over a past, under one kind of memory, and what attention through it must give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from memflow_ops import QKNorm, select_blocks
from memflow_ops.bench import inputs
from memflow_ops.bench.harness.correctness import (
    KeysOf,
    block_lengths,
    check_attention,
    check_means,
    check_rounded,
    check_selection,
    check_variances,
    exact_projection,
    queries_of,
    sampled,
    selected_tokens,
)
from memflow_ops.bench.sizes import Size
from memflow_ops.cache.attend import Attend, AttendProjections
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.geometry import Score
from memflow_ops.model.streaming.settings import ReselectKind
from memflow_ops.rotary import rope_rotation


@dataclass(frozen=True)
class MemoryVariant:
    """A kind of memory, with its budget where that is not the size's."""

    memory: str
    """As StreamSettings.memory: `none`, `sink`, `full` or `memflow`."""
    bank_frames: int = 3
    top_k: int | None = None
    per_chunk: bool = False
    """Whether all queries of a head share one selection."""
    reselect: ReselectKind = "step"
    """As StreamSettings.reselect."""
    score: Score = "mean"
    """As StreamSettings.score."""

    def of(self, size: Size) -> Size:
        """The size with this variant's budget."""
        group = size.queries if self.per_chunk else size.query_group
        return replace(size, top_k=self.top_k or size.top_k, query_group=group)

    def settings(self, size: Size) -> dict[str, object]:
        """The settings as a row of results states them; without a bank to choose from there is no budget."""
        own = self.of(size)
        budget: dict[str, object] = {"bank_frames": self.bank_frames, "top_k": own.top_k}
        budget |= {"query_group": own.query_group}
        if self.reselect != "step":
            budget |= {"reselect": self.reselect}
        if self.score != "mean":
            budget |= {"score": self.score}
        return {"memory": self.memory, **(budget if self.memory == "memflow" else dict.fromkeys(budget))}


@dataclass(frozen=True)
class CheckedCache:
    """A frame cache, and the kind of memory that attention through it is checked against."""

    cache: FrameCache
    size: Size
    """With the variant's budget."""
    variant: MemoryVariant

    def fill(self, chunks: int) -> None:
        """Write a seeded past of so many chunks, as if they had been streamed.

        Every chunk holds the same keys and values, moved on by some tokens.
        """
        cache, layout = self.cache, self.cache.layout
        sizes = (layout.batch, layout.chunk_tokens, layout.kv_heads, layout.head_dim, layout.dtype)
        made = [inputs.correlated_tokens(*sizes, seed, str(cache.device)) for seed in range(2 * layout.layers)]
        for chunk in range(chunks):
            cache.begin_chunk()
            for layer in range(layout.layers):
                k, v = (x.roll(7 * chunk, 1) for x in made[2 * layer : 2 * layer + 2])
                cache.write(layer, k, v)
                cache.remember(layer, k)
            cache.commit()

    def rotation(self, chunk: int) -> tuple[Tensor, Tensor]:
        """The cosines and sines of RoPE for a chunk."""
        size, device = self.size, self.cache.device
        frames = torch.arange(chunk * size.chunk_frames, (chunk + 1) * size.chunk_frames, device=device)
        rows, columns = (torch.arange(n // 2, device=device) for n in (size.height, size.width))
        return rope_rotation(size.head_dim, frames, rows, columns)

    @property
    def bank_frames(self) -> int:
        """Frames of the bank, the sink included, of a chunk that is open or about to be."""
        candidates = len(self.cache.candidate_frames()[0])
        return self.cache.visible_sink() + min(self.variant.bank_frames, candidates)

    @property
    def attended_keys(self) -> int:
        """Keys that a query of such a chunk attends to, where selected blocks count as full."""
        size = self.size
        if self.variant.memory == "memflow":
            return size.window_keys + min(size.top_k, self.bank_frames * size.blocks_per_frame) * size.block_size
        past = self.cache.visible_sink() + len(self.cache.candidate_frames()[0])
        return size.window_keys + past * size.frame_tokens

    def keys_of(self, layer: int, q: Tensor, reused: Tensor | None = None) -> KeysOf:
        """What a layer's rotated queries attend to by the definition of the kind of memory.

        reused: (layers, B, H, G, K), the blocks that an earlier pass has chosen; None: this pass chooses.
        """
        if self.variant.memory != "memflow":
            keys, values = self.cache.dense(layer)
            expected = self.attended_keys
            assert keys.shape[1] == expected, f"{keys.shape[1]} keys, expected {expected}"
            return lambda head, group: (keys[0, :, head], values[0, :, head])
        size, memory, window = self.size, self.cache.memory(layer), self.cache.window(layer)
        frames, expected = memory.frames.tolist(), self.bank_frames
        assert frames == [expected], f"{frames} frames in the bank, expected {expected}"
        slots = memory.slots[0, :expected].long()
        assert len(slots.unique()) == expected, f"a frame is twice in the bank: {slots.tolist()}"
        descriptors = memory.descriptors[0].unflatten(0, (-1, size.blocks_per_frame))[slots].flatten(0, 1)
        indices = select_blocks(
            q,
            memory.descriptors,
            size.top_k,
            query_group=size.query_group,
            memory_frames=memory.frames,
            memory_slots=memory.slots,
            block_size=size.block_size,
            frame_tokens=size.frame_tokens,
            score=self.variant.score,
        )
        lengths = block_lengths(size, expected, q.device) if self.variant.score == "moments" else None
        if reused is not None:
            indices = reused[layer]

        def keys_of(head: int, group: int) -> tuple[Tensor, Tensor]:
            tile, chosen = q[0, queries_of(size, group), head], indices[0, head, group]
            where = f"layer {layer}, selection, head {head}, group {group}"
            if reused is None:
                check_selection(tile, descriptors[:, head], chosen, size.top_k, where, lengths=lengths)
            tokens = selected_tokens(size, chosen, slots)
            pairs = zip(window, (memory.keys, memory.values), strict=True)
            k, v = (torch.cat([ring[0, :, head], pool[0, tokens, head]]) for ring, pool in pairs)
            return k, v

        return keys_of

    def checked(self, attend: Attend, rotation: tuple[Tensor, Tensor], reused: Tensor | None = None) -> Attend:
        """The same `attend`, checked in the first and the last layer: the keys and values that it writes, its results.

        rotation: that of the open chunk. reused: of `keys_of`.
        """
        projections = cast(AttendProjections, attend).projections

        def attend_and_check(layer: int, q: Tensor, k: Tensor, v: Tensor, norm: QKNorm | None) -> Tensor:
            out = projections(layer, q, k, v, norm)
            if layer in (0, self.cache.layout.layers - 1):
                weight_q, weight_k, eps = norm or (None, None, 0.0)
                self._check_written(layer, exact_projection(k, rotation, weight_k, eps), v)
                rotated = exact_projection(q, rotation, weight_q, eps).to(q.dtype)
                check_attention(self.size, rotated, out, self.keys_of(layer, rotated, reused))
            return out

        return AttendProjections(attend_and_check)

    def _check_written(self, layer: int, exact_keys: Tensor, v: Tensor) -> None:
        """Check the open chunk's keys and values in the window."""
        size, cache = self.size, self.cache
        chunk = [n for n, frame in enumerate(cache.window_frames()) if frame // size.chunk_frames == cache.committed]
        frames = (x.unflatten(1, (-1, size.frame_tokens)) for x in cache.window(layer))
        keys, values = (x[:, chunk].flatten(1, 2) for x in frames)
        check_rounded(keys, exact_keys, f"layer {layer}, keys in the window")
        assert torch.equal(values, v), f"layer {layer}: the window does not hold the chunk's values"

    def check_descriptors(self) -> None:
        """Check the descriptors of the sink and of every prototype against the keys beside them, while a chunk is open.

        In the first and the last layer.
        """
        size, cache, layout = self.size, self.cache, self.cache.layout
        prototypes = cache.committed - -(-layout.sink_frames // layout.chunk_frames)
        history = layout.history_start  # The slots from here on are filled one after the other.
        parts = {"the sink": (0, layout.sink_frames), "prototypes": (history, min(prototypes, layout.device_frames))}
        for layer in sorted({0, layout.layers - 1}):
            memory = cache.memory(layer)
            keys, descriptors = (x[0].unflatten(0, (layout.pool_frames, -1)) for x in (memory.keys, memory.descriptors))
            for what, (first, count) in parts.items():
                for head, _ in sampled(size.heads, 1):
                    means, of = (x[first : first + count, :, head].flatten(0, 1) for x in (descriptors, keys))
                    where = f"layer {layer}, head {head}, descriptors of {what}"
                    check_means(means[:, : size.head_dim], of, size.block_size, size.frame_tokens, where)
                    if layout.score == "moments":
                        variances = means[:, size.head_dim :]
                        check_variances(variances, of, size.block_size, size.frame_tokens, where)
