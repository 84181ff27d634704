"""The history of one story in a `FrameCache`: its prototypes, on the device, in host memory or only on disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.store import FrameStore


@dataclass(slots=True)
class Prototype:
    """Where the first frame of a chunk is kept for one story: in a history slot, in host memory, or only on disk."""

    frame: int  # absolute index
    row: int  # where its means are
    last_used: int  # number of the chunk that retrieved it last, or for which it became a candidate
    slot: int | None  # None: the frame is in host memory or only on disk
    host: tuple[Tensor, ...] = ()  # what it has in each pool (layers, ...), if it is in host memory

    @property
    def only_on_disk(self) -> bool:
        return self.slot is None and not self.host


class Story:
    """The bookkeeping of one story's history.

    Which slots and rows are free is not stored but read off the history, so that no interruption can make the two
    disagree.
    """

    def __init__(self, layout: CacheLayout, pools: Sequence[Tensor], store: FrameStore | None = None):
        """pools: all that a frame of the bank has, by frame place: keys, values, descriptors and, of int8, scales; each
        (layers, P, tokens or blocks, Hkv, ...). store: where every prototype is on disk too; None: it is not."""
        self.layout, self._pools, self.store = layout, pools, store
        self.history: dict[int, Prototype] = {}  # by frame index, ascending
        self.free_host: list[tuple[Tensor, ...]] = []  # room in host memory that prototypes have left
        self.retrieved: list[int] = []  # frames of the current bank, ascending
        self.evicted = False  # whether a prototype has ever had to leave the device
        self.expected: Sequence[int] = ()  # what the next chunk will probably retrieve; it leaves host memory last

    def free_row(self) -> int:
        """A row of the means that no prototype has."""
        row = _first_free((p.row for p in self.history.values()), self.layout.history_frames)
        assert row is not None, "there is room for every frame that may be remembered"
        return row

    def free_slot(self, first: int, keep: Sequence[int] = (), returning: Prototype | None = None) -> int:
        """A free history slot; where there is none, the least recently used prototype leaves the device first.

        Only frames before `first` and not in `keep` may leave it. returning: a prototype that will take the slot.
        """
        slot = self._unused_slot()
        if slot is None:
            movable = [p for p in self.history.values() if p.slot is not None and p.frame < first]
            victim = min((p for p in movable if p.frame not in keep), key=lambda p: (p.last_used, p.frame))
            self._move_off_device(victim, returning)
            slot = self._unused_slot()
        assert slot is not None, "there is room for every frame that may be remembered"
        return slot

    def retrieve(self, frames: Sequence[int], chunk: int, first: int) -> None:
        """Marks these frames, all before `first`, as used by a chunk, and brings those off the device back."""
        for frame in frames:
            self.history[frame].last_used = chunk
        if self.store is not None:
            self.expected = tuple(frames)
            self.store.begin([frame for frame in frames if self.history[frame].only_on_disk])
        for frame in frames:
            if self.history[frame].slot is None:
                self.bring_back(self.history[frame], first, keep=frames)

    def bring_back(self, prototype: Prototype, first: int, keep: Sequence[int]) -> None:
        """Copies a prototype from host memory or disk into a slot; frames in `keep` and from `first` on stay on the
        device.

        All copies are queued on one stream, so the room that it leaves may be reused at once.
        """
        slot = self.free_slot(first, keep, prototype)
        if prototype.host:
            self._fill(slot, prototype.host)
        else:
            self._read(prototype.frame, slot)
        prototype.slot = slot
        if prototype.host:
            self.free_host.append(prototype.host)
            prototype.host = ()

    def store_prototype(self, frame: int, slot: int, means: Tensor) -> None:
        """Appends a prototype that lies in a slot to the store, if there is one. means: its own, (layers, n, Hkv, D).

        Called again, after an interruption, it does nothing more.
        """
        if self.store is not None and frame not in self.store:
            self.store.append(frame, [means, *(pool[:, self.place(slot)] for pool in self._pools)])

    def expect(self, frames: Sequence[int]) -> None:
        """Prepares for a bank of these frames: those that are only on disk begin to be read."""
        self.expected = tuple(frames)
        if self.store is not None:
            self.store.stage([frame for frame in frames if self.history[frame].only_on_disk])

    def place(self, slot: int) -> int:
        """The frame place of a history slot."""
        return self.layout.history_start + slot

    def place_of(self, prototype: Prototype) -> int:
        """The frame place of a prototype that is on the device."""
        assert prototype.slot is not None, f"frame {prototype.frame} is not on the device"
        return self.place(prototype.slot)

    def host_frame(self) -> tuple[Tensor, ...]:
        """New room for a frame in host memory: what it has in each pool."""
        pinned = self._pools[0].device.type == "cuda"  # copies to pinned memory do not make the host wait
        return tuple(
            torch.empty(pool.shape[0], *pool.shape[2:], dtype=pool.dtype, device="cpu", pin_memory=pinned)
            for pool in self._pools
        )

    def saved_history(self) -> list[tuple[int, int, int, int | None]]:
        """Frame, row, last use and slot of every prototype."""
        return [(p.frame, p.row, p.last_used, p.slot) for p in self.history.values()]

    def saved_host(self, in_full: bool = False) -> list[tuple[Tensor, ...]]:
        """What every prototype has in host memory, copied, so that a frame that comes back changes no saved state;
        nothing where a store has it. in_full: what only the store has is read from it."""
        if self.store is not None and not in_full:
            return [() for _ in self.history]
        return [self._copied(p) if in_full and p.only_on_disk else _clones(p.host) for p in self.history.values()]

    def load(self, history: Iterable[tuple[int, int, int, int | None]], host: Iterable[tuple[Tensor, ...]]) -> None:
        """Fills a story without history with what `saved_history` and `saved_host` have returned.

        With a store, frames that were in host memory are left on disk until they are retrieved.
        """
        for (frame, row, last_used, slot), tensors in zip(history, host, strict=True):
            prototype = Prototype(frame, row, last_used, slot)
            if slot is None and tensors:
                prototype.host = self.host_frame()
                for target, source in zip(prototype.host, tensors, strict=True):
                    target.copy_(source)
            self.history[frame] = prototype

    def _unused_slot(self) -> int | None:
        return _first_free((p.slot for p in self.history.values()), self.layout.device_frames)

    def read_slots(self) -> None:
        """Fills the slots of all prototypes on the device from the store."""
        for prototype in self.history.values():
            if prototype.slot is not None:
                self._read(prototype.frame, prototype.slot)

    def _fill(self, slot: int, tensors: Sequence[Tensor]) -> None:
        """Copies a frame's tensors in host memory into a slot."""
        for pool, source in zip(self._pools, tensors, strict=True):
            pool[:, self.place(slot)].copy_(source, non_blocking=True)

    def _read(self, frame: int, slot: int) -> None:
        """Copies a frame from the store into a slot."""
        assert self.store is not None, f"frame {frame} is nowhere"
        buffer = self.store.take(frame)
        self._fill(slot, buffer.tensors[1:])  # its means come first, and have a row of their own
        buffer.note_copy()
        self.store.give_back(buffer)

    def _copied(self, prototype: Prototype) -> tuple[Tensor, ...]:
        """What a prototype that is only on disk has in each pool, in host memory."""
        assert self.store is not None, f"frame {prototype.frame} is nowhere"
        buffer = self.store.take(prototype.frame)
        copies = _clones(buffer.tensors[1:])
        self.store.give_back(buffer)
        return copies

    def _move_off_device(self, prototype: Prototype, returning: Prototype | None) -> None:
        """Moves a prototype to host memory, or leaves it on disk alone.

        Where there is no room off the device, the oldest of the frames there, this one included, is forgotten. Where
        there is none in host memory, the least recently used of the frames there, this one included, stays on disk.
        returning: one that leaves its room in return, so that one more may enter.
        """
        self.evicted = True
        off_device = [p for p in self.history.values() if p.slot is None]
        if len(off_device) >= self.layout.host_frames + self.layout.disk_frames + (returning is not None):
            oldest = min([*off_device, prototype], key=lambda p: p.frame)
            self._forget(oldest)
            if oldest is prototype:
                return
        if self.store is not None and not self._make_host_room(prototype, returning):
            if prototype.frame in self.expected:
                self.store.hold(prototype.frame, [pool[:, self.place_of(prototype)] for pool in self._pools])
            prototype.slot = None
            return
        host = self.free_host.pop() if self.free_host else self.host_frame()
        for pool, target in zip(self._pools, host, strict=True):
            target.copy_(pool[:, self.place_of(prototype)], non_blocking=True)
        prototype.host = host
        prototype.slot = None

    def _make_host_room(self, prototype: Prototype, returning: Prototype | None) -> bool:
        """Whether a prototype that leaves the device enters host memory; one there may have to stay on disk alone."""
        in_host = [p for p in self.history.values() if p.host]
        if len(in_host) < self.layout.host_frames + bool(returning is not None and returning.host):
            return True
        # What is expected may decide here, because it changes nothing but the time that the next bank takes. Which
        # frames leave the device decides what is forgotten in the end, and so is the same with a disk and without.
        coldest = min([*in_host, prototype], key=lambda p: (p.frame in self.expected, p.last_used, p.frame))
        if coldest is prototype:
            return False
        self.free_host.append(coldest.host)
        coldest.host = ()
        return True

    def _forget(self, prototype: Prototype) -> None:
        del self.history[prototype.frame]
        if prototype.host:
            self.free_host.append(prototype.host)
        if self.store is not None:
            self.store.forget(prototype.frame)


def _clones(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in tensors)


def _first_free(used: Iterable[int | None], count: int) -> int | None:
    """The lowest of `count` numbers that is not used."""
    taken = set(used)
    return next((number for number in range(count) if number not in taken), None)
