"""What a finished chunk leaves behind: its first frame, the prototype, in the history, and its part of the sink.

The clean pass over a new chunk sets means of un-rotated keys aside, and with bounded positions the keys. The commit
copies the prototype out of the ring, to a history slot of every story, and with a history folder to the disk.
"""

import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor

from memflow_ops.cache.history import Prototype, Story
from memflow_ops.cache.layout import CacheLayout, on_device
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.slot_table import HistorySlotTable
from memflow_ops.cache.state import save_layout
from memflow_ops.cache.store import FrameStore, HistoryFolder
from memflow_ops.impl.precision import as_autocast_does
from memflow_ops.ops.cache_write import QKNorm, quantise_memory, write_projections
from memflow_ops.ops.registration.dispatch import needs_grad
from memflow_ops.ops.selection import describe_blocks
from memflow_ops.rotary import apply_rotation, frame_turn, time_pairs, without_time

PLACE_TENSORS = ("keys", "values", "descriptors", "k_scale", "v_scale")
"""What the tensors of a frame place are called in a history on disk; the scales are those of an int8 bank."""


class PrototypeCache(RingCache):
    """A ring whose chunks leave prototypes and a sink behind, for a bank that a subclass chooses."""

    takes_projections: ClassVar[bool] = True
    _table: HistorySlotTable

    def __init__(self, layout: CacheLayout, device: torch.device | str = "cpu", history: HistoryFolder | None = None):
        """history: a folder that keeps every prototype on disk too, which is never read or written for layouts without
        a history. It is closed when the last cache that uses it is. A ValueError where `layout.disk_frames` needs one.
        """
        if layout.disk_frames and history is None:
            raise ValueError(f"disk_frames={layout.disk_frames} needs a history folder to keep these frames in")
        super().__init__(layout, device)
        means, rows = len(layout.relevance_lengths), layout.history_frames
        sizes = (layout.layers, layout.batch)
        vectors = (layout.kv_heads, layout.head_dim)
        # Zeros are written, so that this memory is taken at once: it would grow with every remembered frame otherwise.
        self._means = torch.empty(*sizes, rows, means, *vectors, dtype=layout.dtype, device=self.device).zero_()
        self._staged_means = torch.empty(*sizes, means, *vectors, dtype=layout.dtype, device=self.device)
        # Keys of the open chunk's first frame without temporal rotation, as a history of bounded positions keeps them.
        # They are rotated once, from what the model made, because keys that are turned again and again drift.
        shape = (*sizes, layout.frame_tokens, *vectors) if layout.keeps_raw_keys else (0,)
        self._staged_keys = torch.empty(shape, dtype=layout.dtype, device=self.device)
        # Only the pairs of time turn, which come first. On a CPU the others are left out; kernels take all at once.
        pairs = time_pairs(layout.head_dim) if self.device.type == "cpu" else layout.head_dim // 2
        self._turn = torch.ones(pairs, dtype=torch.complex64, device=self.device)
        self._half_loaded = False  # whether a state could not be loaded to its end
        self._stores = [] if history is None or not layout.device_frames else self._make_stores(history)
        self._stories = [self._new_story(number) for number in range(layout.batch)]
        self._table = HistorySlotTable(layout, self.device, self._stories)
        self._nowhere = torch.full((layout.batch, 1), -1, dtype=torch.int32, device=self.device)  # no frame place
        self._batch_index = torch.arange(layout.batch, dtype=torch.int64, device=self.device)
        self._described: set[int] = set()  # layers whose descriptors lie beside the ring's keys
        self._marks = (self._written, self.chosen, self._remembered, self._described)

    def close(self) -> None:
        if self._stores:
            self._leave_history()

    def __deepcopy__(self, memo: dict[int, Any]) -> RingCache:
        if self._stores:
            raise TypeError("a FrameCache with a history folder cannot be copied; Streamer.fork() shares the folder")
        return super().__deepcopy__(memo)

    # -------------------------------------------------------------------------------------------------------- the chunk

    def begin_chunk(self) -> int:
        self._check_usable("begin_chunk")
        first_frame = super().begin_chunk()
        if self.layout.positions == "bounded":
            turn = frame_turn(self.layout.head_dim, -self._virtual_shift(), self.device)
            self._turn.copy_(turn[: len(self._turn)])
        return first_frame

    def _virtual_shift(self) -> int:
        """By how many frames the queries of the coming or current chunk stand earlier for the bank."""
        first = self._first_in_window()
        return first - min(first, self.layout.virtual_window)

    def bank_turn(self) -> Tensor | None:
        return self._turn if self.layout.positions == "bounded" else None

    def _describe_written(self, layer: int, k: Tensor) -> None:
        """Forgets descriptors, which are of an earlier pass; `commit` makes those that it keeps."""
        self._described.discard(layer)

    def remember(self, layer: int, k: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> None:
        """Takes the means of the chunk's first frame, in the clean pass of a new chunk, after the layer's `write`.

        k: the layer's keys (B, chunk tokens, Hkv, D) *before* RoPE, because rotated means move with the frame index.
        rotation: of the chunk's tokens, see `rope_rotation`; only bounded positions need it.
        """
        self._check_open("remember")
        if self._to_recache:
            raise RuntimeError("remember: a chunk that is re-cached keeps the prototype of its first prompt")
        (k,) = as_autocast_does(k, to=self.layout.dtype)
        self.layout.check_chunk_tensor("k", layer, k, self.device)
        if self.layout.keeps_raw_keys and rotation is None:
            raise ValueError("remember: bounded positions need the rotation of the chunk's tokens, got None")
        tokens = self.layout.frame_tokens
        if self.layout.keeps_raw_keys and rotation is not None:
            self._staged_keys[layer] = apply_rotation(k[:, :tokens].detach(), *without_time(rotation, tokens))
        size = self.layout.relevance_block_size or tokens
        self._staged_means[layer] = describe_blocks(k[:, :tokens].detach(), min(size, tokens), tokens)
        self._remembered.add(layer)

    def write_projections(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor],
        norm: QKNorm | None = None,
        *,
        remember: bool = False,
        memory_rotation: tuple[Tensor, Tensor] | None = None,
        memory_q: Tensor | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Normalises, rotates, writes and, where told so, remembers a layer in one pass over memory.

        q (B, chunk tokens, H, D) of any H, rotation, norm, memory_rotation, memory_q, impl and errors: of
        `memflow_ops.write_projections`. Returns q, normalised and rotated. Where a gradient is needed, q and k must be
        normalised already, and memory_q is not to be had.
        """
        self._check_open("write_projections")
        if remember and self._to_recache:
            raise RuntimeError("write_projections: a chunk that is re-cached keeps the prototype of its first prompt")
        q, k, v = as_autocast_does(q, k, v, to=self.layout.dtype)
        self.layout.check_chunk_tensor("k", layer, k, self.device)
        self.layout.check_chunk_tensor("v", layer, v, self.device)
        if norm is None and memory_q is None and needs_grad(q, k, v):  # the fused operator has no backward
            rotated_k = apply_rotation(k, *rotation)
            self.write(layer, rotated_k, v)
            self._keep_in_graph(layer, rotated_k, v, wanted=True)  # also where only q needs a gradient
            if remember:
                self.remember(layer, k, rotation)
            return apply_rotation(q, *rotation)
        rotated = write_projections(
            q,
            k,
            v,
            rotation,
            self._keys[layer],
            self._values[layer],
            self._chunk_places,
            frame_tokens=self.layout.frame_tokens,
            norm=norm,
            descriptors=self._descriptors[layer] if remember else None,
            block_size=self.layout.block_size,
            means=self._staged_means[layer].unsqueeze(1) if remember else None,
            mean_size=self.layout.relevance_block_size,
            memory_rotation=memory_rotation,
            memory_q=memory_q,
            impl=impl,
        )
        self._written.add(layer)
        self._keep_in_graph(layer, k, v, wanted=False)
        if remember and self.layout.keeps_raw_keys:
            self._stage_keys(layer, k, v, rotation, norm, impl)
        if remember:
            self._remembered.add(layer)
            self._described.add(layer)
        else:
            self._remembered.discard(layer)
            self._describe_written(layer, k)
        return rotated

    def _stage_keys(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor],
        norm: QKNorm | None,
        impl: str,
    ) -> None:
        """Sets the keys of the chunk's first frame aside, normalised, and rotated in space alone."""
        tokens = self.layout.frame_tokens
        first = k[:, :tokens]
        self._staged_keys[layer] = write_projections(
            first,  # what the operator rotates and returns
            first,
            v[:, :tokens],
            without_time(rotation, tokens),
            self._keys[layer],
            self._values[layer],
            self._nowhere,
            frame_tokens=tokens,
            norm=None if norm is None else QKNorm(norm.weight_k, norm.weight_k, norm.eps),
            impl=impl,
        )

    # -------------------------------------------------------------------------------------------- what stays of a chunk

    def _leaves_prototype(self, chunk: int) -> bool:
        """Whether the chunk's first frame goes to the history; a frame of the sink is not stored twice."""
        return self.layout.device_frames > 0 and chunk * self.layout.chunk_frames >= self.layout.sink_frames

    def _leave_behind(self, chunk: int) -> None:
        layout, prototype = self.layout, chunk * self.layout.chunk_frames
        for frame in range(prototype, min(prototype + layout.chunk_frames, layout.sink_frames)):
            self._copy_from_ring(frame, [layout.sink_frames - 1 - frame] * layout.batch)
        if self._leaves_prototype(chunk):
            self._store_prototype(chunk)

    def _copy_from_ring(self, frame: int, places: list[int], keys_instead: Tensor | None = None) -> None:
        """Copies a frame of the ring with its descriptors to each story's place in sink or history.

        keys_instead: (layers, B, T, Hkv, D), what becomes of its keys there; None: they are those of the ring.
        """
        layout = self.layout
        source = self._place_in_ring(frame)
        target = on_device(places, torch.long, self.device)
        keys, values, descriptors = (pool[:, :, source] for pool in self._places)
        if keys_instead is not None:
            keys = keys_instead
        if keys_instead is None and len(self._described) == layout.layers:
            blocks = descriptors.clone()
        else:
            sizes = (layout.block_size, layout.frame_tokens)
            blocks = describe_blocks(keys.flatten(0, 1), *sizes, moments=layout.moments).view(descriptors.shape)
        if layout.bank_dtype is None:
            # Cloned, because with one layer and one story torch takes source and target for the same memory.
            for pool, new in zip(self._bank, (keys, values), strict=False):
                pool[:, self._batch_index, target] = new.clone()
        else:
            self._quantise(keys, values, blocks, target)
        self._bank[2][:, self._batch_index, target] = blocks

    def _quantise(self, keys: Tensor, values: Tensor, descriptors: Tensor, target: Tensor) -> None:
        """Writes a frame of every story, (layers, B, tokens or blocks, Hkv, ...), to its place target (B,) of the int8
        bank, except its descriptors; layer by layer, to need little room."""
        layout = self.layout
        for layer in range(layout.layers):
            made = quantise_memory(
                keys[layer],
                values[layer],
                descriptors[layer],
                block_size=layout.block_size,
                frame_tokens=layout.frame_tokens,
            )
            for pool, new in zip((*self._bank[:2], *self._bank[3:]), made, strict=True):
                pool[layer, self._batch_index, target] = new

    def _store_prototype(self, chunk: int) -> None:
        """Gives the finished chunk's first frame a history slot and a row of means in every story."""
        frame, first = chunk * self.layout.chunk_frames, self._first_in_window(chunk)
        if any(len(story.history) >= self.layout.device_frames for story in self._stories):
            self._table.read()  # which prototype leaves the device depends on what has been retrieved
        slots, rows = [], []
        for story in self._stories:
            known = story.history.get(frame)  # it is there where an interrupted commit is completed
            slot = story.free_slot(first) if known is None else known.slot
            assert slot is not None, "a frame of the window is on the device"
            slots.append(slot)
            rows.append(story.free_row() if known is None else known.row)
        places = [story.place(slot) for story, slot in zip(self._stories, slots, strict=True)]
        self._copy_from_ring(frame, places, self._staged_keys if self.layout.keeps_raw_keys else None)
        self._means[:, self._batch_index, on_device(rows, torch.long, self.device)] = self._staged_means
        # Becoming a candidate counts as a use: otherwise a newcomer would be the first to go and never be retrieved.
        last_used = chunk + self.layout.window_chunks
        for number, (story, slot, row) in enumerate(zip(self._stories, slots, rows, strict=True)):
            story.store_prototype(frame, slot, self._means[:, number, row])
            story.history[frame] = Prototype(frame, row, last_used, slot)

    # ---------------------------------------------------------------------------------------------------------- details

    def _check_usable(self, what: str) -> None:
        if self._stores and not self._leave_history.alive:
            raise RuntimeError(f"{what}: the cache has been closed, and with it its history folder")
        if self._half_loaded:
            raise RuntimeError(f"{what}: a state could not be loaded to its end; load one that can be read")

    def _first_in_window(self, chunk: int | None = None) -> int:
        """The oldest frame in a chunk's window (None: in that of the coming or current new chunk).

        Older frames may be candidates of retrieval.
        """
        chunk = self._committed if chunk is None else chunk
        return max(0, chunk + 1 - self.layout.window_chunks) * self.layout.chunk_frames

    def _new_story(self, number: int) -> Story:
        store = self._stores[number] if self._stores else None
        return Story(self.layout, [pool[:, number] for pool in self._bank], store)

    def _make_stores(self, history: HistoryFolder) -> list[FrameStore]:
        """What each story has on disk; the folder stays open as long as this cache lives."""
        history.add_user()
        self._leave_history = weakref.finalize(self, history.remove_user)
        tensors = {"means": self._means[:, 0, 0]}
        tensors |= {name: pool[:, 0, 0] for name, pool in zip(PLACE_TENSORS, self._bank, strict=False)}
        about = {"layout": save_layout(self.layout)}
        room = self.layout.bank_frames
        return [FrameStore(history, number, about, tensors, room) for number in range(self.layout.batch)]
