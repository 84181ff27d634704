"""Scores of query rows against the stored descriptors of the bank's blocks."""

import triton
import triton.language as tl

from memflow_ops.kernels.primitives import load_rows, matmul, physical_frame


@triton.jit
def count_valid_blocks(memory_frames, offset, frames, blocks_per_frame):
    """How many of the bank's leading blocks are valid: the count of frames on the device (None: all), clamped."""
    valid_frames = frames
    if memory_frames is not None:
        valid_frames = tl.minimum(tl.maximum(tl.load(memory_frames + offset), 0), frames)
    return valid_frames * blocks_per_frame


@triton.jit
def descriptor_pointers(
    descriptors,  # pointer to this batch and head
    descriptor_stride,
    memory_slots,  # pointer to this batch, or None
    blocks,  # [COLUMNS] indices in bank order
    valid,  # [COLUMNS]
    blocks_per_frame,
    physical_frames,
):
    """Where the descriptors of blocks of the bank lie."""
    frames = blocks // blocks_per_frame
    slots = physical_frame(memory_slots, frames, valid, physical_frames)
    positions = slots.to(tl.int64) * blocks_per_frame + (blocks - frames * blocks_per_frame)
    return descriptors + positions * descriptor_stride


@triton.jit
def score_tile(
    query,  # [ROWS, DIM] for tensor cores, or None: IEEE products of float32
    query_rows,  # [ROWS] pointers
    row_mask,
    descriptor_rows,  # [COLUMNS] pointers
    valid,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """Scores [ROWS, COLUMNS] in float32; NaN for blocks that are not valid."""
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
