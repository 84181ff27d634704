"""The frame cache: what a streaming video model keeps of the past, laid out so that no pass copies it.

One preallocated pool per tensor holds, for every layer and story of the batch, P frame places in this order:

    [ sink frames | places for copies | ring of the local window | history slots ]

Keys have no order, so attention reads the ring as it lies, and "sink + window" or "sink + window + history" are views
as well; for these there are no places for copies, which serve the blocks that a chunk has chosen (`ChosenBlocks`). The
passes over a chunk overwrite its place in the ring. Its first frame, the prototype, is copied to a history slot once,
after the clean pass. Retrieval only changes numbers in a slot table, which `memory_attention` follows.

A frame leaves the ring before it may be retrieved or seen as sink, so that none is attended to twice. Prototypes that
the device has no slot for move to host memory (pinned on CUDA), the least recently retrieved first, and come back when
they are retrieved. When the host's share is full too, the oldest is forgotten. With a history folder every prototype is
on disk as well, right after its chunk, and what leaves host memory is there. Means of un-rotated keys, which
retrieval compares with the prompt, stay on the device for every prototype that is remembered. The stories of a batch
advance together, but each has slots and a share of host memory of its own, so a story is remembered as if it were
alone.

With `bank_dtype="int8"` sink and history lie in frame places of their own, and a frame is quantised once, on its way
out of the ring:

    [ places for copies | ring of the local window ]    [ sink frames | history slots ] as int8, with scales
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from memflow_ops.cache.history import Prototype, Story
from memflow_ops.cache.layout import CacheLayout, on_device
from memflow_ops.cache.policies import BankChoice, DevicePolicy, Policy, Retrieved
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.slot_table import HistorySlotTable
from memflow_ops.cache.state import check_layout, check_places, load_places, save_layout, save_places
from memflow_ops.cache.store import FrameStore, HistoryFolder
from memflow_ops.cache.views import Candidates
from memflow_ops.impl.precision import as_autocast_does
from memflow_ops.ops.cache_write import QKNorm, quantise_memory, write_projections
from memflow_ops.ops.registration.dispatch import needs_grad
from memflow_ops.ops.selection import describe_blocks
from memflow_ops.rotary import apply_rotation, frame_turn, time_pairs, without_time

PLACE_TENSORS = ("keys", "values", "descriptors", "k_scale", "v_scale")
"""What the tensors of a frame place are called in a history on disk; the scales are those of an int8 bank."""


class FrameCache(RingCache):
    """Ring, sink and history of a batch of stories that advance chunk by chunk together.

    Per chunk: `choose_bank` (or `candidates` and `set_bank`, for a choice of one's own), `begin_chunk`, passes that
    write every layer and attend to `window`, `dense` or `memory`, and `commit`. A pass writes with `write`, and the
    last, clean pass also calls `remember` after each write; `write_projections` does both. At a prompt switch
    `restart_window` comes between retrieval and `begin_chunk`. After an interruption `abort` goes back to the last
    commit. Calls out of order raise a RuntimeError, bad tensors a ValueError or TypeError, in both cases before
    anything is changed.

    The commit of a new chunk leaves its prototype and its part of the sink behind; they become visible when the chunk
    has left the window. It also empties the bank but for the sink, because a choice is valid for one chunk.
    """

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

    # ------------------------------------------------------------------------------------------------------ the chunk

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

    def _leaves_prototype(self, chunk: int) -> bool:
        """Whether the chunk's first frame goes to the history; a frame of the sink is not stored twice."""
        return self.layout.device_frames > 0 and chunk * self.layout.chunk_frames >= self.layout.sink_frames

    def _leave_behind(self, chunk: int) -> None:
        layout, prototype = self.layout, chunk * self.layout.chunk_frames
        for frame in range(prototype, min(prototype + layout.chunk_frames, layout.sink_frames)):
            self._copy_from_ring(frame, [layout.sink_frames - 1 - frame] * layout.batch)
        if self._leaves_prototype(chunk):
            self._store_prototype(chunk)

    def _clear_bank(self) -> None:
        self._table.clear(self.visible_sink())

    # ------------------------------------------------------------------------------------------------- what is attended

    def pass_shape(self, sparse: bool) -> tuple[object, ...]:
        self._check_open("pass_shape")
        beyond = (self.has_bank(),) if sparse else (self.visible_sink(), len(self.candidate_frames()[0]))
        return (*self._ring_shape(sparse), *beyond)

    def _is_counted(self, sparse: bool) -> bool:
        # The history lies behind the ring, so that without a full one the valid keys of `dense` have a gap.
        layout = self.layout
        apart = self.candidate_frames()[0] or layout.copied_frames or layout.bank_dtype
        return super()._is_counted(sparse) and (sparse or not apart)

    def _before_ring(self) -> range:
        return range(self.layout.sink_frames - self.visible_sink(), self.layout.sink_frames)

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all that is remembered: visible sink frames, ring and candidates, (B, tokens, Hkv, D).

        With bounded positions a RuntimeError where there is more than the window: one query cannot attend to both.
        A view, except where places for copies lie between sink and ring, and while the window is being re-cached, when
        the ring is not full and the history not next to it. A RuntimeError says when a prototype has already had to
        leave the device.
        """
        self._check_open("dense")
        if self.layout.bank_dtype:
            raise RuntimeError(
                "the past cannot be attended to in full where bank_dtype='int8' keeps it apart from the local window: "
                "attend to selected blocks, or use bank_dtype=None"
            )
        if self.layout.positions == "bounded" and (self.visible_sink() or self.candidate_frames()[0]):
            raise RuntimeError("dense: with positions='bounded' the past is attended to block by block, see `memory`")
        if any(story.evicted for story in self._stories):
            raise RuntimeError(
                f"the history has outgrown device_frames={self.layout.device_frames}, so it can no longer be attended "
                "to in full; raise device_frames or use memory='memflow'"
            )
        # Nothing has ever been evicted, so the candidates, the oldest prototypes, lie in the leading slots.
        before = self._before_ring()
        spans: list[tuple[int, int]] = []
        for start, count in (
            (before.start, len(before)),
            (self._ring_start, len(self._ring)),
            (self.layout.history_start, len(self.candidate_frames()[0])),
        ):
            if spans and spans[-1][1] == start:
                spans[-1] = spans[-1][0], start + count
            elif count:
                spans.append((start, start + count))
        keys, values = zip(*(self._view(layer, *span) for span in spans), strict=True)
        return (keys[0], values[0]) if len(spans) == 1 else (torch.cat(keys, 1), torch.cat(values, 1))

    # --------------------------------------------------------------------------------------------------------- the bank

    def visible_sink(self) -> int:
        """How many sink frames have left the window of the coming or current chunk; always the first ones."""
        return min(self.layout.sink_frames, self._first_in_window())

    def update_bank(self, text_keys: Sequence[Tensor], recached: Sequence[bool] | None = None) -> None:
        """Nothing: `commit` has stored the chunk's prototype, whatever the prompt was."""

    def candidate_frames(self) -> list[list[int]]:
        """Per story the prototypes that have left the window of the coming or current chunk, ascending.

        Every story stores one prototype per chunk and forgets only candidates, so all stories have as many.
        """
        first = self._first_in_window()
        return [[frame for frame in story.history if frame < first] for story in self._stories]

    def candidates(self) -> Candidates:
        """All frames that retrieval may choose from for the coming chunk, those off the device included."""
        return self._candidates(self.candidate_frames())

    def _candidates(self, frames: list[list[int]]) -> Candidates:
        rows = [[story.history[frame].row for frame in of] for story, of in zip(self._stories, frames, strict=True)]
        return Candidates(frames, self._means, self.layout.relevance_lengths, on_device(rows, torch.int32, self.device))

    def choose_bank(self, policy: Policy | None, text_keys: Sequence[Tensor], text_lengths: Tensor) -> BankChoice:
        """Retrieves what the policy chooses for the coming chunk; nothing without a policy or without candidates.

        The choice stays on the device where the policy can leave it there and no frame has to be moved.
        """
        self._check_usable("choose_bank")
        if policy is None or not self.candidate_frames()[0]:
            return Retrieved.nothing(self.layout.batch)
        if isinstance(policy, DevicePolicy) and self.moves_nothing():
            choice = policy.choose_on_device(self.candidates(), text_keys, text_lengths)
            self.set_bank_on_device(choice.indices)
            return choice
        retrieved = policy.choose(self.candidates(), text_keys, text_lengths)
        self.set_bank(retrieved.frames)
        return retrieved

    def bank(self) -> list[list[int]]:
        """Per story the absolute indices of the bank frames in bank order: visible sink, then retrieved, ascending.

        Waits for the device where `set_bank_on_device` has set it.
        """
        self._table.read()
        return [[*range(self.visible_sink()), *story.retrieved] for story in self._stories]

    def bank_by_layer(self) -> list[list[list[int]]]:
        return [self.bank()] * self.layout.layers  # one choice serves all layers

    def bank_sizes(self) -> list[int]:
        """Per story how many frames `bank` has; waits for nothing."""
        return [self.visible_sink() + count for count in self._table.retrieved]

    def has_bank(self) -> bool:
        return any(self.bank_sizes())

    def moves_nothing(self) -> bool:
        """Whether the device has a slot for every candidate and for the prototype of the coming chunk.

        The host then need not know which frames the bank has, see `set_bank_on_device`.
        """
        first = self._first_in_window()
        stays = all(p.slot is not None for s in self._stories for p in s.history.values() if p.frame < first)
        return stays and all(len(story.history) < self.layout.device_frames for story in self._stories)

    def reads_ahead(self) -> bool:
        return any(p.only_on_disk for story in self._stories for p in story.history.values())

    def expect_bank(self, policy: Policy, text_keys: Sequence[Tensor], text_lengths: Tensor) -> None:
        """As in `RingCache`: what is only on disk is read while the passes of the coming chunk run.

        What is retrieved in the end is found by its index, whatever has been expected.
        """
        first = self._first_in_window(self._committed + 1)
        frames = [[frame for frame in story.history if frame < first] for story in self._stories]
        expected = policy.choose(self._candidates(frames), text_keys, text_lengths).frames
        for story, of in zip(self._stories, expected, strict=True):
            story.expect(of)

    def disk_reads(self) -> tuple[int, int]:
        """How many frames that were only on disk have been retrieved: those that `expect_bank` had begun to read
        before, and those that were read when they were needed."""
        return sum(store.hits for store in self._stores), sum(store.misses for store in self._stores)

    def set_bank(self, chosen: Sequence[Sequence[int]]) -> None:
        """Retrieves, per story, the given candidate frames for the coming chunk; those off the device are brought back.

        Waits for nothing but the disk: the copies and the new slot table are queued. A StoreError where a frame on disk
        cannot be read or is damaged.
        """
        if self._open is not None:
            raise RuntimeError("set_bank: the bank is chosen before begin_chunk")
        self._table.check(chosen, self.candidate_frames())
        self._table.read()
        for story, frames in zip(self._stories, chosen, strict=True):
            story.retrieve(frames, self._committed, self._first_in_window())
        self._table.retrieve(self.visible_sink(), [sorted(frames) for frames in chosen])

    def set_bank_on_device(self, indices: Tensor) -> None:
        """As `set_bank`, with a choice that stays on the device; only where this chunk `moves_nothing`.

        indices: (B, K) int32 into `candidate_frames`, K up to bank_frames, different ones in a story. Waits for
        nothing: which frames they are is read when that has to be known, in `bank`, `set_bank` and `state_dict`.
        """
        if self._open is not None:
            raise RuntimeError("set_bank_on_device: the bank is chosen before begin_chunk")
        if not self.moves_nothing():
            raise RuntimeError("set_bank_on_device: the device has no room for all of the history, use set_bank")
        self._table.retrieve_on_device(self.visible_sink(), self._committed, self.candidate_frames(), indices)

    # -------------------------------------------------------------------------------------------------------- the state

    def state_dict(self, in_full: bool = False) -> dict[str, Any]:
        """As in `RingCache`. The choice of a bank is no part of the state, because every chunk makes its own.

        With a history folder the state names the records of the history instead of holding it; they are on the disk
        when this returns. It can be loaded by a cache that has the same folder. in_full: it holds the history in any
        case, for a cache without a folder.
        """
        self._check_between_chunks("state_dict")
        self._check_usable("state_dict")
        layout = self.layout
        ring = range(self._ring_start, self._ring_start + len(self._ring))
        stored = min(layout.sink_frames, self._committed * layout.chunk_frames)
        sink = range(layout.sink_frames - stored, layout.sink_frames)
        self._table.read()
        kept = [(story, prototype) for story in self._stories for prototype in story.history.values()]
        named = self._stores and not in_full
        if named:
            kept = []  # the records of the store have their keys, values and means
        places = sorted({*sink, *(story.place_of(p) for story, p in kept if p.slot is not None)})
        if layout.bank_dtype is None:
            places = sorted({*places, *ring})
        rows = sorted({p.row for _, p in kept})
        return {
            "layout": save_layout(layout),
            "committed": self._committed,
            "ever_evicted": any(story.evicted for story in self._stories),
            "ring": [frame // layout.chunk_frames for frame in self._ring[:: layout.chunk_frames]],  # chunk numbers
            "places": [place - self._copied_before(place) for place in places],
            "pools": save_places(self._bank, places),
            # With an int8 bank the window is not among them.
            **({"window": save_places(self._places[:2], ring)} if layout.bank_dtype else {}),
            "rows": rows,
            "means": save_places([self._means], rows),
            "history": [story.saved_history() for story in self._stories],
            "host": [story.saved_host(in_full) for story in self._stories],
            "stores": [store.saved() for store in self._stores] if named else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As in `RingCache`. A StoreError where the history folder does not give what the state names; what it held
        before is lost then, and the cache takes nothing but a state that can be loaded."""
        check_layout(self.layout, state.get("layout"))
        places = [place + self._copied_before(place) for place in state["places"]]
        check_places("pools", self._bank, places, state["pools"])
        size = self.layout.chunk_frames
        frames = [chunk * size + i for chunk in state["ring"] for i in range(size)]
        ring = range(self._ring_start, self._ring_start + len(frames))
        if self.layout.bank_dtype:
            check_places("window", self._places[:2], ring, state["window"])
        check_places("means", [self._means], state["rows"], state["means"])
        saved = state.get("stores", [])
        if bool(saved) != bool(self._stores):
            where = "in a history folder, which this cache has not" if saved else "itself, and this cache has a folder"
            raise ValueError(f"the state holds its history {where}")
        parts = [store.opened(of_story) for store, of_story in zip(self._stores, saved, strict=True)]
        stories = [self._new_story(number) for number in range(self.layout.batch)]
        for story, history, host in zip(stories, state["history"], state["host"], strict=True):
            story.load(history, host)
            story.evicted = state["ever_evicted"]
        self._half_loaded = True
        for number, (store, of_story) in enumerate(zip(self._stores, parts, strict=True)):
            store.go_on(of_story, stories[number].history)
            for prototype in stories[number].history.values():
                store.means(prototype.frame, self._means[:, number, prototype.row])
            stories[number].read_slots()
        load_places(self._bank, places, state["pools"])
        if self.layout.bank_dtype:
            load_places(self._places[:2], ring, state["window"])
        load_places([self._means], state["rows"], state["means"])
        self._table.forget_unread()
        self._stories[:] = stories  # in place, because the slot table follows this list
        self._go_on_after(state["committed"], frames)
        self._clear_bank()
        self._half_loaded = False

    # ---------------------------------------------------------------------------------------------------------- details

    def _check_usable(self, what: str) -> None:
        if self._stores and not self._leave_history.alive:
            raise RuntimeError(f"{what}: the cache has been closed, and with it its history folder")
        if self._half_loaded:
            raise RuntimeError(f"{what}: a state could not be loaded to its end; load one that can be read")

    def _copied_before(self, place: int) -> int:
        """How many places for copies lie before a frame place of sink, ring or history. Saved places are counted
        without them, so that a cache that has some goes on where another was."""
        layout = self.layout
        return layout.copied_frames if layout.bank_dtype is None and place >= layout.sink_frames else 0

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
