"""The slot table of a bank: which frame places of the pool the kernels take for its frames."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memflow_ops.cache.history import Story
from memflow_ops.cache.layout import CacheLayout, on_device


class SlotTable:
    """Per story the frame place of every bank frame, in tensors that kernels read."""

    def __init__(self, layout: CacheLayout, device: torch.device):
        self.layout, self.device = layout, device
        # Kernels and recorded passes read these, so they stay where they are and are overwritten.
        self.slots = torch.zeros(
            (layout.batch, layout.sink_frames + layout.bank_frames), dtype=torch.int32, device=device
        )
        """(B, sink_frames + bank_frames) int32; entries past a story's length are place 0."""
        self.lengths = torch.zeros(layout.batch, dtype=torch.int32, device=device)
        """(B,) int32: the bank frames of each story."""

    def write(self, places: Sequence[Sequence[int]]) -> None:
        """Takes each story's frame places. The copy is queued and waits for nothing."""
        width = self.slots.shape[1]
        rows = [[*row, *[0] * (width - len(row))] for row in places]
        self.slots.copy_(on_device(rows, torch.int32, self.device))
        self.lengths.copy_(on_device([len(row) for row in places], torch.int32, self.device))


class HistorySlotTable(SlotTable):
    """The slot table of a `FrameCache`: in each story the visible sink, then the retrieved frames of its history.

    The retrieved frames are named by the host (`retrieve`) or by indices that only the device knows
    (`retrieve_on_device`) and that the host reads when it must know them (`read`).
    """

    def __init__(self, layout: CacheLayout, device: torch.device, stories: Sequence[Story]):
        """stories: kept as it is, so that the table follows when the list is filled with other stories."""
        super().__init__(layout, device)
        self._stories = stories
        self.retrieved = [0] * layout.batch
        """How many frames each story has retrieved; the host knows this in any case."""
        # Choices that only the device knows: chunk number, and indices into the history. They are read before any
        # frame is forgotten. The frames themselves are not kept, because there may be very many chunks.
        self._unread: list[tuple[int, Tensor]] = []
        self._last_unread = False  # whether the last of them is the current bank

    def check(self, chosen: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]]) -> None:
        """A ValueError unless `retrieve` can take this choice of candidates."""
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

    def retrieve(self, sink: int, chosen: list[list[int]]) -> None:
        """Fills the table with the first `sink` frames of the sink and the chosen frames, per story and ascending."""
        self._last_unread = False
        self.retrieved = [len(frames) for frames in chosen]
        visible = [self.layout.sink_frames - 1 - frame for frame in range(sink)]
        places = []
        for story, frames in zip(self._stories, chosen, strict=True):
            story.retrieved = frames
            places.append(visible + [story.place_of(story.history[frame]) for frame in frames])
        self.write(places)

    def clear(self, sink: int) -> None:
        """Leaves only the first `sink` frames of the sink."""
        self.retrieve(sink, [[] for _ in self._stories])

    def retrieve_on_device(self, sink: int, chunk: int, candidates: list[list[int]], indices: Tensor) -> None:
        """As `retrieve`, with a choice that only the device knows. Waits for nothing.

        chunk: number of the coming chunk. candidates: per story the frames to choose from, all of them on the device.
        indices: (B, K) int32 into the candidates; a ValueError where they have another form.
        """
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
        """Notes in the stories what only the device knew: which frames were retrieved when. Waits for the device."""
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
                    story.retrieved = chosen  # those of the last choice stay
            start += order.shape[1]
        self._unread, self._last_unread = [], False

    def forget_unread(self) -> None:
        """Drops the choices that have not been read, when the stories are about to be replaced."""
        self._unread = []
