"""Attention over selected blocks of a memory bank: tiles of keys, and the two ways to walk the blocks of a tile."""

import torch
import triton
import triton.language as tl

from .launch import Launch
from .primitives import cast, load_rows, matmul, online_softmax_update, physical_frame


@triton.jit
def attend_tile(
    query,  # [BLOCK_M, DIM]
    k,  # pointer to this batch and head
    v,
    k_stride,  # between tokens
    v_stride,
    tokens,  # [BLOCK_N] which keys
    present,  # [BLOCK_N] false: neither read nor attended to
    wanted,  # [BLOCK_M] false: this row does not attend to the tile; or None: all rows do
    scale_log2,
    row_max,
    row_sum,
    accumulator,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GUARD: tl.constexpr,
):
    """Attend to one tile of keys: returns the softmax state (row_max, row_sum, accumulator) after it.

    A row that does not want the tile has weights of 0, and 0 times a value that is not finite is NaN: with GUARD such
    rows keep their state instead.
    """
    columns = tl.arange(0, DIM)
    tokens = tokens.to(tl.int64)
    key = load_rows(k + tokens * k_stride, present, columns, HEAD_DIM)  # [BLOCK_N, DIM]
    scores = matmul(query, tl.trans(key), tl.zeros([query.shape[0], tokens.shape[0]], tl.float32)) * scale_log2
    attended = present[None, :]
    if wanted is not None:
        attended = attended & wanted[:, None]
    scores = tl.where(attended, scores, float("-inf"))
    weights, correction, row_max, row_sum = online_softmax_update(scores, row_max, row_sum)
    value = load_rows(v + tokens * v_stride, present, columns, HEAD_DIM)  # [BLOCK_N, DIM]
    after = matmul(cast(weights, value.dtype), value, accumulator * correction[:, None])
    if GUARD:
        after = tl.where(wanted[:, None], after, accumulator)
    return row_max, row_sum, after


@triton.jit
def block_tokens(
    index,  # of the block, a scalar or [BLOCK_N]
    offsets,  # [BLOCK_N] in the block
    blocks,
    blocks_per_frame,
    frame_tokens,
    memory_slots,  # pointer to this batch, or None
    physical_frames,
    BLOCK_SIZE: tl.constexpr,
):
    """The tokens [BLOCK_N] at these offsets of a block of the bank, and which of them there are."""
    frame = index // blocks_per_frame
    offset_in_frame = (index - frame * blocks_per_frame) * BLOCK_SIZE + offsets
    inside = (index >= 0) & (index < blocks)
    slot = physical_frame(memory_slots, frame, inside, physical_frames)
    present = inside & (offsets < BLOCK_SIZE) & (offset_in_frame < frame_tokens)
    return slot.to(tl.int64) * frame_tokens + offset_in_frame, present


@triton.jit
def used_entries(indices, entries, blocks, CHUNK: tl.constexpr):
    """The number of leading entries of a selection that reach up to its last valid index."""
    used = tl.zeros([CHUNK], tl.int32)
    for first in range(0, entries, CHUNK):
        places = first + tl.arange(0, CHUNK)
        index = tl.load(indices + places, mask=places < entries, other=-1)
        used = tl.where((index >= 0) & (index < blocks), places + 1, used)
    return tl.max(used, 0)


@triton.jit
def attend_list(
    query, k, v, k_stride, v_stride, indices, used, blocks, blocks_per_frame, frame_tokens, memory_slots,
    physical_frames, scale_log2, row_max, row_sum, accumulator,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to the first `used` blocks of a list that all rows share."""
    for first in range(0, used * BLOCK_SIZE, BLOCK_N):
        if BLOCK_SIZE % BLOCK_N == 0:
            index = tl.load(indices + first // BLOCK_SIZE)
            offsets = first % BLOCK_SIZE + tl.arange(0, BLOCK_N)
        else:  # the blocks one behind the other: a tile may hold several, or a part of one
            places = first + tl.arange(0, BLOCK_N)
            entry = places // BLOCK_SIZE
            index = tl.load(indices + entry, mask=entry < used, other=-1)
            offsets = places - entry * BLOCK_SIZE
        tokens, present = block_tokens(
            index, offsets, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
        )
        row_max, row_sum, accumulator = attend_tile(
            query, k, v, k_stride, v_stride, tokens, present, None, scale_log2, row_max, row_sum, accumulator,
            HEAD_DIM, DIM, False,
        )  # fmt: skip
    return row_max, row_sum, accumulator


# Rows with lists of their own walk the union of them as one merges sorted lists: the next block is the lowest that
# stands at the head of a row's list, and the rows where it does want it and move on. An entry that is no block is
# walked over like one; lists in any order are walked to their end all the same, only less shared.


@triton.jit
def used_entries_of_rows(lists, row_mask, entries, blocks, ROWS: tl.constexpr):
    """used_entries of each of the lists [ROWS] (pointers)."""
    used = tl.zeros([ROWS], tl.int32)
    for entry in range(entries):
        index = tl.load(lists + entry, mask=row_mask, other=-1)
        used = tl.where((index >= 0) & (index < blocks), entry + 1, used)
    return used


@triton.jit
def heads_of_lists(lists, cursor, used, blocks):
    """The entry at each row's cursor, -1 if it is no block; the largest integer behind the end."""
    index = tl.load(lists + cursor, mask=cursor < used, other=0)
    return tl.where(cursor < used, tl.where((index >= 0) & (index < blocks), index, -1), 0x7FFFFFFF)


# Bytes: the indices once, the union once. Bound by the latency of its steps.
@triton.jit
def union_kernel(
    indices,  # (B, H, G, K) int32
    unions,  # (B, H, tiles, ROWS * K) int32, contiguous: what the rows of a tile walk over
    sizes,  # (B, H, tiles) int32, contiguous
    index_strides,  # (B, H, G)
    queries,
    query_group,
    entries,  # K
    blocks,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tile * ROWS + tl.arange(0, ROWS)
    row_mask = rows < queries
    lists = indices + batch * index_strides[0] + head * index_strides[1]
    lists += (rows // query_group).to(tl.int64) * index_strides[2]
    place = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tile
    union = unions + place * ROWS * entries
    used = used_entries_of_rows(lists, row_mask, entries, blocks, ROWS)
    cursor = tl.zeros([ROWS], tl.int32)
    heads = heads_of_lists(lists, cursor, used, blocks)
    size = 0
    block = tl.min(heads, 0)
    while block < 0x7FFFFFFF:
        tl.store(union + size, block)
        size += 1
        cursor += (heads == block).to(tl.int32)
        heads = heads_of_lists(lists, cursor, used, blocks)
        block = tl.min(heads, 0)
    tl.store(sizes + place, size)


@triton.jit
def attend_union(
    query, k, v, k_stride, v_stride, lists, row_mask, entries, union, size, blocks, blocks_per_frame, frame_tokens,
    memory_slots, physical_frames, scale_log2, row_max, row_sum, accumulator,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GUARD: tl.constexpr,
):  # fmt: skip
    """Attend each row to the blocks of its own list, all rows together to the union of the lists."""
    PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    used = used_entries_of_rows(lists, row_mask, entries, blocks, BLOCK_M)
    cursor = tl.zeros([BLOCK_M], tl.int32)
    heads = heads_of_lists(lists, cursor, used, blocks)
    for step in range(size * PARTS):
        index = tl.load(union + step // PARTS)
        offsets = step % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
        tokens, present = block_tokens(
            index, offsets, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
        )
        wanted = heads == index
        row_max, row_sum, accumulator = attend_tile(
            query, k, v, k_stride, v_stride, tokens, present, wanted, scale_log2, row_max, row_sum, accumulator,
            HEAD_DIM, DIM, GUARD,
        )  # fmt: skip
        last_part = step % PARTS == PARTS - 1
        cursor += (wanted & last_part).to(tl.int32)
        heads = heads_of_lists(lists, cursor, used, blocks)
    return row_max, row_sum, accumulator


def plan_union(
    indices: torch.Tensor, queries: int, query_group: int, blocks: int, rows: int
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """The launch that fills, for tiles of `rows` queries, the unions of their lists and their sizes; these tensors."""
    batch, heads, _, entries = indices.shape
    tiles = triton.cdiv(queries, rows)
    unions = torch.empty((batch, heads, tiles, rows * entries), dtype=torch.int32, device=indices.device)
    sizes = torch.empty((batch, heads, tiles), dtype=torch.int32, device=indices.device)
    arguments = dict(
        indices=indices,
        unions=unions,
        sizes=sizes,
        index_strides=indices.stride()[:3],
        queries=queries,
        query_group=query_group,
        entries=entries,
        blocks=blocks,
        ROWS=rows,
    )
    return Launch(union_kernel, (tiles, heads, batch), arguments, dict(num_warps=1, num_stages=1)), unions, sizes
