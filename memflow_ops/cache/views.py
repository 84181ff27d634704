"""What a cache offers: the memory of a layer to attention, and its candidates to retrieval."""

from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """The bank of a layer as `memory_attention` takes it: views of the pools, and tensors that stay where they are."""

    keys: Tensor  # (B, P * T, Hkv, D), the whole pool
    values: Tensor  # (B, P * T, Hkv, D)
    descriptors: Tensor  # (B, P * blocks_per_frame, Hkv, D), or 2 D where blocks are ranked by their moments
    slots: Tensor  # (B, sink_frames + bank_frames) int32, the frame place of each bank frame
    frames: Tensor  # (B,) int32, how many bank frames are valid
    k_scale: Tensor | None = None  # (B, P * blocks_per_frame, Hkv, D), where keys and values are int8
    v_scale: Tensor | None = None  # (B, P * T, Hkv)


class Past(NamedTuple):
    """What a layer of an open chunk attends to beside the chunk itself: copies without a gradient."""

    keys: Tensor  # (B, window tokens without the chunk's, Hkv, D), rotated
    values: Tensor  # like keys
    memory: Memory | None  # None: the pass does not attend to the bank
    turn: Tensor | None = None  # moves rotated queries to where they stand for the bank, see `RingCache.bank_turn`


class Candidates(NamedTuple):
    """The frames that retrieval may choose from: the prototypes that have left the window."""

    frames: list[list[int]]  # per story F absolute frame indices, ascending
    stored: Tensor  # (layers, B, R, n, Hkv, D) means of keys before RoPE
    lengths: tuple[int, ...]  # (n,) how many tokens each mean is of
    rows: Tensor | None = None  # (B, F) int32, the index r of each frame's means in `stored`; None: 0 to F - 1

    @property
    def means(self) -> Tensor:
        """The means in the order of the frames, (layers, B, F, n, Hkv, D)."""
        if self.rows is None:
            return self.stored
        stories = torch.arange(len(self.rows), dtype=torch.int64, device=self.rows.device)
        return self.stored[:, stories[:, None], self.rows.long()]
