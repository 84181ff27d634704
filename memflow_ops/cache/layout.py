"""The sizes of a frame cache, and what they cost in bytes."""

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from memflow_ops.geometry import BankDtype, Score, descriptor_width
from memflow_ops.host_memory import free_host_bytes
from memflow_ops.ops.checks import check_score

Positions = Literal["absolute", "bounded"]
"""Where the bank stands in time for the queries that attend to it.

absolute: every frame at its own index, however far back that is. bounded: in slots that do not move away. A retrieved
frame has no temporal rotation, so that it stands at 0; the sink's frames stand at their own indices 0 to S - 1; and the
queries are rotated for the bank as if their local window began at slot max(S, 1), or at its own first frame while that
comes before. No distance in time exceeds max(S, 1) + window_frames - 1 frames, and a frame far into the video sees the
bank as an early one does. Attention within the window stays absolute, since only differences count there.
"""


@dataclass(frozen=True)
class CacheLayout:
    """Every size of a `FrameCache`. Sizes are checked, and their cost is known before anything is allocated.

    layers, batch, frame_tokens, kv_heads, head_dim: the sizes of the model, of the batch of stories, and of a frame.
    chunk_frames: how many frames are generated together.
    window_frames: the local window, current chunk included; a multiple of chunk_frames.
    sink_frames: how many first frames of the video are kept for good.
    bank_frames: how many frames of the history may be retrieved for a chunk and story, at most.
    device_frames: how many prototypes of a story the device has slots for; 0 keeps no history.
    host_frames: how many further prototypes of a story may wait in host memory.
    disk_frames: how many more may be on disk alone; only for a cache that has a history folder.
    block_size: tokens of a block, the unit of selection.
    relevance_block_size: tokens that share one mean for retrieval; None: the frame has one mean.
    dtype: of keys, values, descriptors and means.
    score: what blocks are ranked by, see `select_blocks`; but for "mean" descriptors are twice as wide.
    positions: where the bank stands in time, see `Positions`; "bounded" takes rotations of `rope_rotation`.
    copied_frames: frame places right before the local window, for copies of the blocks that a chunk attends to; see
        `ChosenBlocks`. They are no part of a saved state.
    bank_dtype: "int8" keeps sink and history, in frame places of their own, in about half the memory of a half
        precision; see `quantise_memory`. The local window stays in `dtype`, and what is chosen stays the same, but
        there is no attention to the past in full and no gradient through a pass. None: all is of `dtype`.

    A TypeError or ValueError says which size is impossible.
    """

    layers: int
    batch: int
    frame_tokens: int
    kv_heads: int
    head_dim: int
    chunk_frames: int = 3
    window_frames: int = 6
    sink_frames: int = 3
    bank_frames: int = 3
    device_frames: int = 64
    host_frames: int = 0
    block_size: int = 64
    relevance_block_size: int | None = None
    dtype: torch.dtype = torch.float32
    score: Score = "mean"
    positions: Positions = "absolute"
    copied_frames: int = 0
    disk_frames: int = 0
    bank_dtype: BankDtype | None = None

    def __post_init__(self) -> None:
        self._check_types()
        if self.window_frames % self.chunk_frames:
            raise ValueError(
                f"window_frames must be a multiple of chunk_frames={self.chunk_frames}, got {self.window_frames}"
            )
        needed = max(1, self.bank_frames) + self.window_chunks - 1
        if self.device_frames and self.device_frames < needed:
            raise ValueError(
                f"device_frames must hold the bank and the window's prototypes, max(1, bank_frames) + window_frames / "
                f"chunk_frames - 1 = {needed} frames (or be 0, for no history), got {self.device_frames}"
            )
        for name in ("host_frames", "disk_frames"):
            if getattr(self, name) and not self.device_frames:
                raise ValueError(f"{name}={getattr(self, name)} needs device_frames > 0 to bring frames back to, got 0")

    def _check_types(self) -> None:
        may_be_zero = ("sink_frames", "bank_frames", "device_frames", "host_frames", "disk_frames", "copied_frames")
        for name, value in list(vars(self).items()):
            if name in ("dtype", "schedule", "score", "positions", "bank_dtype") or (
                name == "relevance_block_size" and value is None
            ):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
                raise TypeError(f"{name} must be an int, got {value!r}")
            object.__setattr__(self, name, int(value))  # an integer of numpy would overflow in products
            if value < (0 if name in may_be_zero else 1):
                raise ValueError(f"{name} must be {'at least 0' if name in may_be_zero else 'positive'}, got {value}")
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {self.dtype!r}")
        check_score(self.score)
        if self.positions not in get_args(Positions):
            raise ValueError(f"positions must be one of {', '.join(get_args(Positions))}, got {self.positions!r}")
        if self.positions == "bounded" and self.head_dim % 2:
            raise ValueError(f"positions='bounded' needs a head_dim of pairs, an even number, got {self.head_dim}")
        check_bank_dtype(self.bank_dtype)

    def check_room(self, device: torch.device) -> None:
        """A ValueError unless the device can give what the cache allocates on it; on CUDA, unless it is that large."""
        if device.type not in ("cpu", "cuda"):
            return
        room = free_host_bytes() if device.type == "cpu" else torch.cuda.mem_get_info(device)[1]
        if self.device_bytes > room:
            frames = self.pool_frames + self.int8_frames
            raise ValueError(
                f"a cache of {frames} frames takes {self.device_bytes / 2**30:,.1f} GiB on {device}, where "
                f"{room / 2**30:,.1f} GiB can be had: lower window_frames={self.window_frames}, "
                f"sink_frames={self.sink_frames}, bank_frames={self.bank_frames}"
                + f" or device_frames={self.device_frames}"
                * bool(self.device_frames)
            )

    def check_chunk_tensor(
        self, name: str, layer: int, tensor: Tensor, device: torch.device, frames: int | None = None
    ) -> None:
        """A ValueError or TypeError unless `tensor` is one layer's keys or values of a chunk.

        frames: how many frames the pass has; None: those of a chunk.
        """
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer must be 0 to {self.layers - 1}, got {layer}")
        tokens = self.chunk_tokens if frames is None else frames * self.frame_tokens
        shape = (self.batch, tokens, self.kv_heads, self.head_dim)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be (batch, chunk tokens, kv_heads, head_dim) {shape}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != self.dtype:
            raise TypeError(f"{name} must be {self.dtype}, got {tensor.dtype}")
        if tensor.device.type != device.type:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")

    @property
    def window_chunks(self) -> int:
        return self.window_frames // self.chunk_frames

    @property
    def recached_frames(self) -> int:
        """The newest frames whose latents a prompt switch may need, for they are passed again under the new prompt."""
        return self.window_frames - self.chunk_frames

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_frames * self.frame_tokens

    @property
    def ring_start(self) -> int:
        """The frame place at which the ring of the local window begins."""
        return self.copied_frames + (0 if self.bank_dtype else self.sink_frames)

    @property
    def history_start(self) -> int:
        """The frame place of the first history slot, among those of int8 where the bank is."""
        return self.sink_frames if self.bank_dtype else self.ring_start + self.window_frames

    @property
    def pool_frames(self) -> int:
        """P, the frame places of the pool; with an int8 bank only those of the local window and of copies."""
        return self.ring_start + self.window_frames if self.bank_dtype else self.history_start + self.device_frames

    @property
    def int8_frames(self) -> int:
        """The frame places of an int8 bank: sink and history slots. 0 where the bank is of `dtype`."""
        return self.sink_frames + self.device_frames if self.bank_dtype else 0

    @property
    def history_frames(self) -> int:
        """The prototypes of a story that are remembered at most: on the device, in host memory and on disk alone."""
        return self.device_frames + self.host_frames + self.disk_frames

    @property
    def blocks_per_frame(self) -> int:
        return -(-self.frame_tokens // self.block_size)

    @property
    def relevance_lengths(self) -> tuple[int, ...]:
        """How many tokens each of a frame's means stands for; they add up to frame_tokens."""
        size = self.relevance_block_size or self.frame_tokens
        return tuple(min(size, self.frame_tokens - start) for start in range(0, self.frame_tokens, size))

    @property
    def moments(self) -> int:
        """Of a block's keys in a descriptor, see `describe_blocks`."""
        return self.descriptor_width // self.head_dim

    @property
    def descriptor_width(self) -> int:
        """Numbers of a descriptor per head."""
        return descriptor_width(self.head_dim, self.score)

    def _vector_bytes(self, vectors: int) -> int:
        return self.layers * self.batch * vectors * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def frame_bytes(self) -> int:
        """Bytes of one frame place: keys, values and descriptors of all layers and stories."""
        return self._vector_bytes(2 * self.frame_tokens + self.moments * self.blocks_per_frame)

    @property
    def bank_frame_bytes(self) -> int:
        """Bytes of one frame of sink or history: as `frame_bytes`, or those of an int8 bank, scales included."""
        if self.bank_dtype is None:
            return self.frame_bytes
        vectors = self.layers * self.batch * self.kv_heads * self.frame_tokens
        integers, scales = 2 * vectors * self.head_dim, vectors * self.dtype.itemsize
        return integers + scales + self._vector_bytes((self.moments + 1) * self.blocks_per_frame)

    @property
    def pool_bytes(self) -> int:
        """Bytes of all frame places."""
        return self.pool_frames * self.frame_bytes + self.int8_frames * self.bank_frame_bytes

    @property
    def means_bytes(self) -> int:
        """Bytes of the means that retrieval compares with the prompt."""
        return self.history_frames * self._vector_bytes(len(self.relevance_lengths))

    @property
    def keeps_raw_keys(self) -> bool:
        """Whether the keys of a prototype differ from those in the ring, so that its clean pass sets them aside."""
        return self.positions == "bounded" and self.device_frames > 0

    @property
    def staged_bytes(self) -> int:
        """Bytes of the keys of the open chunk's prototype, where they are set aside."""
        return self._vector_bytes(self.frame_tokens) * self.keeps_raw_keys

    @property
    def virtual_window(self) -> int:
        """The slot at which the local window begins for the bank where positions are bounded, see `Positions`."""
        return max(self.sink_frames, 1)

    @property
    def device_bytes(self) -> int:
        """Bytes that the cache allocates on the device, all of them when it is made: pool, means and staged keys."""
        return self.pool_bytes + self.means_bytes + self.staged_bytes

    def allocate_tokens(self, device: torch.device) -> Tensor:
        """Room for keys or values, (layers, B, pool_frames * frame_tokens, Hkv, D).

        The tokens of a head lie behind one another, because attention reads them head by head; token by token, those of
        a model with many heads would lie a page apart.
        """
        return self._by_head(self.pool_frames, self.dtype, device, self.head_dim)

    def _by_head(self, frames: int, dtype: torch.dtype, device: torch.device, *size: int) -> Tensor:
        shape = (self.layers, self.batch, self.kv_heads, frames * self.frame_tokens, *size)
        return torch.empty(shape, dtype=dtype, device=device).transpose(2, 3)

    def allocate_int8(self, device: torch.device) -> list[Tensor]:
        """Room for the frames of an int8 bank, by frame place: keys, values, descriptors, scales of keys and of values,
        (layers, B, int8_frames, tokens or blocks, Hkv, ...)."""
        frames, blocks = self.int8_frames, self.int8_frames * self.blocks_per_frame
        keys, values = (self._by_head(frames, torch.int8, device, self.head_dim) for _ in range(2))
        descriptors, k_scale = (
            torch.empty(self.layers, self.batch, blocks, self.kv_heads, size, dtype=self.dtype, device=device)
            for size in (self.descriptor_width, self.head_dim)
        )
        v_scale = self._by_head(frames, self.dtype, device)
        by_place = lambda x, size: x.unflatten(2, (frames, size))  # noqa: E731
        of_tokens, of_blocks = self.frame_tokens, self.blocks_per_frame
        return [
            *(by_place(x, of_tokens) for x in (keys, values)),
            *(by_place(x, of_blocks) for x in (descriptors, k_scale)),
            by_place(v_scale, of_tokens),
        ]

    @property
    def host_bytes(self) -> int:
        """The most bytes that host memory will hold: allocated frame by frame, with a spare frame to swap through."""
        return (self.host_frames + 1) * self.bank_frame_bytes if self.host_frames else 0


def check_bank_dtype(bank_dtype: object) -> None:
    if bank_dtype not in (None, *get_args(BankDtype)):
        raise ValueError(f"bank_dtype must be {' or '.join(get_args(BankDtype))}, or None, got {bank_dtype!r}")


def on_device(numbers: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copies a list of numbers into a new tensor on `device`, without waiting for work that is queued there."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=True).to(device, non_blocking=True)
