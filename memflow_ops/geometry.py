"""What always travels together below the operators: how memory is divided, and where frames are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from torch import Tensor

Score = Literal["mean", "moments", "normalised"]
"""What the blocks of a bank are ranked by: their mean key; the mean and the variance of their keys; or the latter, with
each part of a group's queries normalised by itself."""

SCORES: tuple[Score, ...] = get_args(Score)

PART_QUERIES = 32
"""Consecutive queries of a group that the score "normalised" takes for one; the last part of a group may be shorter."""

BankDtype = Literal["int8"]
"""What a bank may be stored in other than the dtype of the queries."""


def descriptor_width(head_dim: int, score: Score) -> int:
    """The numbers of a descriptor: the means of a block's keys, other scores than "mean" need their variances too."""
    return head_dim if score == "mean" else 2 * head_dim


class Int8Bank(NamedTuple):
    """What makes numbers of the int8 keys and values of a bank.

    key = mean of its block + k_scale * stored key, channel by channel; value = v_scale * stored value.
    """

    descriptors: Tensor
    """(B, N, Hkv, D or 2 D), the descriptors of the stored frames' blocks, which begin with the means."""
    k_scale: Tensor
    """(B, N, Hkv, D): of every channel of the keys of a block."""
    v_scale: Tensor
    """(B, Lm, Hkv): of every value."""

    @classmethod
    def of(cls, descriptors: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None) -> Int8Bank | None:
        """The three together; None where there are no scales, because the bank is not int8."""
        if descriptors is None or k_scale is None or v_scale is None:
            return None
        return cls(descriptors, k_scale, v_scale)


@dataclass(frozen=True, eq=False)
class Geometry:
    """How queries and bank are divided, where the frames of the bank lie, what queries see, and how scores are scaled.

    Of a window with n valid keys query i of Lq sees the first n keys, or with `causal` the first i + 1 + n - Lq: the
    last query sees all of the valid ones, each one before it one less.

    The public functions in memflow_ops/ops/ check the arguments that it is made from; implementations trust it.
    """

    block_size: int
    """Tokens per block, at most `frame_tokens`. The last block of a frame may be shorter."""
    frame_tokens: int
    """Tokens per frame of the bank."""
    query_group: int
    """Consecutive queries that share a selection. The last group may be shorter."""
    softmax_scale: float
    """The factor of the scores."""
    memory_slots: Tensor | None = None
    """The slot table (B, F) int32: frame j of the bank is stored frame `memory_slots[b, j]`, clamped to those that
    there are. None: the stored frames are the bank, in order."""
    memory_frames: Tensor | None = None
    """(B,) or (B, G) int32: how many of the leading frames of the bank are valid, for all query groups or for each,
    clamped to 0..F. None: all are."""
    causal: bool = False
    """Whether a query sees only some of the valid keys of the window, as stated above."""
    seqused_k: Tensor | None = None
    """(B,) int32: how many of the leading keys of the window are valid, clamped to 0..Lk. None: all are."""
    window_slots: Tensor | None = None
    """(B, W) int32: k and v hold stored frames too, and frame j of the window is stored frame `window_slots[b, j]`,
    clamped to those that there are. Lk is W * frame_tokens then. None: k and v are the window."""
    score: Score = "mean"
    """What blocks are ranked by."""
    int8: Int8Bank | None = None
    """How the keys and values of an int8 bank are read. None: they are of the dtype of the queries."""

    @property
    def last_block_score(self) -> float:
        """What a frame's last block has less than a whole one in the scores that estimate a mass: log of its share."""
        last = self.frame_tokens - (self.blocks_per_frame - 1) * self.block_size
        return 0.0 if self.score == "mean" else math.log(last / self.block_size)

    @property
    def sees_all(self) -> bool:
        """Whether every query sees every key of the window, whatever device tensors hold."""
        return not self.causal and self.seqused_k is None

    @property
    def blocks_per_frame(self) -> int:
        return -(-self.frame_tokens // self.block_size)

    def window_keys(self, k: Tensor) -> int:
        """Lk, the number of keys of the window whose keys k holds."""
        return k.shape[1] if self.window_slots is None else self.window_slots.shape[1] * self.frame_tokens

    def stored_frames(self, memory: Tensor) -> int:
        """The number of frames that memory (B, Lm, Hkv, D) holds."""
        return memory.shape[1] // self.frame_tokens

    def bank_frames(self, stored_frames: int) -> int:
        """The number of frames of the bank: the width of the slot table, or without one all stored frames."""
        return stored_frames if self.memory_slots is None else self.memory_slots.shape[1]

    def bank_blocks(self, stored_frames: int) -> int:
        """The number of blocks of the bank."""
        return self.bank_frames(stored_frames) * self.blocks_per_frame

    @property
    def parts(self) -> int:
        """The number of parts of a whole group that are normalised by themselves; 1 with the other scores."""
        return -(-self.query_group // PART_QUERIES) if self.score == "normalised" else 1

    def query_groups(self, queries: int) -> int:
        """The number of groups that so many queries make."""
        return -(-queries // self.query_group)


@dataclass(frozen=True, eq=False)
class WriteTarget:
    """The pools that whole frames are written into, and the frames' places in them.

    The public function in memflow_ops/ops/ checks the arguments that it is made from; implementations trust it.
    """

    memory_k: Tensor
    """Written: (B, P * frame_tokens, Hkv, D), for P frame places."""
    memory_v: Tensor
    """Written: like memory_k."""
    places: Tensor
    """(B, F) int32: the frame place of each frame. A frame whose place is not one of 0..P-1 is not written."""
    frame_tokens: int
    """Tokens per frame."""
    descriptors: Tensor | None
    """Written: (B, P * ceil(frame_tokens / block_size), Hkv, D or 2 D), the descriptors of the stored keys' blocks:
    means, or means and variances."""
    block_size: int
    """Tokens per block, at most `frame_tokens`."""
    means: Tensor | None
    """Written: (B, M, ceil(frame_tokens / mean_size), Hkv, D), means of the first M frames' keys before rotation."""
    mean_size: int
    """Tokens per mean, at most `frame_tokens`."""

    @property
    def moments(self) -> int:
        """1 where descriptors are means, 2 where they are means and variances."""
        return 1 if self.descriptors is None else self.descriptors.shape[-1] // self.memory_k.shape[-1]
