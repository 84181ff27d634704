"""What every attention over selected blocks must know beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """How the queries and the bank are divided, where the bank's frames lie, and how scores are scaled.

    Checked by the public functions in memflow_ops/ops/ before it is made; implementations take it as it is.
    """

    block_size: int
    """Tokens per block; the last block of a frame may be shorter."""
    frame_tokens: int
    """Tokens per frame of the bank."""
    query_group: int
    """Consecutive queries that share a selection; the last group may be short."""
    softmax_scale: float
    """Factor of the scores."""
    memory_slots: Tensor | None = None
    """The slot table, (B, F) int32: which physical frame is frame j of the bank; None: frame j itself."""
    memory_frames: Tensor | None = None
    """(B,) int32, how many leading frames of the bank are valid; None: all."""

    @property
    def blocks_per_frame(self) -> int:
        return -(-self.frame_tokens // self.block_size)

    def bank_frames(self, memory_k: Tensor) -> int:
        """Frames of the bank in bank order, the slot table's where there is one. memory_k: (B, Lm, Hkv, D)."""
        if self.memory_slots is not None:
            return self.memory_slots.shape[1]
        return memory_k.shape[1] // self.frame_tokens

    def groups(self, queries: int) -> int:
        """Query groups of so many queries."""
        return -(-queries // self.query_group)
