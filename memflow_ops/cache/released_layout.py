"""The sizes of a `ReleasedCache`."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from memflow_ops.cache.layout import CacheLayout, Positions
from memflow_ops.geometry import BankDtype, Score

BankSchedule = Literal["interactive", "single-prompt"]
"""When a frame enters the bank. The authors have one program for each, and tune with one after the other.

interactive: the first frame of every `record_interval`-th chunk, as in their programs for several prompts and in their
long tuning. Whenever the bank is full, it is weighed again before every chunk, and the frame that came last takes the
place of the least relevant one, so that it may be there twice. single-prompt: the first frame of every chunk, as in
their program for one prompt and in their first stage of training.
"""


@dataclass(frozen=True)
class ReleasedLayout(CacheLayout):
    """Every size of a `ReleasedCache`. A block is a frame, and sink, bank and window are all that is kept.

    Frames are ranked by their means, as its authors do it, for activation and in the bank.

    window_frames: the newest frames outside the sink, current chunk included; any number that holds a chunk.
    record_interval: how many chunks share a place of the bank before the next place is used.
    schedule: which chunks leave a frame to the bank, and how the window is re-cached; see `BankSchedule`.

    The other sizes are those of `CacheLayout`.
    """

    window_frames: int = 9
    device_frames: int = field(default=0, init=False)
    host_frames: int = field(default=0, init=False)
    disk_frames: int = field(default=0, init=False)
    block_size: int = field(default=1, init=False)
    relevance_block_size: int | None = field(default=None, init=False)
    score: Score = field(default="mean", init=False)
    positions: Positions = field(default="absolute", init=False)
    copied_frames: int = field(default=0, init=False)
    bank_dtype: BankDtype | None = field(default=None, init=False)
    record_interval: int = 3
    schedule: BankSchedule = "interactive"

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", self.frame_tokens)
        self._check_types()
        if self.schedule not in get_args(BankSchedule):
            raise ValueError(f"schedule must be one of {', '.join(get_args(BankSchedule))}, got {self.schedule!r}")
        if self.window_frames < self.chunk_frames:
            raise ValueError(
                f"window_frames must hold the chunk, chunk_frames={self.chunk_frames}, got {self.window_frames}"
            )

    @property
    def ring_start(self) -> int:
        return self.bank_frames + self.sink_frames

    @property
    def pool_frames(self) -> int:
        return self.ring_start + self.window_frames

    @property
    def recached_frames(self) -> int:
        if self.schedule == "single-prompt":
            return super().recached_frames
        return self.sink_frames + self.window_frames

    @property
    def means_bytes(self) -> int:
        return 0  # the rotated means are the descriptors
