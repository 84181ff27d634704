"""Scores of query rows against the stored descriptors of the bank's blocks."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.primitives import Strided, load_rows, matmul, slots_of_batch, stored_frame, strided


class DescribedBank(NamedTuple):
    """Arguments of a selection kernel: the stored descriptors, and where those of the bank's blocks lie."""

    descriptors: Strided
    """(B, stored blocks, Hkv, D)"""
    slots: Any
    """The slot table (B, F) int32; None: the stored frames are the bank."""
    slot_stride: Any
    """Between the tables of two batch elements."""
    valid_frames: Any
    """(B,) or (B, G) int32: how many leading frames of the bank are valid; None: all."""
    valid_strides: Any
    """See strides_of_counts."""
    frames: Any
    stored_frames: Any
    blocks_per_frame: Any
    last_block: Any
    """What is added to the scores of a frame's last block; None: nothing."""


def described_bank(descriptors: torch.Tensor, geometry: Geometry) -> DescribedBank:
    """The argument tuple of the descriptors (B, stored blocks, Hkv, D or 2 D); the others as in `Geometry`."""
    blocks_per_frame, memory_slots = geometry.blocks_per_frame, geometry.memory_slots
    memory_frames = geometry.memory_frames
    stored_frames = descriptors.shape[1] // blocks_per_frame
    if memory_slots is not None and memory_slots.stride(1) != 1:
        memory_slots = memory_slots.contiguous()
    return DescribedBank(
        descriptors=strided(descriptors),
        slots=memory_slots,
        slot_stride=0 if memory_slots is None else memory_slots.stride(0),
        valid_frames=memory_frames,
        valid_strides=strides_of_counts(memory_frames),
        frames=stored_frames if memory_slots is None else memory_slots.shape[1],
        stored_frames=stored_frames,
        blocks_per_frame=blocks_per_frame,
        last_block=geometry.last_block_score or None,
    )


def strides_of_counts(counts: torch.Tensor | None) -> tuple[int, int | None] | None:
    """The strides of counts (B,) or (B, G), the second None where all groups share a count; None for None."""
    if counts is None:
        return None
    return counts.stride(0), counts.stride(1) if differs_by_group(counts) else None


def differs_by_group(counts: torch.Tensor | None) -> bool:
    """Whether counts are (B, G), one for each query group."""
    return counts is not None and counts.dim() == 2


class HeadDescriptors(NamedTuple):
    """The descriptors of one batch element and key head, in a kernel."""

    pointer: Any
    stride: Any
    """Between two stored blocks, in elements."""
    slots: Any
    """Of slots_of_batch."""
    stored_frames: Any
    blocks_per_frame: Any
    last_block: Any
    """As in DescribedBank, in a tuple, which is empty for None."""


@triton.jit
def descriptors_of_head(bank, batch, kv_head):
    """The HeadDescriptors of a DescribedBank."""
    strides = bank.descriptors.strides
    pointer = bank.descriptors.pointer + (batch * strides[0] + kv_head * strides[2])
    slots = slots_of_batch(bank.slots, batch, bank.slot_stride)
    last_block = ()
    if bank.last_block is not None:
        last_block = (bank.last_block,)
    return HeadDescriptors(pointer, strides[1], slots, bank.stored_frames, bank.blocks_per_frame, last_block)


@triton.jit
def add_length(scores, descriptors, blocks):
    """The scores [..., COLUMNS] of blocks [COLUMNS] and what the number of their keys adds to them, if anything."""
    if len(descriptors.last_block) > 0:
        last = (blocks + 1) % descriptors.blocks_per_frame == 0
        scores += tl.where(last, descriptors.last_block[0], 0.0)
    return scores


@triton.jit
def count_valid_blocks(valid_frames, strides, batch, group, frames, blocks_per_frame):
    """How many leading blocks of the bank are valid for groups (a scalar or [ROWS]): frames (None: all), clamped.

    It is a scalar where all groups share a count.
    """
    count = frames
    if valid_frames is not None:
        offset = batch * strides[0]
        if strides[1] is not None:
            offset += group * strides[1]
        count = tl.minimum(tl.maximum(tl.load(valid_frames + offset), 0), frames)
    return count * blocks_per_frame


@triton.jit
def valid_blocks_of_rows(bank, batch, groups, row_mask, BY_GROUP: tl.constexpr):
    """How many leading blocks of the bank are valid for any of the groups [ROWS], and for each of them.

    The second is [ROWS] with BY_GROUP, where groups differ in it, and else the first.
    """
    each = count_valid_blocks(
        bank.valid_frames, bank.valid_strides, batch, tl.where(row_mask, groups, 0), bank.frames, bank.blocks_per_frame
    )
    largest = each
    if BY_GROUP:
        each = tl.where(row_mask, each, 0)
        largest = tl.max(each, 0)
    return largest, each


@triton.jit
def choosable(blocks, each, BY_GROUP: tl.constexpr):
    """Which blocks [COLUMNS] each row can choose, [1 or ROWS, COLUMNS]; each: of valid_blocks_of_rows."""
    if BY_GROUP:
        each = each[:, None]
    return blocks[None, :] < each


@triton.jit
def descriptor_pointers(
    descriptors,  # HeadDescriptors
    blocks,  # [COLUMNS] indices in bank order
    valid,  # [COLUMNS] false: there is no such block
):
    """Pointers [COLUMNS] to the descriptors of blocks of the bank."""
    frames = blocks // descriptors.blocks_per_frame
    slots = stored_frame(descriptors.slots, frames, valid, descriptors.stored_frames)
    positions = slots.to(tl.int64) * descriptors.blocks_per_frame + (blocks - frames * descriptors.blocks_per_frame)
    return descriptors.pointer + positions * descriptors.stride


@triton.jit
def score_tile(
    query,  # [ROWS, DIM] for tensor cores, or None: IEEE products of float32
    query_rows,  # [ROWS] pointers
    row_mask,  # [ROWS]
    descriptor_rows,  # [COLUMNS] pointers
    valid,  # [COLUMNS]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """Scores [ROWS, COLUMNS] in float32, NaN for blocks that are not valid."""
    scores = tl.zeros([ROWS, COLUMNS], tl.float32)
    if query is not None:
        descriptor = load_rows(descriptor_rows, valid, tl.arange(0, DIM_TILE), HEAD_DIM)  # [COLUMNS, DIM]
        scores = matmul(query, tl.trans(descriptor), scores)
    else:
        for first in range(0, HEAD_DIM, DIM_TILE):
            dims = first + tl.arange(0, DIM_TILE)
            part = load_rows(query_rows, row_mask, dims, HEAD_DIM).to(tl.float32)  # [ROWS, DIM_TILE]
            descriptor = load_rows(descriptor_rows, valid, dims, HEAD_DIM).to(tl.float32)  # [COLUMNS, DIM_TILE]
            scores = tl.dot(part, tl.trans(descriptor), scores, input_precision="ieee")
    return tl.where(valid[None, :], scores, float("nan"))
