"""The bank of a `FrameCache`: what retrieval chooses from, and its choice as the kernels read it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memflow_ops.cache.history import Story
from memflow_ops.cache.layout import CacheLayout, on_device


class Bank:
    """The slot table: in each story the visible sink, then the retrieved frames, all of them on the device."""

    def __init__(self, layout: CacheLayout, stories: Sequence[Story], device: torch.device):
        """stories: looked at in their place, so that there are others when their list is filled anew."""
        self.layout, self.device, self._stories = layout, device, stories
        # Read by kernels, so they stay where they are and are overwritten; entries past the valid frames are place 0.
        places = (layout.batch, layout.sink_frames + layout.bank_frames)
        self.slots = torch.zeros(places, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(layout.batch, dtype=torch.int32, device=device)
        self.retrieved = [0] * layout.batch  # how many frames, which the host knows in any case
        # Choices that the device alone knows: number of the chunk, indices into the history, which is read before any
        # frame of it is forgotten. The frames themselves are not kept: there may be very many chunks.
        self._unread: list[tuple[int, Tensor]] = []
        self._last_unread = False  # the last of them is the bank

    def check(self, chosen: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> None:
        """A ValueError unless `write` can take this choice of candidates."""
        if len(chosen) != self.layout.batch:
            raise ValueError(f"set_bank takes one list of frames per story, {self.layout.batch}, got {len(chosen)}")
        for number, (frames, possible) in enumerate(zip(chosen, candidates, strict=True)):
            if len(frames) > self.layout.bank_frames or len(set(frames)) < len(frames):
                raise ValueError(
                    f"story {number}: the bank takes up to {self.layout.bank_frames} different frames, "
                    f"got {list(frames)}"
                )
            if not set(possible).issuperset(frames):
                raise ValueError(
                    f"story {number}: frames {sorted(set(frames) - set(possible))} are not among the {len(possible)} "
                    f"candidates, the prototypes that have left the window and are still remembered"
                )

    def write(self, sink: int, chosen: list[list[int]]) -> None:
        """Fills the slot table. sink: frames of it that are visible. chosen: per story, ascending."""
        self._last_unread = False
        self.retrieved = [len(frames) for frames in chosen]
        visible = [self.layout.sink_frames - 1 - frame for frame in range(sink)]
        rows, width = [], self.slots.shape[1]
        for story, frames in zip(self._stories, chosen, strict=True):
            story.bank = frames
            row = visible + [story.place_of(story.history[frame]) for frame in frames]
            rows.append(row + [0] * (width - len(row)))
        self.slots.copy_(on_device(rows, torch.int32, self.device))
        lengths = [sink + len(frames) for frames in chosen]
        self.lengths.copy_(on_device(lengths, torch.int32, self.device))

    def clear(self, sink: int) -> None:
        """Nothing is retrieved."""
        self.write(sink, [[] for _ in self._stories])

    def write_on_device(self, sink: int, chunk: int, candidates: list[list[int]], indices: Tensor) -> None:
        """As `write`, with a choice that only the device knows: indices (B, K) int32 into the candidates, all of which
        are on the device. chunk: the coming one. Waits for nothing; a ValueError for indices of another form."""
        most = min(self.layout.bank_frames, len(candidates[0]))
        if indices.dtype != torch.int32 or indices.dim() != 2 or indices.shape[0] != self.layout.batch:
            raise ValueError(f"indices must be (batch, K) int32, got {tuple(indices.shape)} {indices.dtype}")
        if indices.shape[1] > most or indices.device.type != self.device.type:
            raise ValueError(
                f"indices must be of up to {most} frames, on {self.device}; got {indices.shape[1]} on {indices.device}"
            )
        self.clear(sink)
        places = [
            [story.place_of(story.history[frame]) for frame in of]
            for story, of in zip(self._stories, candidates, strict=True)
        ]
        count = indices.shape[1]
        if not count:
            return
        table = on_device(places, torch.int32, self.device)
        order = indices.clamp(0, table.shape[1] - 1).sort(1).values  # bank order is that of the frames
        self._unread.append((chunk, order))
        self.slots[:, sink : sink + count] = table.gather(1, order.long())
        self.lengths.fill_(sink + count)
        self.retrieved = [count] * self.layout.batch
        self._last_unread = True

    def read(self) -> None:
        """Books the choices that the device alone knew, in one read."""
        if not self._unread:
            return
        read = torch.cat([order for _, order in self._unread], 1).tolist()
        frames = [list(story.history) for story in self._stories]
        start = 0
        for chunk, order in self._unread:
            for story, of, row in zip(self._stories, frames, read, strict=True):
                chosen = [of[i] for i in row[start : start + order.shape[1]]]
                for frame in chosen:
                    story.history[frame].last_used = max(story.history[frame].last_used, chunk)
                if self._last_unread:
                    story.bank = chosen  # the last one stays
            start += order.shape[1]
        self._unread, self._last_unread = [], False

    def forget_unread(self) -> None:
        """Where the stories are others now."""
        self._unread = []
