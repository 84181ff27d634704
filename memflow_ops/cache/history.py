"""The history of one story in a `FrameCache`: its prototypes, on the device or in host memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memflow_ops.cache.layout import CacheLayout


@dataclass
class Prototype:
    """Where the first frame of a chunk is kept for one story: in a history slot, or in host memory."""

    frame: int  # absolute index
    row: int  # where its means are
    last_used: int  # number of the chunk that retrieved it last, or for which it became a candidate
    slot: int | None  # None: the frame is in host memory
    host: tuple[Tensor, ...] = ()  # its keys and values (layers, T, Hkv, D) and descriptors, if it is in host memory


class Story:
    """The bookkeeping of one story's history.

    Which slots and rows are free is not stored but read off the history, so that no interruption can make the two
    disagree.
    """

    def __init__(self, layout: CacheLayout, pools: Sequence[Tensor]):
        """pools: the story's keys, values and descriptors by frame place, (layers, P, tokens or blocks, Hkv, D)."""
        self.layout, self._pools = layout, pools
        self.history: dict[int, Prototype] = {}  # by frame index, ascending
        self.free_host: list[tuple[Tensor, ...]] = []  # room in host memory that prototypes have left
        self.retrieved: list[int] = []  # frames of the current bank, ascending
        self.evicted = False  # whether a prototype has ever had to leave the device

    def free_row(self) -> int:
        """A row of the means that no prototype has."""
        row = _first_free((p.row for p in self.history.values()), self.layout.device_frames + self.layout.host_frames)
        assert row is not None, "there is room for every frame that may be remembered"
        return row

    def free_slot(self, first: int, keep: Sequence[int] = ()) -> int:
        """A free history slot; where there is none, the least recently used prototype leaves the device first.

        Only frames before `first` and not in `keep` may leave it.
        """
        slot = self._unused_slot()
        if slot is None:
            movable = [p for p in self.history.values() if p.slot is not None and p.frame < first]
            victim = min((p for p in movable if p.frame not in keep), key=lambda p: (p.last_used, p.frame))
            # Where frames are kept, one of them is about to leave host memory in return, so one more may enter.
            self._move_off_device(victim, room=self.layout.host_frames + bool(keep))
            slot = self._unused_slot()
        assert slot is not None, "there is room for every frame that may be remembered"
        return slot

    def retrieve(self, frames: Sequence[int], chunk: int, first: int) -> None:
        """Marks these frames, all before `first`, as used by a chunk, and brings those in host memory back."""
        for frame in frames:
            self.history[frame].last_used = chunk
        for frame in frames:
            if self.history[frame].slot is None:
                self.bring_back(self.history[frame], first, keep=frames)

    def bring_back(self, prototype: Prototype, first: int, keep: Sequence[int]) -> None:
        """Copies a prototype from host memory into a slot; frames in `keep` and from `first` on stay on the device.

        All copies are queued on one stream, so the room that it leaves may be reused at once.
        """
        slot = self.free_slot(first, keep)
        for pool, source in zip(self._pools, prototype.host, strict=True):
            pool[:, self.place(slot)].copy_(source, non_blocking=True)
        prototype.slot = slot
        self.free_host.append(prototype.host)
        prototype.host = ()

    def place(self, slot: int) -> int:
        """The frame place of a history slot."""
        return self.layout.history_start + slot

    def place_of(self, prototype: Prototype) -> int:
        """The frame place of a prototype that is on the device."""
        assert prototype.slot is not None, f"frame {prototype.frame} is in host memory"
        return self.place(prototype.slot)

    def host_frame(self) -> tuple[Tensor, ...]:
        """New room for a frame in host memory: keys, values and descriptors."""
        pinned = self._pools[0].device.type == "cuda"  # copies to pinned memory do not make the host wait
        shapes = [(pool.shape[0], *pool.shape[2:]) for pool in self._pools]
        return tuple(torch.empty(shape, dtype=self.layout.dtype, device="cpu", pin_memory=pinned) for shape in shapes)

    def saved_history(self) -> list[tuple[int, int, int, int | None]]:
        """Frame, row, last use and slot of every prototype."""
        return [(p.frame, p.row, p.last_used, p.slot) for p in self.history.values()]

    def saved_host(self) -> list[tuple[Tensor, ...]]:
        """What every prototype has in host memory, copied, so that a frame that comes back changes no saved state."""
        return [tuple(tensor.clone() for tensor in p.host) for p in self.history.values()]

    def load(self, history: Iterable[tuple[int, int, int, int | None]], host: Iterable[tuple[Tensor, ...]]) -> None:
        """Fills a story without history with what `saved_history` and `saved_host` have returned."""
        for (frame, row, last_used, slot), tensors in zip(history, host, strict=True):
            prototype = Prototype(frame, row, last_used, slot)
            if slot is None:
                prototype.host = self.host_frame()
                for target, source in zip(prototype.host, tensors, strict=True):
                    target.copy_(source)
            self.history[frame] = prototype

    def _unused_slot(self) -> int | None:
        return _first_free((p.slot for p in self.history.values()), self.layout.device_frames)

    def _move_off_device(self, prototype: Prototype, room: int) -> None:
        """Moves a prototype to host memory, which has room for `room` frames.

        Where it is full, the oldest of the frames off the device, this one included, is forgotten.
        """
        self.evicted = True
        off_device = [p for p in self.history.values() if p.slot is None]
        if len(off_device) >= room:
            oldest = min([*off_device, prototype], key=lambda p: p.frame)
            self._forget(oldest)
            if oldest is prototype:
                return
        host = self.free_host.pop() if self.free_host else self.host_frame()
        for pool, target in zip(self._pools, host, strict=True):
            target.copy_(pool[:, self.place_of(prototype)], non_blocking=True)
        prototype.host = host
        prototype.slot = None

    def _forget(self, prototype: Prototype) -> None:
        del self.history[prototype.frame]
        if prototype.slot is None:
            self.free_host.append(prototype.host)


def _first_free(used: Iterable[int | None], count: int) -> int | None:
    """The lowest of `count` numbers that is not used."""
    taken = set(used)
    return next((number for number in range(count) if number not in taken), None)
