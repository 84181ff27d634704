"""The cache of the released MemFlow (arXiv 2512.14699): sink, local window, and a bank that every layer fills itself.

The authors' checkpoints were tuned with this, as far as the outputs of their code show. It differs from `FrameCache` in
that a frame may be attended to twice (as sink or in the window, and in the bank), that nothing of the past is kept but
the bank, whose frames are compared by *rotated* keys, and that each layer chooses its own. The authors have two
programs, which fill the bank on different schedules, see `BankSchedule`; the one for several prompts also re-caches the
window at a prompt switch, in one pass whose queries all see the whole window. One preallocated pool per
tensor holds, for every layer and story, P frame places in this order:

    [ bank, last place first | sink frames | ring of the local window ]

so that all that is there, however full each part, is one view: dense attention copies nothing. The order inside the
bank is not the authors', who move frames so that the best comes first: here a new frame takes the place of the one that
is dropped. Keys have no order, so the attention is the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from memflow_ops.cache.layout import on_device
from memflow_ops.cache.policies import BankChoice, Policy, Retrieved
from memflow_ops.cache.released_layout import ReleasedLayout
from memflow_ops.cache.ring import RingCache
from memflow_ops.cache.slot_table import SlotTable
from memflow_ops.cache.state import check_layout, check_places, load_places, save_layout, save_places
from memflow_ops.impl.precision import as_autocast_does
from memflow_ops.ops.cache_write import QKNorm
from memflow_ops.ops.registration.dispatch import needs_grad
from memflow_ops.ops.selection import describe_blocks
from memflow_ops.rotary import apply_rotation


class KeptFrames(NamedTuple):
    """What the bank kept when it dropped a frame, best first; one frame fewer than the bank has places."""

    frames: Tensor  # (layers, B, bank_frames - 1) int64 absolute indices
    scores: Tensor  # (layers, B, bank_frames - 1) float32
    scales: Tensor  # (layers, B) float32: the largest score with absolute values; rounding errors are relative to it


class HeldByLayers(NamedTuple):
    """The frames in the banks of all layers, still on the device."""

    frames: Tensor  # (layers, B, bank frames so far) int64 absolute indices

    def read(self) -> Retrieved:
        """First the frames that most layers hold; as the score of a frame, the share of layers that do."""
        layers = self.frames.tolist()
        frames, shares = [], []
        for story in range(self.frames.shape[1]):
            held = Counter(frame for layer in layers for frame in set(layer[story]))
            ranked = sorted(held, key=lambda frame: (-held[frame], frame))
            frames.append(ranked)
            shares.append([held[frame] / len(layers) for frame in ranked])
        return Retrieved(frames, shares)


class ReleasedCache(RingCache):
    """Sink, bank and ring of a batch of stories that advance chunk by chunk together.

    Per chunk: `update_bank`, `begin_chunk`, passes that write every layer and attend to `dense` (all of it) or to
    `window` and a selection of `memory`, then `commit`; what the last, clean pass has written stays. At a prompt switch
    `restart_window` may come between `update_bank` and `begin_chunk`. With the schedule "interactive", one pass over
    all `open_frames` follows, opened and committed like a chunk. `abort` undoes what was begun and not committed.
    Calls out of order raise a RuntimeError, bad tensors a ValueError or TypeError, before anything is changed.
    """

    takes_projections: ClassVar[bool] = False
    layout: ReleasedLayout

    def __init__(
        self,
        layout: ReleasedLayout,
        device: torch.device | str = "cpu",
        mean_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ):
        """mean_over_ranks: where several processes have some of the heads each, the mean of a tensor over them, the
        same on all. The scores of the bank's frames go through it, so that all processes drop the same frames."""
        super().__init__(layout, device)
        self._mean_over_ranks = mean_over_ranks
        self._table = SlotTable(layout, self.device)
        places = (layout.layers, layout.batch, layout.bank_frames)
        self._bank_ids = torch.full(places, -1, dtype=torch.long, device=self.device)
        self._newest = torch.zeros(places[:2], dtype=torch.long, device=self.device)  # bank place that was filled last
        self._bank_fill = 0
        self._bank_chunk = 0  # the chunk that the bank is ready for
        self._dropping: tuple[int, Tensor, KeptFrames] | None = None  # for which chunk, bank places (layers, B)
        self.kept: KeptFrames | None = None
        """What the last `update_bank` kept; None when it dropped nothing."""
        self._in_sink = range(0)  # the places of the open chunk's sink frames, when they are written

    # ------------------------------------------------------------------------------------------------------ the chunk

    def begin_chunk(self) -> int:
        if (self._interactive or not self._to_recache) and self._bank_chunk < self._committed:
            raise RuntimeError("begin_chunk: the bank has not been brought up to date, see update_bank")
        first_frame = super().begin_chunk()
        bank = self.layout.bank_frames
        places = [bank + frame for frame in range(self._sink_fill())]
        places += [bank - 1 - place for place in range(self._bank_fill)]
        self._table.write([places] * self.layout.batch)
        return first_frame

    def restart_window(self, stories: Sequence[bool] | None = None) -> list[int]:
        """As in every cache, but with the schedule "interactive" the window is re-cached in one pass.

        Then the ring stays as it is, and the one pass that is to follow is over the frames of sink and window, as many
        as there are, up to the coming chunk: `open_frames`, from the one frame that is returned on. As in the released
        code, the first of them are passed to no purpose once the video is longer than that, because the sink keeps its
        keys; before, the sink is rewritten too.
        """
        if not self._interactive:
            return super().restart_window(stories)
        self._rewritten = self._stories_to_rewrite(stories)
        self._ring_before = self._ring.copy()
        if not self._committed:
            return []
        self._to_recache = [self._committed - 1]
        return [self._frames_to_write(self._committed - 1).start]

    def _frames_to_write(self, chunk: int) -> range:
        if not (self._interactive and self._to_recache):
            return super()._frames_to_write(chunk)
        end = self._committed * self.layout.chunk_frames
        return range(max(0, end - self.layout.recached_frames), end)

    def _places_of(self, frames: Sequence[int]) -> list[int]:
        """Sink frames go to the sink at once, and are left alone while re-caching; the others go to the ring."""
        if self._interactive and self._to_recache:
            return self._places_again(frames)
        bank, in_sink = self.layout.bank_frames, [frame for frame in frames if frame < self.layout.sink_frames]
        self._in_sink = range(0) if self._to_recache else range(bank + frames[0], bank + frames[0] + len(in_sink))
        sink = [-1] * len(in_sink) if self._to_recache else list(self._in_sink)
        return [*sink, *super()._places_of(frames[len(in_sink) :])]

    def _places_again(self, frames: Sequence[int]) -> list[int]:
        """Where the frames of the window lie already; the sink is only rewritten while the video still holds no more
        than sink and window."""
        bank, sink = self.layout.bank_frames, self.layout.sink_frames
        if frames[0] > 0:
            self._in_sink = range(0)
            return [-1] * sink + [self._place_in_ring(frame) for frame in frames[sink:]]
        self._in_sink = range(bank, bank + min(sink, len(frames)))
        return [*self._in_sink, *(self._place_in_ring(frame) for frame in frames[sink:])]

    def _describe_written(self, layer: int, k: Tensor) -> None:
        """Describes sink frames; the ring needs no descriptors."""
        if self._in_sink:
            sink, tokens = self._in_sink, self.layout.frame_tokens
            described = describe_blocks(k[:, : len(sink) * tokens].detach(), tokens, tokens)
            target = self._places[2][layer, :, sink.start : sink.stop, 0]
            if not self._to_recache or all(self._rewritten):
                target.copy_(described)
            else:
                stories = [story for story, rewritten in enumerate(self._rewritten) if rewritten]
                target[stories] = described[stories]

    def remember(self, layer: int, k: Tensor) -> None:
        """As in every cache. Takes no means: the bank goes by rotated keys, which are in place."""
        self._check_open("remember")
        (k,) = as_autocast_does(k, to=self.layout.dtype)
        self.layout.check_chunk_tensor("k", layer, k, self.device)
        self._remembered.add(layer)

    def _leave_behind(self, chunk: int) -> None:
        """Nothing: `update_bank` takes the chunk's first frame while it is still in the ring or in the sink."""

    def _clear_bank(self) -> None:
        """Nothing: the bank is not chosen for a chunk, it stays."""

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
        """Rotates queries and keys, which must be normalised already, and writes the layer; returns the rotated q.

        impl changes nothing here, because there is no fused operator to choose.
        """
        if norm is not None:
            raise NotImplementedError("write_projections: a ReleasedCache takes queries and keys that are normalised")
        if memory_rotation is not None or memory_q is not None:
            raise NotImplementedError("write_projections: the bank of a ReleasedCache takes the queries of the window")
        q, k, v = as_autocast_does(q, k, v, to=self.layout.dtype)
        rotated_k = apply_rotation(k, *rotation)
        self.write(layer, rotated_k, v)
        self._keep_in_graph(layer, rotated_k, v, needs_grad(q, k, v))
        if remember:
            self.remember(layer, k)
        return apply_rotation(q, *rotation)

    # ------------------------------------------------------------------------------------------------------- the bank

    def update_bank(self, text_keys: Sequence[Tensor], recached: Sequence[bool] | None = None) -> None:
        """Before each chunk: the first frame of a finished chunk enters the bank.

        Of the last finished chunk with the schedule "single-prompt"; with "interactive" of the last one whose number is
        a multiple of record_interval. With n = (chunk - 1) // record_interval + 1 it takes place n of the bank,
        whichever frame had it. Where there is no such place, it takes, layer by layer, the place of the frame that is
        least relevant to the prompt. With "interactive" this is done anew before every chunk, though the frame has been
        there since the last one: the frame is then there twice, or takes its own place.

        text_keys: per layer the keys (B, text_len, H, D) of the text cross-attention, padding included, of the *last*
            finished chunk's prompt. The score is the mean over positions and heads of (text key) . (mean rotated key of
            the frame) / sqrt(D), without the softmax of the paper's equation.
        recached: the stories whose window `restart_window` will restart for this chunk. With "interactive", the frame
            takes in these the place of the one that came last: the released code has emptied its text keys by then, so
            that all scores are 0, and of equal scores the earlier places win.

        Repeating the call before the chunk is committed changes nothing. Needs no answer from the device.
        """
        layout, chunk = self.layout, self._committed
        if self._open is not None:
            raise RuntimeError("update_bank: the bank is brought up to date before begin_chunk")
        if chunk == self._bank_chunk:
            return
        if len(text_keys) != layout.layers:
            raise ValueError(f"text_keys must have one entry per layer, {layout.layers}, got {len(text_keys)}")
        if recached is not None and len(recached) != layout.batch:
            raise ValueError(f"recached must have {layout.batch} entries, one per story, got {len(recached)}")
        self.kept = None
        if layout.bank_frames:
            place = (chunk - 1) // layout.record_interval
            giver = place * layout.record_interval if self._interactive else chunk - 1
            if place < layout.bank_frames:
                if giver == chunk - 1:  # otherwise it is there already
                    self._record(giver, torch.full(self._newest.shape, place, dtype=torch.long, device=self.device))
                self._bank_fill = max(self._bank_fill, place + 1)
            else:
                if self._dropping is None or self._dropping[0] != chunk:
                    self._dropping = (chunk, *self._least_relevant(text_keys, recached))
                _, places, self.kept = self._dropping
                self._record(giver, places)
        self._bank_chunk = chunk

    def choose_bank(self, policy: Policy | None, text_keys: Sequence[Tensor], text_lengths: Tensor) -> BankChoice:
        """Says what `update_bank` has left in the bank; there is nothing further to choose."""
        return HeldByLayers(self.recorded())

    def recorded(self) -> Tensor:
        """The absolute indices of the frames that `update_bank` has recorded and that are still held.

        (layers, B, up to bank_frames) int64, on the device, in no order.
        """
        return self._bank_ids[..., : self._bank_fill]

    def has_bank(self) -> bool:
        return True  # an empty bank too is attended to as one

    def bank_by_layer(self) -> list[list[list[int]]]:
        sink = list(range(self._sink_fill()))
        return [[[*sink, *frames] for frames in of_layer] for of_layer in self.recorded().tolist()]

    # ----------------------------------------------------------------------------------------------- what is attended

    def pass_shape(self, sparse: bool) -> tuple[object, ...]:
        self._check_open("pass_shape")
        return (*self._ring_shape(sparse), self._bank_fill, self._sink_fill(), self._in_sink)

    def _before_ring(self) -> range:
        return range(self.layout.bank_frames - self._bank_fill, self.layout.bank_frames + self._sink_fill())

    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of bank, sink and window, (B, tokens, Hkv, D), as views, the current chunk included."""
        self._check_open("dense")
        before = self._before_ring()
        return self._view(layer, before.start, self._ring_start + len(self._ring) if self._ring else before.stop)

    # -------------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        self._check_between_chunks("state_dict")
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
            "bank_newest": self._newest.cpu().clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_layout(self.layout, state.get("layout"))
        check_places("pools", self._places, state["places"], state["pools"])
        load_places(self._places, state["places"], state["pools"])
        self._bank_ids.copy_(state["bank_ids"])
        self._newest = state["bank_newest"].to(self.device)
        self._bank_fill, self._bank_chunk = state["bank_fill"], state["bank_chunk"]
        self._dropping, self.kept = None, None
        self._go_on_after(state["committed"], state["ring"])

    # ---------------------------------------------------------------------------------------------------------- details

    @property
    def _interactive(self) -> bool:
        return self.layout.schedule == "interactive"

    def _sink_fill(self) -> int:
        """Sink frames that exist, those of the open chunk included."""
        finished = self._committed + (self._open == self._committed)
        return min(self.layout.sink_frames, finished * self.layout.chunk_frames)

    def _least_relevant(
        self, text_keys: Sequence[Tensor], recached: Sequence[bool] | None
    ) -> tuple[Tensor, KeptFrames]:
        """The bank place (layers, B) to be given away, and what stays."""
        layout = self.layout
        text = torch.stack([keys.float().mean(1) for keys in text_keys])  # (layers, B, H, D)
        means = self._places[2][:, :, : layout.bank_frames, 0].flip(2).float()  # place 0 lies last
        shared = text.shape[2] // means.shape[3]  # text heads per key head
        means = means.repeat_interleave(shared, 3) / (text.shape[2] * text.shape[3] ** 0.5)
        scores = torch.einsum("lbhd,lbnhd->lbn", text, means)
        scales = torch.einsum("lbhd,lbnhd->lbn", text.abs(), means.abs())
        if self._mean_over_ranks is not None:
            scores, scales = self._mean_over_ranks(torch.stack([scores, scales]))
        scales = scales.amax(-1)
        if self._interactive and recached is not None and any(recached):
            newest = torch.arange(layout.bank_frames, dtype=torch.long, device=self.device) == self._newest[..., None]
            without_text = on_device(list(recached), torch.bool, self.device)[None, :, None]
            scores = torch.where(without_text, -newest.float(), scores)
        order = scores.nan_to_num(nan=-torch.inf).argsort(dim=-1, descending=True, stable=True)
        kept = order[..., :-1]
        return order[..., -1], KeptFrames(self._bank_ids.gather(-1, kept), scores.gather(-1, kept), scales)

    def _record(self, chunk: int, places: Tensor) -> None:
        """Copies the first frame of a finished chunk to the given bank places (layers, B): from sink or ring if it is
        the last chunk, and otherwise from the bank, which it was the last to enter."""
        layout = self.layout
        frame, again = chunk * layout.chunk_frames, chunk < self._committed - 1
        in_sink = frame < layout.sink_frames
        stories, tokens = torch.arange(layout.batch, dtype=torch.long, device=self.device), layout.frame_tokens
        for layer in range(layout.layers):  # layer by layer, so that the copy in between stays small
            keys, values, descriptors = (pool[layer] for pool in self._places)
            target = layout.bank_frames - 1 - places[layer]
            source: tuple[Tensor | slice, Tensor | int]
            if again:
                source = stories, layout.bank_frames - 1 - self._newest[layer]
            else:
                source = slice(None), layout.bank_frames + frame if in_sink else self._place_in_ring(frame)
            described = descriptors[source] if again or in_sink else describe_blocks(keys[source], tokens)
            keys[stories, target] = keys[source].clone()  # cloned: source and target are the same memory to torch
            values[stories, target] = values[source].clone()
            descriptors[stories, target] = described.clone()
        self._bank_ids.scatter_(-1, places[..., None], frame)
        self._newest = places
