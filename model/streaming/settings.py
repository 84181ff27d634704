"""The settings of a stream, and the size of the cache that follows from them."""

import numbers
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch

from memflow_ops.cache.chosen import frames_for_copies
from memflow_ops.cache.layout import CacheLayout, Positions, check_bank_dtype
from memflow_ops.cache.released_layout import BankSchedule, ReleasedLayout
from memflow_ops.geometry import BankDtype, Score
from memflow_ops.model.streaming.sampler import FlowMatchSampler
from memflow_ops.model.wan.transformer import CausalVideoModel
from memflow_ops.token_order import TokenOrderName

MemoryMode = Literal["none", "sink", "memflow", "full", "released"]
RelevanceKind = Literal["linear", "softmax", "coverage", "random"]
SelectionKind = Literal["top", "random"]
ReselectKind = Literal["step", "chunk"]

USED_BY: dict[str, tuple[MemoryMode, ...]] = {
    "bank_frames": ("memflow", "released"),
    "top_k": ("memflow",),
    "query_group": ("memflow",),
    "score": ("memflow",),
    "bank_dtype": ("memflow",),
    "reselect": ("memflow",),
    "token_order": ("memflow",),
    "positions": ("memflow",),
    "bank_schedule": ("released",),
}
"""The kinds of memory that use a setting, for settings that a command offers and not all kinds use."""


MOST = 2**31 - 1
"""No number of frames, tokens or steps is larger: the operators count in 32 bits."""


def _whole(name: str, value: object) -> int | None:
    """An integer, also one of numpy, as an int, so that it can be saved and written as JSON; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    number = int(value)
    if number > MOST:
        raise ValueError(f"{name} must be at most {MOST}, got {number}")
    return number


@dataclass(frozen=True)
class StreamSettings:
    """All that determines a stream beside the model, the prompts and the seed."""

    memory: MemoryMode = "memflow"
    """How a chunk sees the past beyond its local window."""
    height: int = field(kw_only=True)
    """Rows of a latent frame."""
    width: int = field(kw_only=True)
    """Columns of a latent frame."""
    chunk_frames: int = 3
    """Latent frames generated together."""
    window_frames: int = 6
    """The local window, always attended to in full, current chunk included; a multiple of chunk_frames."""
    sink_frames: int = 3
    """First frames of the video, which are kept forever; not with memory="none"."""
    bank_frames: int = 3
    """Frames that are retrieved for a chunk at most; memflow and released."""
    device_frames: int = 64
    """Prototypes that the device holds; memflow and full."""
    host_frames: int = 0
    """Further prototypes that wait in host memory. When there are more, the oldest is forgotten; memflow only."""
    disk_frames: int = 0
    """More prototypes, which are only on disk; for a stream with a history folder, and memflow only."""
    top_k: int = 24
    """Blocks of sink and bank that each query group attends to; memflow only."""
    block_size: int = 64
    """Tokens of a block."""
    query_group: int | None = 128
    """Consecutive queries that share a selection; None: the whole chunk, as in the paper."""
    relevance: RelevanceKind = "linear"
    """How retrieval ranks frames: by a score of `frame_relevance`, word by word ("coverage"; see `Coverage`), or at
    random, which is a control."""
    selection: SelectionKind = "top"
    """The blocks that activation takes: those with the best scores, or as many random ones, which is a control."""
    score: Score = "mean"
    """What activation ranks blocks by: their mean key, or the mean and the variance of their keys ("moments", and
    "normalised" for every 32 queries of a group), for which the cache keeps a second number beside every mean; memflow
    only."""
    bank_dtype: BankDtype | None = None
    """What sink and history are kept in: "int8", for about half the memory of a half precision, or the dtype of the
    model (None); memflow only."""
    reselect: ReselectKind = "step"
    """Which passes over a chunk choose blocks: all of them ("step"), or the clean one and the first noisy one, whose
    choice the other noisy ones attend to ("chunk"); memflow only."""
    token_order: TokenOrderName = "raster"
    """How the tokens of a frame lie: row by row, or in strips, so that a block is a compact part of the frame; see
    `strip_order`. Without a selection of blocks it changes results by rounding alone."""
    positions: Positions = "absolute"
    """Where sink and bank stand in time for the queries: at their own frames, or in slots that never move away, so that
    no distance exceeds a bound ("bounded"; see `Positions`); memflow only."""
    redundancy: float | None = None
    """Retrieval passes over frames whose mean key has a larger cosine than this with one already taken; None: it passes
    over none."""
    record_interval: int = 3
    """The bank moves on to its next place after so many chunks; released only."""
    bank_schedule: BankSchedule = "interactive"
    """When a frame enters the bank, and how the window is re-cached: as in the authors' program for several prompts,
    which their last stage of training follows too, or as in the one for a single prompt; released only."""
    top_frames: int | None = None
    """Frames of sink and bank that each head attends to, the same for the whole chunk (sparse memory activation; its
    authors use 3). None: all of them, the default of their checkpoints; released only."""
    recache: bool = True
    """Whether the local window is re-cached at a prompt switch."""
    steps: int = 4
    """Passes per chunk, without the clean pass."""
    shift: float = 5.0
    """The sampler's timestep shift. Above 1, more steps are spent at high noise."""
    stochastic: bool = False
    """Whether every step renews the noise (few-step distilled models) instead of following the velocity."""
    impl: str = "auto"
    """Implementation of the attention op: auto, reference, torch or triton."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            if setting.type in (int, int | None):
                object.__setattr__(self, setting.name, _whole(setting.name, getattr(self, setting.name)))
        choices = (
            ("memory", MemoryMode),
            ("relevance", RelevanceKind),
            ("selection", SelectionKind),
            ("reselect", ReselectKind),
            ("token_order", TokenOrderName),
            ("bank_schedule", BankSchedule),
            ("score", Score),
            ("positions", Positions),
        )
        for name, kinds in ((name, get_args(kind)) for name, kind in choices):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {', '.join(kinds)}, got {getattr(self, name)!r}")
        check_bank_dtype(self.bank_dtype)
        if self.bank_dtype and self.memory == "memflow" and self.selection == "random":
            raise ValueError(
                "selection='random' ranks random descriptors, and an int8 bank is read with its own: use "
                "bank_dtype=None"
            )
        for name in ("height", "width", "top_k", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.query_group is not None and self.query_group < 1:
            raise ValueError(f"query_group must be positive or None (the whole chunk), got {self.query_group}")
        if self.top_frames is not None and self.top_frames < 1:
            raise ValueError(f"top_frames must be positive or None (all), got {self.top_frames}")
        if self.redundancy is not None and not -1 <= self.redundancy <= 1:
            raise ValueError(f"redundancy is a cosine, -1 to 1, or None, got {self.redundancy}")
        FlowMatchSampler(self.steps, self.shift)  # checks steps and shift
        # The layouts check the sizes of the cache, here rather than when the stream starts.
        CacheLayout(1, 1, 1, 1, 1, **self._cache_sizes(), block_size=self.block_size)
        self._released_layout((1, 1, 1, 1, 1), torch.float32)

    def _released_layout(self, sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> ReleasedLayout:
        return ReleasedLayout(
            *sizes,
            chunk_frames=self.chunk_frames,
            window_frames=self.window_frames,
            sink_frames=self.sink_frames,
            bank_frames=self.bank_frames,
            dtype=dtype,
            record_interval=self.record_interval,
            schedule=self.bank_schedule,
        )

    def _cache_sizes(self) -> dict[str, Any]:
        """The frames of the cache by the names that a `CacheLayout` has for them; 0 for what this kind of memory does
        not use."""
        has_sink, has_bank, has_history = (
            self.memory in modes for modes in (("sink", "memflow", "full"), ("memflow",), ("memflow", "full"))
        )
        return {
            "chunk_frames": self.chunk_frames,
            "window_frames": self.window_frames,
            "sink_frames": self.sink_frames * has_sink,
            "bank_frames": self.bank_frames * has_bank,
            "device_frames": self.device_frames * has_history,
            "host_frames": self.host_frames * has_bank,
            "disk_frames": self.disk_frames * has_bank,
        }

    @property
    def longest_pass(self) -> int:
        """The most frames that one pass of the model is over: a chunk, or all that is re-cached at once."""
        at_once = self.memory == "released" and self.bank_schedule == "interactive" and self.recache
        return max(self.chunk_frames, self.sink_frames + self.window_frames if at_once else 0)

    def prototypes(self, chunks: int) -> int:
        """How many prototypes so many chunks leave behind; a frame of the sink is not stored twice."""
        return sum(chunk * self.chunk_frames >= self.sink_frames for chunk in range(chunks))

    def cache_layout(
        self, model: CausalVideoModel, batch: int, device: torch.device | None = None, ranks: int = 1
    ) -> CacheLayout:
        """The layout of the cache that a stream of `batch` stories allocates; it states the size in bytes.

        device: where the stream will run; None: where the model is. ranks: how many processes share the heads; the
        layout is that of one of them.
        """
        config, dtype = model.config, model.patch_embedding.weight.dtype
        device = device or model.patch_embedding.weight.device
        tokens = model.tokens(self.height, self.width)
        sizes = (config.num_layers, batch, tokens, config.num_heads // ranks, config.head_dim)
        if self.memory == "released":
            return self._released_layout(sizes, dtype)
        layout = CacheLayout(*sizes, **self._cache_sizes(), block_size=self.block_size, dtype=dtype)
        if self.memory != "memflow":
            return layout
        layout = replace(layout, score=self.score, positions=self.positions, bank_dtype=self.bank_dtype)
        # On a CPU one selection for the whole chunk is attended to as one run of keys with the window.
        if self.impl not in ("auto", "torch") or device.type != "cpu":
            return layout
        return replace(layout, copied_frames=frames_for_copies(layout, self.top_k, self.query_group))
