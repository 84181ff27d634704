"""The sizes of a `ReleasedCache`."""

from dataclasses import dataclass, field

from memflow_ops.cache.layout import CacheLayout


@dataclass(frozen=True)
class ReleasedLayout(CacheLayout):
    """Every size of a `ReleasedCache`. A block is a frame, and sink, bank and window are all that is kept.

    window_frames: the newest frames outside the sink, current chunk included; any number that holds a chunk.
    record_interval: how many chunks share a place of the bank before the next place is used.

    The other sizes are those of `CacheLayout`.
    """

    window_frames: int = 9
    device_frames: int = field(default=0, init=False)
    host_frames: int = field(default=0, init=False)
    block_size: int = field(default=1, init=False)
    relevance_block_size: int | None = field(default=None, init=False)
    record_interval: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", self.frame_tokens)
        self._check_types()
        if self.window_frames < self.chunk_frames:
            raise ValueError(
                f"window_frames must hold the chunk, chunk_frames={self.chunk_frames}, got {self.window_frames}"
            )

    @property
    def pool_frames(self) -> int:
        return self.bank_frames + self.sink_frames + self.window_frames

    @property
    def means_bytes(self) -> int:
        return 0  # the rotated means are the descriptors
