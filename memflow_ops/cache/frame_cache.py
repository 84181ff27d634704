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

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memflow_ops.cache.layout import on_device
from memflow_ops.cache.policies import BankChoice, DevicePolicy, Policy, Retrieved
from memflow_ops.cache.prototypes import PrototypeCache
from memflow_ops.cache.state import check_layout, check_places, load_places, save_layout, save_places
from memflow_ops.cache.views import Candidates


class FrameCache(PrototypeCache):
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
        """As in `StreamCache`: what is only on disk is read while the passes of the coming chunk run.

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
        """As in `StreamCache`. The choice of a bank is no part of the state, because every chunk makes its own.

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
        """As in `StreamCache`. A StoreError where the history folder does not give what the state names; what it held
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

    def _clear_bank(self) -> None:
        self._table.clear(self.visible_sink())

    def _copied_before(self, place: int) -> int:
        """How many places for copies lie before a frame place of sink, ring or history. Saved places are counted
        without them, so that a cache that has some goes on where another was."""
        layout = self.layout
        return layout.copied_frames if layout.bank_dtype is None and place >= layout.sink_frames else 0
