"""What a `FrameCache` remembers of one story beyond the window: its prototypes, on the device or in host memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memflow_ops.cache_layout import CacheLayout


@dataclass
class Prototype:
    """Where the first frame of a chunk is kept for one story: in a history slot, or else in host memory."""

    frame: int
    row: int  # of the means
    last_used: int  # number of the chunk that retrieved it last, or for which it became a candidate
    slot: int | None
    host: tuple[Tensor, ...] = ()  # keys, values (layers, T, Hkv, D) and descriptors


class Story:
    """The bookkeeping of one story's history. Which slots and rows are free is not kept but seen from the history, so
    that no interruption can make the two disagree."""

    def __init__(self, layout: CacheLayout, pools: Sequence[Tensor]):
        """pools: the story's keys, values and descriptors by frame place, (layers, P, tokens or blocks, Hkv, D)."""
        self.layout, self._pools = layout, pools
        self.history: dict[int, Prototype] = {}  # by frame index, ascending
        self.free_host: list[tuple[Tensor, ...]] = []
        self.bank: list[int] = []  # retrieved frames, ascending
        self.evicted = False  # whether a prototype has ever had to leave the device

    def free_row(self) -> int:
        """A row of the means."""
        row = _first_free((p.row for p in self.history.values()), self.layout.device_frames + self.layout.host_frames)
        assert row is not None, "there is room for every frame that may be remembered"
        return row

    def free_slot(self, first: int, keep: Sequence[int] = ()) -> int:
        """A history slot: a free one, or that of the least recently used frame before `first`, but not of one in
        `keep`."""
        slot = self._unused_slot()
        if slot is None:
            movable = [p for p in self.history.values() if p.slot is not None and p.frame < first]
            victim = min((p for p in movable if p.frame not in keep), key=lambda p: (p.last_used, p.frame))
            # When a frame is about to leave host memory in return (keep), one more may enter.
            self._move_off_device(victim, room=self.layout.host_frames + bool(keep))
            slot = self._unused_slot()
        assert slot is not None, "there is room for every frame that may be remembered"
        return slot

    def bring_back(self, prototype: Prototype, first: int, keep: Sequence[int]) -> None:
        """Copies a prototype from host memory into a slot. Copies are queued on one stream, so reuse is in order."""
        slot = self.free_slot(first, keep)
        for pool, source in zip(self._pools, prototype.host, strict=True):
            pool[:, self.place(slot)].copy_(source, non_blocking=True)
        prototype.slot = slot
        self.free_host.append(prototype.host)
        prototype.host = ()

    def place(self, slot: int) -> int:
        """The frame place of a history slot."""
        return self.layout.sink_frames + self.layout.window_frames + slot

    def place_of(self, prototype: Prototype) -> int:
        """The frame place of a prototype that is on the device."""
        assert prototype.slot is not None, f"frame {prototype.frame} is in host memory"
        return self.place(prototype.slot)

    def host_frame(self) -> tuple[Tensor, ...]:
        """Room for a frame in host memory: keys, values and descriptors."""
        pinned = self._pools[0].device.type == "cuda"  # so that the copies need not wait for the host
        shapes = [(pool.shape[0], *pool.shape[2:]) for pool in self._pools]
        return tuple(torch.empty(shape, dtype=self.layout.dtype, pin_memory=pinned) for shape in shapes)

    def _unused_slot(self) -> int | None:
        return _first_free((p.slot for p in self.history.values()), self.layout.device_frames)

    def _move_off_device(self, prototype: Prototype, room: int) -> None:
        """Moves a prototype to host memory, which holds `room` frames; if it is full, the oldest of those off the
        device is forgotten."""
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
