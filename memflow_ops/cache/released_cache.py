"""The cache of the released MemFlow (arXiv 2512.14699): sink, local window, and a bank that every layer fills itself.

What the authors' checkpoints were tuned with, as far as the outputs of their code show. It differs from `FrameCache` in
that a frame may be attended to twice (as sink or in the window, and in the bank), that the bank is all there is of the
past, compared by *rotated* keys, and that each layer chooses its own. One preallocated pool per tensor holds, for every
layer and story, P frame places in this order:

    [ bank, last place first | sink frames | ring of the local window ]

so that all that is there, however full each part, is one view: dense attention copies nothing. The order inside the
bank is not the authors', who move frames so that the best comes first: here a new frame takes the place of the one that
is dropped. Keys have no order, so the attention is the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memflow_ops.cache.layout import on_device
from memflow_ops.cache.released_layout import ReleasedLayout
from memflow_ops.cache.state import check_layout, check_places, load_places, save_layout, save_places
from memflow_ops.cache.views import Memory
from memflow_ops.ops import registration
from memflow_ops.ops.selection import describe_blocks


class BankChoice(NamedTuple):
    """What a compression of the bank kept, best first; one frame fewer than the bank has places."""

    frames: Tensor  # (layers, B, bank_frames - 1) int64 absolute indices
    scores: Tensor  # (layers, B, bank_frames - 1) float32
    scales: (
        Tensor  # (layers, B) float32: the same mean with absolute values, of the largest; what rounding is relative to
    )


class ReleasedCache:
    """Sink, bank and ring of a batch of stories that advance chunk by chunk together.

    Per chunk: `update_bank`, `begin_chunk`, passes that call `write` per layer and attend to `dense` (all of it) or to
    `window` and a selection of `memory`, then `commit`; the last pass is the one that stays. At a prompt switch
    `restart_window` may come between `update_bank` and `begin_chunk`. `abort` undoes what was begun and not committed.
    Calls out of order raise a RuntimeError, bad tensors a ValueError or TypeError, before anything is changed.
    """

    def __init__(self, layout: ReleasedLayout, device: torch.device | str = "cpu"):
        self.layout, self.device = layout, torch.device(device)

        self._keys, self._values = layout.allocate_tokens(self.device), layout.allocate_tokens(self.device)
        frames = (layout.layers, layout.batch, layout.pool_frames, layout.kv_heads, layout.head_dim)
        self._descriptors = torch.empty(frames, dtype=layout.dtype, device=self.device)
        # The same memory with one index per frame place: (layers, B, P, tokens, Hkv, D); a frame has one descriptor.
        self._places = [t.unflatten(2, (layout.pool_frames, -1)) for t in (self._keys, self._values, self._descriptors)]
        bank = (layout.layers, layout.batch, layout.bank_frames)
        self._bank_ids = torch.full(bank, -1, dtype=torch.long, device=self.device)
        # Read by kernels, so they stay where they are and are overwritten; entries past the valid frames are place 0.
        table = (layout.batch, layout.sink_frames + layout.bank_frames)
        self._slot_table = torch.zeros(table, dtype=torch.int32, device=self.device)
        self._table_lengths = torch.zeros(layout.batch, dtype=torch.int32, device=self.device)
        # The place of each frame of the open chunk, per story; none for what re-caching leaves alone.
        self._chunk_places = torch.zeros((layout.batch, layout.chunk_frames), dtype=torch.int32, device=self.device)

        self._committed = 0  # chunks
        self._bank_fill = 0
        self._bank_chunk = 0  # the chunk that the bank is ready for
        self._dropping: tuple[int, Tensor, BankChoice] | None = None  # for which chunk, bank places (layers, B)
        self.choice: BankChoice | None = None
        """What the last `update_bank` kept; None when it dropped nothing."""
        self._ring: list[int] = []  # frame per ring place
        self._ring_before: list[int] = []  # to go back to
        self._to_recache: list[int] = []  # chunks still to be passed again, oldest first
        self._rewritten = [True] * layout.batch  # the stories that re-caching rewrites
        self._open: int | None = None
        self._in_sink = range(0)  # the places of the open chunk's sink frames
        self._written: set[int] = set()
        self._noted = (self._written,)

    # ------------------------------------------------------------------------------------------------------ the chunk

    @property
    def committed(self) -> int:
        """Finished chunks."""
        return self._committed

    def begin_chunk(self) -> int:
        """Opens the next chunk (after `restart_window`: the next one to be re-cached) and returns its first frame."""
        if self._open is not None:
            raise RuntimeError("begin_chunk: the current chunk has not been committed")
        layout = self.layout
        if not self._to_recache:
            if self._bank_chunk < self._committed:
                raise RuntimeError("begin_chunk: the bank has not been brought up to date, see update_bank")
            self._ring_before = self._ring.copy()
        self._open = self._to_recache[0] if self._to_recache else self._committed
        first_frame = self._open * layout.chunk_frames
        sink = range(layout.bank_frames + first_frame, layout.bank_frames + layout.sink_frames)[: layout.chunk_frames]
        ring = [self._ring_place(first_frame + i) for i in range(len(sink), layout.chunk_frames)]
        self._in_sink = range(0) if self._to_recache else sink
        places = [*([-1] * len(sink) if self._to_recache else sink), *ring]
        rewritten = self._rewritten if self._to_recache else [True] * layout.batch
        rows = [places if of_story else [-1] * len(places) for of_story in rewritten]
        self._chunk_places.copy_(on_device(rows, torch.int32, self.device))
        self._written.clear()
        self._write_table()
        return first_frame

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts a layer's rotated keys and its values of the current chunk, (B, chunk tokens, Hkv, D), into place.

        Every pass overwrites the last. While re-caching, sink frames and stories whose prompt stayed are left alone.
        """
        self._check_open("write")
        self.layout.check_chunk_tensor("k", layer, k, self.device)
        self.layout.check_chunk_tensor("v", layer, v, self.device)
        for pool, new in zip(self._places, (k, v), strict=False):
            frames = new.detach().unflatten(1, (self.layout.chunk_frames, -1))
            registration.write_frames(pool[layer], self._chunk_places, frames)
        if self._in_sink:  # the ring needs no descriptors
            sink, tokens = self._in_sink, self.layout.frame_tokens
            described = describe_blocks(k[:, : len(sink) * tokens].detach(), tokens, tokens)
            self._places[2][layer, :, sink.start : sink.stop, 0] = described
        self._written.add(layer)

    def notes(self) -> tuple[frozenset[int], ...]:
        """What the passes over the open chunk have done so far, for `note`, as in `FrameCache`."""
        return tuple(map(frozenset, self._noted))

    def note(self, notes: tuple[frozenset[int], ...]) -> None:
        """Says that a pass has done again what it did when `notes` were taken after it, where this object does not see
        it: the replay of a CUDA graph runs no Python."""
        self._check_open("note")
        for kept, new in zip(self._noted, notes, strict=True):
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
        else:
            self._committed += 1
        self._open = None

    def abort(self) -> None:
        """Forgets a chunk that was begun and not committed, and a re-caching that was not completed. Whatever was being
        re-cached must be so again before the next chunk. Does nothing where all is committed."""
        if self._to_recache or self._open == self._committed:
            self._ring = self._ring_before.copy()
        self._to_recache, self._open = [], None

    def restart_window(self, stories: Sequence[bool] | None = None) -> list[int]:
        """Empties the ring at a prompt switch. Returns the first frames of the chunks that stay in the coming chunk's
        window: each must be passed again under the new text, oldest first, in the order in which `begin_chunk` gives
        them out. Sink and bank keep what they hold.

        stories: whose prompt changed (None: all). The others keep their keys and values as they are.
        """
        layout = self.layout
        if self._open is not None:
            raise RuntimeError("restart_window: the current chunk has not been committed")
        if self._to_recache:
            raise RuntimeError(f"restart_window: {len(self._to_recache)} chunks are still to be re-cached")
        if layout.window_frames % layout.chunk_frames:
            raise RuntimeError(
                f"restart_window: a window of {layout.window_frames} frames does not hold whole chunks of "
                f"{layout.chunk_frames}, so its oldest cannot be passed again"
            )
        if stories is not None and len(stories) != layout.batch:
            raise ValueError(f"stories must have {layout.batch} entries, got {len(stories)}")
        self._rewritten = [True] * layout.batch if stories is None else [bool(switched) for switched in stories]
        kept = sorted(self._ring)
        kept = kept[max(0, len(kept) + layout.chunk_frames - layout.window_frames) :]
        if stories is not None and not all(stories):
            # The others' frames must be where `begin_chunk` will hand out their places again: oldest first.
            order = on_device([self._ring_start + self._ring.index(frame) for frame in kept], torch.long, self.device)
            for pool in self._places[:2]:
                for layer in range(layout.layers):  # layer by layer, so that the copy in between stays small
                    pool[layer, :, self._ring_start : self._ring_start + len(kept)] = pool[layer][:, order]
        self._ring_before = kept
        self._to_recache = sorted({frame // layout.chunk_frames for frame in kept})
        self._ring = []  # last, so that `abort` knows that there is something to go back to
        return [chunk * layout.chunk_frames for chunk in self._to_recache]

    # ------------------------------------------------------------------------------------------------------- the bank

    def update_bank(self, text_keys: Sequence[Tensor]) -> None:
        """Before each chunk: the finished chunk's first frame enters the bank. With n = (chunk - 1) // record_interval
        + 1 it takes place n of the bank, over whoever has it; when there is no such place, that of the frame which the
        prompt finds least relevant, layer by layer.

        text_keys: per layer the keys (B, text_len, H, D) of the text cross-attention, padding included, of the *last*
            finished chunk's prompt. The score is the mean over positions and heads of (text key) . (mean rotated key of
            the frame) / sqrt(D), without the softmax of the paper's equation.

        Repeating the call before the chunk is committed changes nothing. Needs no answer from the device.
        """
        layout, chunk = self.layout, self._committed
        if self._open is not None:
            raise RuntimeError("update_bank: the bank is brought up to date before begin_chunk")
        if chunk == self._bank_chunk:
            return
        if len(text_keys) != layout.layers:
            raise ValueError(f"text_keys must have one entry per layer, {layout.layers}, got {len(text_keys)}")
        self.choice = None
        if layout.bank_frames:
            place = (chunk - 1) // layout.record_interval
            if place < layout.bank_frames:
                self._record(torch.full((layout.layers, layout.batch), place, device=self.device))
                self._bank_fill = max(self._bank_fill, place + 1)
            else:
                if self._dropping is None or self._dropping[0] != chunk:
                    self._dropping = (chunk, *self._least_relevant(text_keys))
                _, places, self.choice = self._dropping
                self._record(places)
        self._bank_chunk = chunk

    def bank(self) -> Tensor:
        """The absolute indices of the bank's frames (layers, B, up to bank_frames), on the device, in no order."""
        return self._bank_ids[..., : self._bank_fill]

    def candidates(self) -> Tensor:
        """The absolute index of every frame of `memory`: (layers, B, sink and bank frames so far), on the device."""
        sink = torch.arange(self._sink_fill(), device=self.device)
        return torch.cat([sink.expand(*self._bank_ids.shape[:2], -1), self.bank()], dim=-1)

    # ----------------------------------------------------------------------------------------------- what is attended

    def pass_shape(self, sparse: bool) -> tuple[object, ...]:
        """As in `FrameCache`: all that a pass over the open chunk depends on and that no tensor holds."""
        self._check_open("pass_shape")
        return (bool(self._to_recache), len(self._ring), self._bank_fill, self._sink_fill(), self._in_sink)

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of bank, sink and window, (B, tokens, Hkv, D), as views, the current chunk included."""
        self._check_open("dense")
        return self._view(layer, self.layout.bank_frames - self._bank_fill)

    def window(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the ring alone; empty while the video is no longer than its sink."""
        self._check_open("window")
        return self._view(layer, self._ring_start)

    def memory(self, layer: int) -> Memory:
        """Sink and bank, for `memory_attention` beside `window`: a block is a frame, the sink frames come first."""
        self._check_open("memory")
        pools = self._keys[layer], self._values[layer], self._descriptors[layer]
        return Memory(*pools, self._slot_table, self._table_lengths)

    def window_frames(self) -> list[int]:
        """Absolute indices of the frames in the ring, as they lie there."""
        return self._ring.copy()

    # -------------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """All that later chunks will see, in host memory: tensors, numbers and lists, as `torch.save` takes them. Only
        between chunks."""
        if self._open is not None or self._to_recache:
            raise RuntimeError("state_dict: a chunk is open or still to be re-cached; commit or abort it first")
        layout, bank = self.layout, self.layout.bank_frames
        sink = range(bank, bank + self._sink_fill())
        places = [*range(bank - self._bank_fill, bank), *sink]
        places += range(self._ring_start, self._ring_start + len(self._ring))
        return {
            "layout": save_layout(layout),
            "committed": self._committed,
            "ring": self._ring.copy(),
            "places": places,
            "pools": save_places(self._places, places),
            "bank_fill": self._bank_fill,
            "bank_chunk": self._bank_chunk,
            "bank_ids": self._bank_ids.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a cache of the same layout was; frames lie in the same places, so that the sums of attention
        are the same to the bit. A ValueError, before anything is changed, when the state does not fit."""
        check_layout(self.layout, state.get("layout"))
        check_places("pools", self._places, state["places"], state["pools"])
        load_places(self._places, state["places"], state["pools"])
        self._bank_ids.copy_(state["bank_ids"])
        self._bank_fill, self._bank_chunk = state["bank_fill"], state["bank_chunk"]
        self._committed, self._ring = state["committed"], list(state["ring"])
        self._ring_before, self._dropping, self.choice = self._ring.copy(), None, None
        self._to_recache, self._open = [], None

    # ---------------------------------------------------------------------------------------------------------- details

    @property
    def _ring_start(self) -> int:
        return self.layout.bank_frames + self.layout.sink_frames

    def _sink_fill(self) -> int:
        """Sink frames that exist, those of the open chunk included."""
        finished = self._committed + (self._open == self._committed)
        return min(self.layout.sink_frames, finished * self.layout.chunk_frames)

    def _ring_place(self, frame: int) -> int:
        """Gives a frame the place of the one that leaves the window."""
        if len(self._ring) < self.layout.window_frames:
            self._ring.append(frame)
        else:
            self._ring[self._ring.index(min(self._ring))] = frame
        return self._ring_start + self._ring.index(frame)

    def _view(self, layer: int, first: int) -> tuple[Tensor, Tensor]:
        """Keys and values from frame place `first` to the end of what is there."""
        end = self._ring_start + len(self._ring) if self._ring else self.layout.bank_frames + self._sink_fill()
        tokens = slice(first * self.layout.frame_tokens, max(first, end) * self.layout.frame_tokens)
        return self._keys[layer, :, tokens], self._values[layer, :, tokens]

    def _write_table(self) -> None:
        bank = self.layout.bank_frames
        row = [bank + frame for frame in range(self._sink_fill())]
        row += [bank - 1 - place for place in range(self._bank_fill)]
        padded = row + [0] * (self._slot_table.shape[1] - len(row))
        self._slot_table.copy_(on_device([padded] * self.layout.batch, torch.int32, self.device))
        self._table_lengths.fill_(len(row))

    def _least_relevant(self, text_keys: Sequence[Tensor]) -> tuple[Tensor, BankChoice]:
        """The bank place (layers, B) to be given away, and what stays."""
        layout = self.layout
        text = torch.stack([keys.float().mean(1) for keys in text_keys])  # (layers, B, H, D)
        means = self._places[2][:, :, : layout.bank_frames, 0].flip(2).float()  # place 0 lies last
        shared = text.shape[2] // means.shape[3]  # text heads per key head
        means = means.repeat_interleave(shared, 3) / (text.shape[2] * text.shape[3] ** 0.5)
        scores = torch.einsum("lbhd,lbnhd->lbn", text, means)
        scales = torch.einsum("lbhd,lbnhd->lbn", text.abs(), means.abs()).amax(-1)
        order = scores.nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True)
        kept = order[..., :-1]
        return order[..., -1], BankChoice(self._bank_ids.gather(-1, kept), scores.gather(-1, kept), scales)

    def _record(self, places: Tensor) -> None:
        """Copies the finished chunk's first frame to the given bank places (layers, B)."""
        layout = self.layout
        frame = (self._committed - 1) * layout.chunk_frames
        in_sink = frame < layout.sink_frames
        source = layout.bank_frames + frame if in_sink else self._ring_start + self._ring.index(frame)
        stories, tokens = torch.arange(layout.batch, device=self.device), layout.frame_tokens
        for layer in range(layout.layers):  # layer by layer, so that the copy in between stays small
            keys, values, descriptors = (pool[layer] for pool in self._places)
            target = layout.bank_frames - 1 - places[layer]
            keys[stories, target] = keys[:, source].clone()  # cloned: source and target are the same memory to torch
            values[stories, target] = values[:, source].clone()
            described = descriptors[:, source].clone() if in_sink else describe_blocks(keys[:, source], tokens)
            descriptors[stories, target] = described
        self._bank_ids.scatter_(-1, places[..., None], frame)

    def _check_open(self, what: str) -> None:
        if self._open is None:
            raise RuntimeError(f"{what}: no chunk is open, call begin_chunk first")
