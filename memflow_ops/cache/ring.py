"""What both caches share: pools of frame places, the ring of the local window, and the life of a chunk in it.

A chunk is opened, written by as many passes as the sampler needs, and committed; `abort` goes back to the last commit.
Every step may be interrupted between any two lines, by Ctrl-C for one. Therefore the line that makes a step true stands
last in it, and whatever an interruption leaves half done, `abort` either undoes or completes.
"""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memflow_ops.cache.interface import StreamCache
from memflow_ops.cache.layout import CacheLayout, on_device
from memflow_ops.cache.slot_table import SlotTable
from memflow_ops.cache.views import Memory, Past
from memflow_ops.impl.precision import as_autocast_does
from memflow_ops.ops import registration
from memflow_ops.ops.registration.dispatch import needs_grad
from memflow_ops.ops.transforms import refuse_transforms

PassMarks = tuple[frozenset[int], ...]
"""The layers that the passes over an open chunk have dealt with so far, by what was done in them."""


class RingCache(StreamCache):
    """Pools of frame places for a batch of stories that advance together, with a ring for the local window.

    Each frame of the window has a place in the ring, and a new frame takes the place of the one that leaves the window.
    Keys have no order, so attention reads the ring as it lies.

    A cache cannot be pickled; `state_dict` and `load_state_dict` take its content elsewhere. `copy.deepcopy` gives a
    cache that goes on by itself, with memory of its own.

    A subclass says where its pools have the ring, what a finished chunk leaves behind, and what its bank is.
    """

    _table: SlotTable
    """The bank as kernels read it; a subclass makes it."""

    def __init__(self, layout: CacheLayout, device: torch.device | str):
        self.layout, self.device, self._ring_start = layout, torch.device(device), layout.ring_start
        layout.check_room(self.device)
        self._keys, self._values = layout.allocate_tokens(self.device), layout.allocate_tokens(self.device)
        blocks = (layout.layers, layout.batch, layout.pool_frames * layout.blocks_per_frame)
        vectors = (layout.kv_heads, layout.descriptor_width)
        self._descriptors = torch.empty(*blocks, *vectors, dtype=layout.dtype, device=self.device)
        # The same memory with one index per frame place: (layers, B, P, tokens or blocks, Hkv, D).
        self._places = [t.unflatten(2, (layout.pool_frames, -1)) for t in (self._keys, self._values, self._descriptors)]
        # Where the frames of the bank lie: in the same places, or as int8 in places of their own, with scales.
        self._bank = layout.allocate_int8(self.device) if layout.bank_dtype else self._places
        # The place of each frame of the open chunk, per story; -1 where the frame is not to be written. Kernels read
        # this tensor, so it stays where it is and is overwritten.
        self._chunk_places = torch.zeros((layout.batch, layout.chunk_frames), dtype=torch.int32, device=self.device)
        self._pass_places = self._chunk_places  # or those of a longer pass, which re-caches the window at once
        self.counts_keys = self.device.type == "cuda"
        """Whether a tensor says how many keys are valid while the window is re-cached, see `attended`."""
        # The valid keys of a full ring, and of one with what lies before it, (B,) int32 each. Kernels read these too.
        self._valid_keys = torch.zeros((2, layout.batch), dtype=torch.int32, device=self.device).unbind()
        self._written: set[int] = set()  # layers
        # Keys and values of the open chunk as they were last written, of the layers where gradients flow into them.
        self._in_graph: dict[int, tuple[Tensor, Tensor]] = {}
        self._remembered: set[int] = set()  # layers whose last pass was the clean one
        self.chosen: set[int] = set()
        """The layers that have chosen blocks of the bank since the chunk was opened; `attend_to_memory` notes them."""
        self._marks: tuple[set[int], ...] = (self._written, self._remembered, self.chosen)
        self._go_on_after(0, [])

    def __deepcopy__(self, memo: dict[int, Any]) -> "RingCache":
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        # With one memo for all of them, torch keeps tensors that share memory together.
        vars(other).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return other

    def _go_on_after(self, committed: int, ring: Sequence[int]) -> None:
        """The state between two chunks: `committed` of them are finished, and the ring holds these frames."""
        self._committed = committed
        self._ring = list(ring)  # frame per ring place, those of the open chunk included
        self._ring_before = list(ring)  # what `abort` goes back to
        self._to_recache: list[int] = []  # numbers of the chunks still to be passed again, oldest first
        self._rewritten = [True] * self.layout.batch  # the stories that re-caching rewrites
        self._closing: int | None = None  # number of the finished chunk whose commit is under way
        self._end_chunk()

    def _end_chunk(self) -> None:
        """No chunk is open any more, and nothing keeps the graph of its passes alive."""
        self._in_graph.clear()
        self._open_places: list[int] = []  # what `_chunk_places` says, for the host
        self._open: int | None = None  # number of the chunk between `begin_chunk` and `commit`
        self._open_frames = range(0)  # the absolute frames that the passes over it write

    # ------------------------------------------------------------------------------------------------------ the chunk

    @property
    def committed(self) -> int:
        """How many chunks are finished."""
        return self._committed

    def begin_chunk(self) -> int:
        """Opens the next chunk (after `restart_window`: the next one to be re-cached) and returns its first frame.

        Its frames take the ring places of those that leave the window.
        """
        if self._open is not None:
            raise RuntimeError("begin_chunk: the current chunk has not been committed")
        if not self._to_recache:
            self._ring_before = self._ring.copy()
        self._open = self._to_recache[0] if self._to_recache else self._committed
        self._open_frames = self._frames_to_write(self._open)
        places = self._places_of(self._open_frames)
        rewritten = self._rewritten if self._to_recache else [True] * self.layout.batch
        rows = on_device(
            [places if of_story else [-1] * len(places) for of_story in rewritten], torch.int32, self.device
        )
        self._pass_places = self._chunk_places if len(places) == self.layout.chunk_frames else rows
        self._pass_places.copy_(rows)
        if self.counts_keys:
            for valid, before in zip(self._valid_keys, (0, len(self._before_ring())), strict=True):
                valid.fill_((before + len(self._ring)) * self.layout.frame_tokens)
        self._open_places = places
        self._in_graph.clear()
        for marked in self._marks:
            marked.clear()
        return self._open_frames.start

    def open_frames(self) -> range:
        """The absolute frames that a pass over the open chunk writes: those of the chunk, or of all the window where
        that is re-cached in one pass."""
        self._check_open("open_frames")
        return self._open_frames

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts a layer's rotated keys and its values of the current chunk, (B, chunk tokens, Hkv, D), into place.

        Every pass overwrites the last. While re-caching, only the stories whose prompt changed are written.

        Where k or v needs a gradient, `window` and `dense` return this pass's keys and values as part of the graph, and
        what lies in the pools is written and read without a gradient.
        """
        self._check_open("write")
        refuse_transforms("write", k, v)
        k, v = as_autocast_does(k, v, to=self.layout.dtype)
        count = len(self._open_frames)
        self.layout.check_chunk_tensor("k", layer, k, self.device, count)
        self.layout.check_chunk_tensor("v", layer, v, self.device, count)
        for pool, new in zip(self._places, (k, v), strict=False):
            frames = new.detach().unflatten(1, (count, -1))
            registration.write_frames(pool[layer], self._pass_places, frames)
        self._remembered.discard(layer)
        self._describe_written(layer, k)
        self._written.add(layer)
        self._keep_in_graph(layer, k, v, needs_grad(k, v))

    def pass_marks(self) -> PassMarks:
        """What the passes over the open chunk have done so far, for `restore_pass_marks`."""
        return tuple(map(frozenset, self._marks))

    def restore_pass_marks(self, marks: PassMarks) -> None:
        """Marks the layers that a replayed CUDA graph has just written.

        A replay runs no Python, so the cache cannot record this itself. `marks` is what `pass_marks` returned after the
        recorded pass.
        """
        self._check_open("restore_pass_marks")
        for kept, new in zip(self._marks, marks, strict=True):
            kept.clear()
            kept.update(new)

    def commit(self) -> None:
        """Closes the chunk after its clean pass."""
        self._check_open("commit")
        missing = set(range(self.layout.layers)) - self._written
        if missing:
            raise RuntimeError(f"commit: layers {sorted(missing)} have not been written")
        if self._to_recache:
            self._to_recache.pop(0)
            self._end_chunk()
            return
        # The first chunks leave nothing to remember, but sink and window keep their frames.
        missing = set(range(self.layout.layers)) - self._remembered
        if missing:
            raise RuntimeError(
                f"commit: the last pass over layers {sorted(missing)} was not the clean one, so later chunks would see "
                f"noisy keys: pass the finished frames once more, at timestep 0, and say so by `remember` after each "
                f"`write` (with `write_projections` and `attend_to_memory`: remember=True)"
            )
        # From here on the chunk is finished; if the rest is interrupted, `abort` does it again.
        self._closing = self._committed
        self._committed += 1
        self._close(self._closing)

    def _close(self, chunk: int) -> None:
        self._leave_behind(chunk)
        self._end_chunk()
        self._clear_bank()
        self._closing = None

    def abort(self) -> None:
        """Forgets a chunk that was begun and not committed, and a re-caching that was not completed.

        Chunks that were being re-cached must be re-cached again before the next one. A commit that was interrupted is
        completed. Does nothing where everything is committed.
        """
        if self._to_recache or self._open == self._committed:
            self._ring = self._ring_before.copy()
            self._to_recache, self._closing = [], None
            self._clear_bank()
        elif self._closing is not None:
            self._close(self._closing)
        self._end_chunk()

    def restart_window(self, stories: Sequence[bool] | None = None) -> list[int]:
        """Empties the ring at a prompt switch, so that the window can be re-cached under the new prompt.

        Returns the first frames of the chunks that stay in the coming chunk's window. Each must be passed again under
        the new text, oldest first, which is the order in which `begin_chunk` opens them. The ring grows with them, so
        each of these passes sees only what has been passed again. Sink and history keep what they hold.

        stories: whose prompt changed (None: all). The others keep their keys and values as they are.
        """
        layout = self.layout
        rewritten = self._stories_to_rewrite(stories)
        if layout.window_frames % layout.chunk_frames:
            raise RuntimeError(
                f"restart_window: a window of {layout.window_frames} frames does not hold whole chunks of "
                f"{layout.chunk_frames}, so its oldest cannot be passed again"
            )
        self._rewritten = rewritten
        kept = sorted(self._ring)
        kept = kept[max(0, len(kept) + layout.chunk_frames - layout.window_frames) :]
        if not all(self._rewritten):
            self._order_ring(kept)
        self._ring_before = kept
        self._to_recache = sorted({frame // layout.chunk_frames for frame in kept})
        self._ring = []  # last, so that `abort` knows that there is something to go back to
        return [chunk * layout.chunk_frames for chunk in self._to_recache]

    def _stories_to_rewrite(self, stories: Sequence[bool] | None) -> list[bool]:
        """Which stories a restart of the window rewrites; a RuntimeError where it may not begin now."""
        if self._open is not None:
            raise RuntimeError("restart_window: the current chunk has not been committed")
        if self._to_recache:
            raise RuntimeError(f"restart_window: {len(self._to_recache)} chunks are still to be re-cached")
        batch = self.layout.batch
        if stories is not None and len(stories) != batch:
            raise ValueError(f"stories must have {batch} entries, got {len(stories)}")
        return [True] * batch if stories is None else [bool(switched) for switched in stories]

    # ------------------------------------------------------------------------------------------------- what is attended

    def window(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the ring, (B, window tokens so far, Hkv, D), the current chunk included.

        Views of the pools, but copies where the last pass over the layer needs gradients: they reach its own keys and
        values and end at the past, and the cache may go on before the backward pass.
        """
        self._check_open("window")
        return self._view(layer, self._ring_start, self._ring_start + len(self._ring))

    @property
    def recaches(self) -> bool:
        """Whether the open chunk is one of those that are passed again after a prompt switch."""
        return bool(self._to_recache)

    def copies(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """The last so many tokens of the places for copies, as keys and values (B, tokens, Hkv, D) to be written."""
        start = self._ring_start * self.layout.frame_tokens
        return self._keys[layer, :, start - tokens : start], self._values[layer, :, start - tokens : start]

    def window_with_copies(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """`copies` with `window` behind them, keys and values (B, tokens + window tokens so far, Hkv, D), as views."""
        self._check_open("window_with_copies")
        start, size = self._ring_start * self.layout.frame_tokens, self.layout.frame_tokens
        part = slice(start - tokens, start + len(self._ring) * size)
        return self._keys[layer, :, part], self._values[layer, :, part]

    def attended(self, layer: int, sparse: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """What a pass attends to in full: keys and values of `window` where it is `sparse`, else of `dense`.

        The third is None, or `seqused_k` (B,) int32, how many leading keys are valid of views that are those of a full
        ring. That is so while the window is re-cached, where the cache `counts_keys`: passes over a ring that grows
        have one shape then, and one CUDA graph.
        """
        if layer in self._in_graph or not self._is_counted(sparse):
            return *(self.window(layer) if sparse else self.dense(layer)), None
        self._check_open("attended")
        first = self._ring_start if sparse else self._before_ring().start
        views = self._view(layer, first, self._ring_start + self.layout.window_frames)
        return *views, self._valid_keys[0 if sparse else 1]

    def memory(self, layer: int) -> Memory:
        """The bank, sink included, for `memory_attention` beside the dense `window`.

        The whole pool, but a copy of the bank's frames where the last pass over the layer needs gradients.
        """
        self._check_open("memory")
        if layer in self._in_graph:
            return self._copied_memory(layer)
        keys, values, descriptors, *scales = (pool[layer].flatten(1, 2) for pool in self._bank)  # views
        return Memory(keys, values, descriptors, self._table.slots, self._table.lengths, *scales)

    def past(self, layer: int, sparse: bool) -> Past:
        """What a pass over the open chunk attends to beside the chunk itself, copied, so that the cache may go on.

        sparse: the pass attends to the bank too. A RuntimeError while the window is being re-cached.
        """
        self._check_open("past")
        if self._to_recache:
            raise RuntimeError("past: a window that is being re-cached has no past of its own, commit its chunks first")
        ring = range(self._ring_start, self._ring_start + len(self._ring))
        places = [place for place in ring if place not in self._open_places]
        keys, values = (self._at_places(pool, layer, places).flatten(1, 2) for pool in self._places[:2])
        turn = self.bank_turn()
        return Past(
            keys, values, self._copied_memory(layer) if sparse else None, None if turn is None else turn.clone()
        )

    def window_frames(self) -> list[int]:
        """Absolute indices of the frames in the ring, as they lie there."""
        return self._ring.copy()

    def _check_between_chunks(self, what: str) -> None:
        if self._open is not None or self._to_recache:
            raise RuntimeError(f"{what}: a chunk is open or still to be re-cached; commit or abort it first")

    # -------------------------------------------------------------------------------------------- what a subclass does

    def _frames_to_write(self, chunk: int) -> range:
        """The absolute frames that the passes over an opening chunk, or over one to be re-cached, write."""
        return range(chunk * self.layout.chunk_frames, (chunk + 1) * self.layout.chunk_frames)

    @abstractmethod
    def _before_ring(self) -> range:
        """The frame places that `dense` reads before those of the ring; next to it where keys are counted."""

    def _places_of(self, frames: Sequence[int]) -> list[int]:
        """The frame place that each frame of the opening chunk is written to; -1 for none."""
        return [self._ring_place(frame) for frame in frames]

    @abstractmethod
    def _describe_written(self, layer: int, k: Tensor) -> None:
        """Keeps the layer's descriptors in step with keys k (B, chunk tokens, Hkv, D) that were just written."""

    @abstractmethod
    def _leave_behind(self, chunk: int) -> None:
        """Copies what stays of a finished chunk out of the ring. Called again if it was interrupted."""

    @abstractmethod
    def _clear_bank(self) -> None:
        """Forgets the choice of `choose_bank`, which is valid for one chunk."""

    # ---------------------------------------------------------------------------------------------------------- details

    def _is_counted(self, sparse: bool) -> bool:
        """Whether a tensor says how full the ring is, so that it is no part of a pass's shape; see `attended`."""
        return self.counts_keys and bool(self._to_recache) and len(self._ring) < self.layout.window_frames

    def _ring_shape(self, sparse: bool) -> tuple[object, ...]:
        """What a pass's shape has of the ring."""
        return bool(self._to_recache), None if self._is_counted(sparse) else len(self._ring)

    def _ring_place(self, frame: int) -> int:
        """Gives a frame the place of the one that leaves the window."""
        if len(self._ring) < self.layout.window_frames:
            self._ring.append(frame)
        else:
            self._ring[self._ring.index(min(self._ring))] = frame
        return self._place_in_ring(frame)

    def _place_in_ring(self, frame: int) -> int:
        return self._ring_start + self._ring.index(frame)

    def _order_ring(self, kept: list[int]) -> None:
        """Moves the kept frames to the beginning of the ring, oldest first.

        Only for a switch that concerns some stories of a batch: `begin_chunk` hands the places out again in that order,
        and the frames of the other stories must lie where they will be looked for.
        """
        order = on_device([self._place_in_ring(frame) for frame in kept], torch.long, self.device)
        for pool in self._places[:2]:
            for layer in range(self.layout.layers):  # layer by layer, so that the copy in between stays small
                pool[layer, :, self._ring_start : self._ring_start + len(kept)] = pool[layer][:, order]
        self._ring = kept.copy()

    def _view(self, layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the frame places first to end - 1."""
        if layer in self._in_graph:
            return self._view_in_graph(layer, first, end)
        tokens = slice(first * self.layout.frame_tokens, end * self.layout.frame_tokens)
        return self._keys[layer, :, tokens], self._values[layer, :, tokens]

    def _keep_in_graph(self, layer: int, k: Tensor, v: Tensor, wanted: bool) -> None:
        """Says whether the pass that has just written a layer needs gradients, through what it wrote or beside it."""
        if wanted:
            self._in_graph[layer] = k, v
        else:
            self._in_graph.pop(layer, None)

    def _view_in_graph(self, layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """As `_view`, with the open chunk's keys and values as the pass made them, behind a copy of the others."""
        own = [i for i, place in enumerate(self._open_places) if first <= place < end]
        places = [self._open_places[i] for i in own]
        past = [place for place in range(first, end) if place not in places]
        rewritten = torch.tensor(self._rewritten, dtype=torch.bool, device=self.device).view(-1, 1, 1, 1, 1)
        result = []
        for pool, new in zip(self._places, self._in_graph[layer], strict=False):
            frames = new.unflatten(1, (len(self._open_places), -1))[:, own]
            if self._to_recache and not all(self._rewritten):
                frames = torch.where(rewritten, frames, self._at_places(pool, layer, places))
            result.append(torch.cat([self._at_places(pool, layer, past), frames], 1).flatten(1, 2))
        return result[0], result[1]

    def _at_places(self, pool: Tensor, layer: int, places: list[int]) -> Tensor:
        """A copy of some frame places of a layer, (B, len(places), tokens or blocks, Hkv, D)."""
        return pool[layer].index_select(1, on_device(places, torch.long, self.device))

    def _copied_memory(self, layer: int) -> Memory:
        """The bank of a layer with its frames copied, one after the other."""
        slots = self._table.slots.long()
        each = torch.arange(len(slots), dtype=torch.int64, device=self.device)[:, None]
        keys, values, descriptors, *scales = (pool[layer][each, slots].flatten(1, 2) for pool in self._bank)
        order = torch.arange(slots.shape[1], dtype=torch.int32, device=self.device).repeat(len(slots), 1)
        return Memory(keys, values, descriptors, order, self._table.lengths.clone(), *scales)

    def _check_open(self, what: str) -> None:
        if self._open is None:
            raise RuntimeError(f"{what}: no chunk is open, call begin_chunk first")
