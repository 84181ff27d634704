"""What a cache shows of itself: one layer's memory, and the candidates of retrieval."""

from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """One layer's memory, as `memory_attention` takes it. Everything is a view or a persistent tensor."""

    keys: Tensor  # (B, P * T, Hkv, D), the whole pool
    values: Tensor  # (B, P * T, Hkv, D)
    descriptors: Tensor  # (B, P * blocks_per_frame, Hkv, D)
    slots: Tensor  # (B, sink_frames + bank_frames) int32: the frame place of each bank frame
    frames: Tensor  # (B,) int32: valid bank frames


class Candidates(NamedTuple):
    """What retrieval may choose from: the prototypes that have left the window."""

    frames: list[list[int]]  # per story F absolute frame indices, ascending
    stored: Tensor  # (layers, B, R, n, Hkv, D) means of keys before RoPE
    lengths: tuple[int, ...]  # (n,) tokens behind each mean
    rows: Tensor | None = None  # (B, F) int32, where in `stored` the means of each frame are; None: in its place

    @property
    def means(self) -> Tensor:
        """(layers, B, F, n, Hkv, D), as the frames are listed."""
        if self.rows is None:
            return self.stored
        return self.stored[:, torch.arange(len(self.rows), device=self.rows.device)[:, None], self.rows.long()]
