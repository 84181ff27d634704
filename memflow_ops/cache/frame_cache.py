"""The frame cache: what a streaming video model keeps of the past, laid out so that no pass copies it.

One preallocated pool per tensor holds, for every layer and story of the batch, P frame places in this order:

    [ sink frames | ring of the local window | history slots ]

Keys have no order, so attention reads the ring as it lies, and "sink + window" or "sink + window + history" are views
as well. The passes over a chunk overwrite its place in the ring; its first frame, the prototype, is copied to a history
slot once, after the clean pass; retrieval only moves numbers in a slot table, which `memory_attention` follows.

A frame leaves the ring before it may be retrieved or seen as sink, so that none is attended to twice. Prototypes that
the device has no slot for move to host memory (pinned on CUDA), the least recently retrieved first, and come back
when they are retrieved; beyond the host's share the oldest is forgotten. Means of un-rotated keys, which retrieval
compares with the prompt, stay on the device for all that is remembered. The stories of a batch advance together, but
each has its own slots and its own share of host memory: a story is remembered as if it were alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memflow_ops.cache.history import Prototype, Story
from memflow_ops.cache.layout import CacheLayout, on_device
from memflow_ops.cache.slot_table import Bank
from memflow_ops.cache.state import check_layout, check_places, load_places, save_layout, save_places
from memflow_ops.cache.views import Candidates, Memory
from memflow_ops.ops import registration
from memflow_ops.ops.cache_write import QKNorm, write_projections
from memflow_ops.ops.selection import describe_blocks


class FrameCache:
    """Ring, sink and history of a batch of stories that advance chunk by chunk together.

    Per chunk: `candidates` and `set_bank` (retrieval), `begin_chunk`, passes that call `write` per layer and attend to
    `window`, `dense` or `memory`, in the last, clean pass also `remember`, then `commit`. `write_projections` does both
    from what has not been normalised and rotated yet. At a prompt switch `restart_window` comes between retrieval and
    `begin_chunk`. After an interruption `abort` goes back to the last commit. Calls out of order raise a RuntimeError,
    bad tensors a ValueError or TypeError, in both cases before anything is changed.
    """

    def __init__(self, layout: CacheLayout, device: torch.device | str = "cpu"):
        self.layout, self.device = layout, torch.device(device)
        sizes = (layout.layers, layout.batch)
        vectors = (layout.kv_heads, layout.head_dim)

        def allocate(*shape: int) -> Tensor:
            return torch.empty(*sizes, *shape, *vectors, dtype=layout.dtype, device=self.device)

        self._keys, self._values = layout.allocate_tokens(self.device), layout.allocate_tokens(self.device)
        self._descriptors = allocate(layout.pool_frames * layout.blocks_per_frame)
        # The same memory with one index per frame place: (layers, B, P, tokens or blocks, Hkv, D).
        self._places = [t.unflatten(2, (layout.pool_frames, -1)) for t in (self._keys, self._values, self._descriptors)]
        rows = layout.device_frames + layout.host_frames
        self._means = allocate(rows, len(layout.relevance_lengths))
        self._staged_means = allocate(len(layout.relevance_lengths))

        # Read by kernels, so it stays where it is. The place of each frame of the open chunk, per story; none where
        # re-caching leaves a story alone.
        self._chunk_places = torch.zeros((layout.batch, layout.chunk_frames), dtype=torch.int32, device=self.device)

        self._stories = [self._new_story(number) for number in range(layout.batch)]
        self._bank = Bank(layout, self._stories, self.device)
        self._batch_index = torch.arange(layout.batch, device=self.device)
        self._frame_of_chunk = torch.arange(layout.chunk_frames, dtype=torch.int32, device=self.device)

        self._committed = 0  # chunks
        self._ring: list[int] = []  # chunk number per ring place, the current chunk's included
        self._ring_before: list[int] = []  # to go back to
        self._place = 0  # ring place of the current chunk
        self._to_recache: list[int] = []  # chunk numbers still to be passed again, oldest first
        self._rewritten: Tensor | None = None  # stories that re-caching rewrites; None: all of them
        self._closing: int | None = None  # number of a finished chunk whose commit is under way
        self._open: int | None = None  # number of the chunk between begin_chunk and commit
        self._written: set[int] = set()
        self._remembered: set[int] = set()
        self._described: set[int] = set()  # layers whose descriptors lie beside the ring's keys
        self._noted = (self._written, self._remembered, self._described)

    # ------------------------------------------------------------------------------------------------------ the chunk

    @property
    def committed(self) -> int:
        """Finished chunks."""
        return self._committed

    def begin_chunk(self) -> int:
        """Opens the next chunk (after `restart_window`: the next one to be re-cached) and returns its first frame.

        It takes the ring place of the chunk that leaves the window.
        """
        if self._open is not None:
            raise RuntimeError("begin_chunk: the current chunk has not been committed")
        if not self._to_recache:
            self._ring_before = self._ring.copy()
        self._open = self._to_recache[0] if self._to_recache else self._committed
        if len(self._ring) < self.layout.window_chunks:
            self._place = len(self._ring)
            self._ring.append(self._open)
        else:
            self._place = self._ring.index(min(self._ring))
            self._ring[self._place] = self._open
        first_place = self.layout.sink_frames + self._place * self.layout.chunk_frames
        written = self._rewritten if self._to_recache and self._rewritten is not None else self._batch_index
        self._chunk_places.fill_(-1)
        self._chunk_places[written] = first_place + self._frame_of_chunk
        self._written.clear()
        self._remembered.clear()
        self._described.clear()
        return self._open * self.layout.chunk_frames

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts a layer's rotated keys and its values of the current chunk, (B, chunk tokens, Hkv, D), into the ring.

        Every pass overwrites the last. While re-caching, only the stories whose prompt changed are written.
        """
        self._check_open("write")
        self.layout.check_chunk_tensor("k", layer, k, self.device)
        self.layout.check_chunk_tensor("v", layer, v, self.device)
        for pool, new in zip(self._places, (k, v), strict=False):
            frames = new.detach().unflatten(1, (self.layout.chunk_frames, -1))
            registration.write_frames(pool[layer], self._chunk_places, frames)
        self._written.add(layer)
        self._described.discard(layer)

    def remember(self, layer: int, k: Tensor) -> None:
        """In the clean pass of a new chunk: takes the means of its first frame from k (B, chunk tokens, Hkv, D), the
        layer's keys *before* RoPE, because rotated means move with the frame index."""
        self._check_open("remember")
        if self._to_recache:
            raise RuntimeError("remember: a chunk that is re-cached keeps the prototype of its first prompt")
        self.layout.check_chunk_tensor("k", layer, k, self.device)
        tokens = self.layout.frame_tokens
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
        impl: str = "auto",
    ) -> Tensor:
        """`write`, and if told so `remember`, from keys that are not rotated yet, nor, with a norm, normalised.

        q (B, chunk tokens, H, D) of any H, rotation, norm, impl and errors: of `memflow_ops.write_projections`. Returns
        q, normalised and rotated.
        """
        self._check_open("write_projections")
        if remember and self._to_recache:
            raise RuntimeError("write_projections: a chunk that is re-cached keeps the prototype of its first prompt")
        self.layout.check_chunk_tensor("k", layer, k, self.device)
        self.layout.check_chunk_tensor("v", layer, v, self.device)
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
            impl=impl,
        )
        self._written.add(layer)
        if remember:
            self._remembered.add(layer)
            self._described.add(layer)
        else:
            self._described.discard(layer)
        return rotated

    def notes(self) -> tuple[frozenset[int], ...]:
        """What the passes over the open chunk have done so far, for `note`."""
        return tuple(map(frozenset, self._noted))

    def note(self, notes: tuple[frozenset[int], ...]) -> None:
        """Says that a pass has done again what it did when `notes` were taken after it, where this object does not see
        it: the replay of a CUDA graph runs no Python."""
        self._check_open("note")
        for kept, new in zip(self._noted, notes, strict=True):
            kept.clear()
            kept.update(new)

    def commit(self) -> None:
        """Closes the chunk after its clean pass. A new chunk leaves its prototype and its part of the sink behind; they
        become visible when the chunk has left the window. The bank is empty again, but for the sink."""
        self._check_open("commit")
        layout = self.layout
        missing = set(range(layout.layers)) - self._written
        if missing:
            raise RuntimeError(f"commit: layers {sorted(missing)} have not been written")
        if self._to_recache:
            self._to_recache.pop(0)
            self._open = None
            return
        missing = set(range(layout.layers)) - self._remembered
        if self._leaves_prototype(self._committed) and missing:
            raise RuntimeError(f"commit: the means of layers {sorted(missing)} have not been taken, see remember")
        # From here on the chunk is finished; what follows is done again if it is interrupted, see `abort`.
        self._closing = self._committed
        self._committed += 1
        self._close(self._closing)

    def _leaves_prototype(self, chunk: int) -> bool:
        """A sink frame is not stored twice."""
        return self.layout.device_frames > 0 and chunk * self.layout.chunk_frames >= self.layout.sink_frames

    def _close(self, chunk: int) -> None:
        """What a finished chunk, still in its ring place, leaves behind."""
        layout, prototype = self.layout, chunk * self.layout.chunk_frames
        for frame in range(prototype, min(prototype + layout.chunk_frames, layout.sink_frames)):
            self._copy_from_ring(frame - prototype, [layout.sink_frames - 1 - frame] * layout.batch)
        if self._leaves_prototype(chunk):
            self._store_prototype(chunk)
        self._open = None
        self._bank.clear(self.visible_sink())
        self._closing = None

    def abort(self) -> None:
        """Forgets a chunk that was begun and not committed, and a re-caching that was not completed. Whatever was being
        re-cached must be so again before the next chunk. Does nothing where all is committed."""
        if self._to_recache or self._open == self._committed:
            self._ring = self._ring_before.copy()
            self._to_recache, self._closing = [], None
            self._bank.clear(self.visible_sink())
        elif self._closing is not None:
            self._close(self._closing)
        self._open = None

    def restart_window(self, stories: Sequence[bool] | None = None) -> list[int]:
        """Empties the ring at a prompt switch. Returns the first frames of the chunks that stay in the coming chunk's
        window: each must be passed again under the new text, oldest first, in the order in which `begin_chunk` gives
        them out. The ring grows with them, so every one of these passes sees only what has been passed again.

        stories: whose prompt changed (None: all). The others keep their keys and values as they are.
        """
        if self._open is not None:
            raise RuntimeError("restart_window: the current chunk has not been committed")
        if self._to_recache:
            raise RuntimeError(f"restart_window: {len(self._to_recache)} chunks are still to be re-cached")
        self._rewritten = None
        if stories is not None:
            if len(stories) != self.layout.batch:
                raise ValueError(f"stories must have {self.layout.batch} entries, got {len(stories)}")
            if not all(stories):
                changed = [number for number, switched in enumerate(stories) if switched]
                self._rewritten = on_device(changed, torch.long, self.device)
                self._order_ring()
        kept = self.layout.window_chunks - 1
        self._ring_before = sorted(self._ring)[-kept:] if kept else []
        self._to_recache = self._ring_before.copy()
        self._ring = []  # last, so that `abort` knows that there is something to go back to
        return [chunk * self.layout.chunk_frames for chunk in self._to_recache]

    # ------------------------------------------------------------------------------------------------- what is attended

    def pass_shape(self, sparse: bool) -> tuple[object, ...]:
        """All that a pass over the open chunk depends on and that no tensor holds: passes of one shape run the same
        kernels on the same memory, so that one CUDA graph can be all of them.

        sparse: it attends to `window` and, where there is one, to the bank in `memory`; else to `dense`.
        """
        self._check_open("pass_shape")
        beyond = (any(self.bank_sizes()),) if sparse else (self.visible_sink(), len(self.candidate_frames()[0]))
        return (bool(self._to_recache), len(self._ring), *beyond)

    def window(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the ring, (B, up to window tokens, Hkv, D), as views, the current chunk included."""
        self._check_open("window")
        first = self.layout.sink_frames
        return self._view(layer, first, first + len(self._ring) * self.layout.chunk_frames)

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all that is remembered: visible sink frames, ring and candidates, (B, tokens, Hkv, D).

        A view, except while the window is being re-cached: the ring is then not full and the history not next to it. A
        RuntimeError says when a prototype has already had to leave the device.
        """
        self._check_open("dense")
        if any(story.evicted for story in self._stories):
            raise RuntimeError(
                f"the history has outgrown device_frames={self.layout.device_frames}, so it can no longer be attended "
                "to in full; raise device_frames or use memory='memflow'"
            )
        first = self.layout.sink_frames
        filled = first + len(self._ring) * self.layout.chunk_frames
        end_of_ring = first + self.layout.window_frames
        # Nothing has ever been evicted, so the candidates, the oldest prototypes, lie in the leading slots.
        history = len(self.candidate_frames()[0])
        start = first - self.visible_sink()
        if not history or filled == end_of_ring:
            return self._view(layer, start, filled + history)
        near, far = self._view(layer, start, filled), self._view(layer, end_of_ring, end_of_ring + history)
        return torch.cat([near[0], far[0]], dim=1), torch.cat([near[1], far[1]], dim=1)

    def memory(self, layer: int) -> Memory:
        """The sink and the bank, for `memory_attention` beside the dense `window`."""
        self._check_open("memory")
        pools = self._keys[layer], self._values[layer], self._descriptors[layer]
        return Memory(*pools, self._bank.slots, self._bank.lengths)

    # --------------------------------------------------------------------------------------------------------- the bank

    def visible_sink(self) -> int:
        """Sink frames that have left the coming (or current) chunk's window; always the first ones."""
        return min(self.layout.sink_frames, self._first_in_window())

    def window_frames(self) -> list[int]:
        """Absolute indices of the frames in the ring, as they lie there."""
        size = self.layout.chunk_frames
        return [chunk * size + i for chunk in self._ring for i in range(size)]

    def candidate_frames(self) -> list[list[int]]:
        """Per story the prototypes that have left the coming (or current) chunk's window, ascending.

        Every story stores one per chunk and forgets only candidates, so that all stories have the same number.
        """
        first = self._first_in_window()
        return [[frame for frame in story.history if frame < first] for story in self._stories]

    def candidates(self) -> Candidates:
        """All that retrieval may choose from for the coming chunk, in host memory or not."""
        frames = self.candidate_frames()
        rows = [[story.history[frame].row for frame in of] for story, of in zip(self._stories, frames, strict=True)]
        return Candidates(frames, self._means, self.layout.relevance_lengths, on_device(rows, torch.int32, self.device))

    def bank(self) -> list[list[int]]:
        """Per story the absolute indices of the bank frames in bank order: visible sink, then retrieved, ascending.
        Waits for the device where `set_bank_on_device` has set it."""
        self._bank.read()
        return [[*range(self.visible_sink()), *story.bank] for story in self._stories]

    def bank_sizes(self) -> list[int]:
        """Per story how many frames `bank` has; waits for nothing."""
        return [self.visible_sink() + count for count in self._bank.retrieved]

    def moves_nothing(self) -> bool:
        """Whether the device has a slot for every candidate and for the prototype of the coming chunk: then the host
        need not know the bank, see `set_bank_on_device`."""
        first = self._first_in_window()
        stays = all(p.slot is not None for s in self._stories for p in s.history.values() if p.frame < first)
        return stays and all(len(story.history) < self.layout.device_frames for story in self._stories)

    def set_bank(self, chosen: Sequence[Sequence[int]]) -> None:
        """Retrieves, per story, the given candidate frames for the coming chunk; those in host memory are brought back.

        Needs no answer from the device: copies and the new slot table are queued.
        """
        if self._open is not None:
            raise RuntimeError("set_bank: the bank is chosen before begin_chunk")
        self._bank.check(chosen, self.candidate_frames())
        self._bank.read()
        for story, frames in zip(self._stories, chosen, strict=True):
            story.retrieve(frames, self._committed, self._first_in_window())
        self._bank.write(self.visible_sink(), [sorted(frames) for frames in chosen])

    def set_bank_on_device(self, indices: Tensor) -> None:
        """As `set_bank`, with a choice that stays on the device: indices (B, K) int32 into `candidate_frames`, K up to
        bank_frames, different ones in a story; only where this chunk `moves_nothing`. Waits for nothing: which frames
        they are is read when that has to be known, in `bank`, `set_bank` and `state_dict`."""
        if self._open is not None:
            raise RuntimeError("set_bank_on_device: the bank is chosen before begin_chunk")
        if not self.moves_nothing():
            raise RuntimeError("set_bank_on_device: the device has no room for all of the history, use set_bank")
        self._bank.write_on_device(self.visible_sink(), self._committed, self.candidate_frames(), indices)

    # -------------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """All that later chunks will see, in host memory: tensors, numbers and lists, as `torch.save` takes them. Only
        between chunks; the bank's choice is no part of it, because every chunk makes its own."""
        if self._open is not None or self._to_recache:
            raise RuntimeError("state_dict: a chunk is open or still to be re-cached; commit or abort it first")
        layout = self.layout
        ring = range(layout.sink_frames, layout.sink_frames + len(self._ring) * layout.chunk_frames)
        stored = min(layout.sink_frames, self._committed * layout.chunk_frames)
        sink = range(layout.sink_frames - stored, layout.sink_frames)
        self._bank.read()
        kept = [(story, prototype) for story in self._stories for prototype in story.history.values()]
        places = sorted({*sink, *ring, *(story.place_of(p) for story, p in kept if p.slot is not None)})
        rows = sorted({p.row for _, p in kept})
        return {
            "layout": save_layout(layout),
            "committed": self._committed,
            "ever_evicted": any(story.evicted for story in self._stories),
            "ring": self._ring.copy(),
            "places": places,
            "pools": save_places(self._places, places),
            "rows": rows,
            "means": save_places([self._means], rows),
            "history": [story.saved_history() for story in self._stories],
            "host": [story.saved_host() for story in self._stories],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a cache of the same layout was; frames lie in the same places, so that the sums of attention
        are the same to the bit. A ValueError, before anything is changed, when the state does not fit."""
        check_layout(self.layout, state.get("layout"))
        check_places("pools", self._places, state["places"], state["pools"])
        check_places("means", [self._means], state["rows"], state["means"])
        stories = [self._new_story(number) for number in range(self.layout.batch)]
        for story, history, host in zip(stories, state["history"], state["host"], strict=True):
            story.load(history, host)
            story.evicted = state["ever_evicted"]
        load_places(self._places, state["places"], state["pools"])
        load_places([self._means], state["rows"], state["means"])
        self._bank.forget_unread()
        self._stories[:] = stories  # in place: the bank looks at them
        self._ring, self._ring_before = list(state["ring"]), list(state["ring"])
        self._committed = state["committed"]
        self._to_recache, self._rewritten, self._open, self._closing = [], None, None, None
        self._bank.clear(self.visible_sink())

    # ---------------------------------------------------------------------------------------------------------- details

    def _first_in_window(self, chunk: int | None = None) -> int:
        """The oldest frame of a chunk's window (None: the coming or current new one's); what is older may be a
        candidate."""
        chunk = self._committed if chunk is None else chunk
        return max(0, chunk + 1 - self.layout.window_chunks) * self.layout.chunk_frames

    def _new_story(self, number: int) -> Story:
        return Story(self.layout, [pool[:, number] for pool in self._places])

    def _view(self, layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the frame places first to end - 1."""
        tokens = slice(first * self.layout.frame_tokens, end * self.layout.frame_tokens)
        return self._keys[layer, :, tokens], self._values[layer, :, tokens]

    def _copy_from_ring(self, frame: int, places: list[int]) -> None:
        """Copies frame number `frame` of the current chunk to each story's place in sink or history, described."""
        layout = self.layout
        source = layout.sink_frames + self._place * layout.chunk_frames + frame
        target = on_device(places, torch.long, self.device)
        keys, values, descriptors = self._places
        # cloned: with one layer and one story torch takes source and target for the same memory
        keys[:, self._batch_index, target] = keys[:, :, source].clone()
        values[:, self._batch_index, target] = values[:, :, source].clone()
        if len(self._described) == layout.layers:
            blocks = descriptors[:, :, source].clone()
        else:
            blocks = describe_blocks(keys[:, :, source].flatten(0, 1), layout.block_size, layout.frame_tokens)
        descriptors[:, self._batch_index, target] = blocks.view(layout.layers, layout.batch, *blocks.shape[-3:])

    def _store_prototype(self, chunk: int) -> None:
        """Gives the finished chunk's first frame a history slot and a row of means in every story."""
        frame, first = chunk * self.layout.chunk_frames, self._first_in_window(chunk)
        if any(len(story.history) >= self.layout.device_frames for story in self._stories):
            self._bank.read()  # who leaves the device goes by them
        slots, rows = [], []
        for story in self._stories:
            known = story.history.get(frame)  # where an interrupted commit is completed
            slot = story.free_slot(first) if known is None else known.slot
            assert slot is not None, "a frame of the window is on the device"
            slots.append(slot)
            rows.append(story.free_row() if known is None else known.row)
        self._copy_from_ring(0, [story.place(slot) for story, slot in zip(self._stories, slots, strict=True)])
        self._means[:, self._batch_index, on_device(rows, torch.long, self.device)] = self._staged_means
        # Becoming a candidate counts as a use: otherwise a newcomer would be the first to go and never be retrieved.
        last_used = chunk + self.layout.window_chunks
        for story, slot, row in zip(self._stories, slots, rows, strict=True):
            story.history[frame] = Prototype(frame, row, last_used, slot)

    def _order_ring(self) -> None:
        """Sorts the kept chunks of the ring by age, oldest first, as `begin_chunk` will hand out their places again.

        Only for a switch that concerns some stories of a batch: the others' chunks must be where they will be sought.
        """
        layout = self.layout
        kept = sorted(self._ring)[-(layout.window_chunks - 1) :] if layout.window_chunks > 1 else []
        frames = [
            layout.sink_frames + self._ring.index(chunk) * layout.chunk_frames + i
            for chunk in kept
            for i in range(layout.chunk_frames)
        ]
        order = on_device(frames, torch.long, self.device)
        for pool in self._places[:2]:
            for layer in range(layout.layers):  # layer by layer, so that the copy in between stays small
                pool[layer, :, layout.sink_frames : layout.sink_frames + len(frames)] = pool[layer][:, order]
        self._ring = kept

    def _check_open(self, what: str) -> None:
        if self._open is None:
            raise RuntimeError(f"{what}: no chunk is open, call begin_chunk first")
