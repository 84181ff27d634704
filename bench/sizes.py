"""The sizes that things are measured at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True)
class Size:
    """A layer with memory and the model around it. The defaults are Wan 2.1 1.3B at 480 x 832, a chunk of 3 frames."""

    name: str = "wan-1.3b"
    height: int = 60
    """Rows of a latent frame."""
    width: int = 104
    dim: int = 1536
    heads: int = 12
    ffn_dim: int = 8960
    layers: int = 30
    text_dim: int = 4096
    chunk_frames: int = 3
    window_frames: int = 9
    sink_frames: int = 3
    bank_frames: int = 16
    """Frames of the bank for ops and layers; a stream's case names its own."""
    block_size: int = 64
    top_k: int = 24
    query_group: int = 128
    steps: int = 4

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame: patches are 2 x 2."""
        return self.height * self.width // 4

    @property
    def queries(self) -> int:
        return self.chunk_frames * self.frame_tokens

    @property
    def window_keys(self) -> int:
        return self.window_frames * self.frame_tokens

    @property
    def blocks_per_frame(self) -> int:
        return -(-self.frame_tokens // self.block_size)

    @property
    def groups(self) -> int:
        return -(-self.queries // self.query_group)

    def attention_flops(self, keys: int) -> int:
        """Floating-point operations of two products of every query with `keys` keys."""
        return 4 * self.queries * keys * self.dim

    def attention_bytes(self, keys: int, itemsize: int) -> int:
        """Bytes of the queries, of `keys` keys and values, and of the output."""
        return 2 * (self.queries + keys) * self.dim * itemsize

    def settings(self) -> dict[str, object]:
        """The size as a row of results states it."""
        return {name: value for name, value in asdict(self).items() if name != "name"}


WAN = Size()

WAN_FRAME = replace(WAN, name="wan-1.3b-frame", chunk_frames=1)
"""One frame at a time, a third of a chunk: for CPUs."""

QUARTER = Size("wan-quarter", height=30, width=52, dim=384, heads=3, ffn_dim=2240, layers=4, text_dim=256, top_k=6)
"""For CPUs: a quarter of Wan in width and in tokens per frame (240 x 416), with 4 of its 30 layers.

All parts of a pass shrink alike, so that attention keeps its share of the time. The budget stays at one frame's worth:
6 blocks of 64, where Wan has 24."""

TINY = Size(
    "tiny",
    height=8,
    width=12,
    dim=64,
    heads=2,
    ffn_dim=128,
    layers=2,
    text_dim=32,
    window_frames=6,
    bank_frames=4,
    block_size=8,
    top_k=4,
    query_group=16,
    steps=2,
)
"""Takes seconds on a CPU, to see that everything runs. Its times say nothing about real sizes."""

WAN_KERNELS = replace(WAN, bank_frames=64)
"""For our kernels alone: a whole chunk over a large bank."""

TINY_KERNELS = Size(
    "tiny-kernels",
    height=8,
    width=18,
    dim=32,
    heads=2,
    ffn_dim=64,
    layers=2,
    text_dim=32,
    chunk_frames=2,
    window_frames=4,
    sink_frames=2,
    bank_frames=3,
    block_size=32,
    top_k=3,
    query_group=64,
)
"""For our kernels alone, in Triton's interpreter. Frames of 36 tokens end in a ragged block, and 72 queries in a ragged
group, which is long enough for its queries to share a tile."""

LONG_BANKS = (4, 16, 64, 256, 1000)
"""Frames of the bank in the cases of long histories."""
