"""Attention over selected blocks of a memory bank: tiles of keys, and the two ways to walk the blocks of a tile."""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import cast, load_rows, matmul, online_softmax_update, physical_frame


@triton.jit
def attend_tile(
    query,  # [BLOCK_M, DIM]
    key,  # [BLOCK_N, DIM], 0 where there is none
    value,
    present,  # [BLOCK_N] false: there is no such key
    ragged,  # scalar: whether any is false
    wanted,  # [BLOCK_M] false: this row does not attend to the tile; or None: all rows do
    scale_log2,  # above 0
    row_max,
    row_sum,
    accumulator,
    GUARD: tl.constexpr,
):
    """Attend to one tile of keys: returns the softmax state (row_max, row_sum, accumulator) after it.

    A row that does not want the tile has weights of 0, and 0 times a value that is not finite is NaN, as is the weight
    of a score that is not: with GUARD such rows keep their state instead.
    """
    scores = matmul(query, tl.trans(key), tl.zeros([query.shape[0], key.shape[0]], tl.float32))
    if ragged:
        scores = tl.where(present[None, :], scores, float("-inf"))
    if GUARD:
        scores = tl.where(wanted[:, None], scores, float("-inf"))
    weights, correction, row_max, row_sum = online_softmax_update(scores, scale_log2, wanted, row_max, row_sum)
    after = matmul(cast(weights, value.dtype), value, accumulator * correction[:, None])
    if GUARD:
        after = tl.where(wanted[:, None], after, accumulator)
    return row_max, row_sum, after


@triton.jit
def bank_place(
    index,  # in bank order, a scalar or [BLOCK_N]
    blocks,
    blocks_per_frame,
    frame_tokens,
    memory_slots,  # pointer to this batch, or None
    physical_frames,
    BLOCK_SIZE: tl.constexpr,
):
    """Where blocks of the bank lie: physical frame, first token in it, and how many there are, 0 if no such block."""
    inside = (index >= 0) & (index < blocks)
    frame = index // blocks_per_frame
    first = (index - frame * blocks_per_frame) * BLOCK_SIZE
    slot = physical_frame(memory_slots, frame, inside, physical_frames)
    return slot, first, tl.where(inside, tl.minimum(frame_tokens - first, BLOCK_SIZE), 0)


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
    query, k, v, k_stride, v_stride, indices, used, blocks, blocks_per_frame, frame_tokens,
    memory_slots, physical_frames, scale_log2, row_max, row_sum, accumulator,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to the first `used` blocks of a list that all rows share.

    Where a tile lies is made out one step ahead and its index read two: keys would wait for one after the other.
    """
    columns = tl.arange(0, DIM)
    lanes = tl.arange(0, BLOCK_N)
    # A tile is a part of one block, or has blocks one behind the other: then each lane has an entry of its own.
    shared: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
    offset = 0 if shared else lanes
    end = used * BLOCK_SIZE
    index = tl.load(indices + offset // BLOCK_SIZE, mask=offset < end, other=-1)
    slot, start, length = bank_place(
        index, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
    )
    offset += BLOCK_N
    index = tl.load(indices + offset // BLOCK_SIZE, mask=offset < end, other=-1)
    for first in range(0, end, BLOCK_N):
        if shared:
            part = first % BLOCK_SIZE
            present = part + lanes < length
            ragged = part + BLOCK_N > length
        else:
            part = (first + lanes) % BLOCK_SIZE
            present = part < length
            ragged = True
        token = slot.to(tl.int64) * frame_tokens + start + part
        within = 0 if not shared else lanes.to(tl.int64)  # added last: what all lanes share needs no registers
        key = load_rows(k + token * k_stride + within * k_stride, present, columns, HEAD_DIM)  # [BLOCK_N, DIM]
        value = load_rows(v + token * v_stride + within * v_stride, present, columns, HEAD_DIM)
        row_max, row_sum, accumulator = attend_tile(
            query, key, value, present, ragged, None, scale_log2, row_max, row_sum, accumulator, False
        )
        slot, start, length = bank_place(
            index, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
        )
        offset += BLOCK_N
        index = tl.load(indices + offset // BLOCK_SIZE, mask=offset < end, other=-1)
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
    query, k, v, k_stride, v_stride, lists, row_mask, entries, union, size, blocks,
    blocks_per_frame, frame_tokens, memory_slots, physical_frames, scale_log2, row_max, row_sum, accumulator,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GUARD: tl.constexpr,
):  # fmt: skip
    """Attend each row to the blocks of its own list, all rows together to the union of the lists."""
    PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    columns = tl.arange(0, DIM)
    lanes = tl.arange(0, BLOCK_N)
    used = used_entries_of_rows(lists, row_mask, entries, blocks, BLOCK_M)
    cursor = tl.zeros([BLOCK_M], tl.int32)
    heads = heads_of_lists(lists, cursor, used, blocks)
    # as in attend_list
    index = tl.load(union, mask=size > 0, other=-1)
    slot, start, length = bank_place(
        index, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
    )
    wanted = heads == index
    index = tl.load(union + 1 // PARTS, mask=size * PARTS > 1, other=-1)
    for step in range(size * PARTS):
        part = step % PARTS * BLOCK_N
        present = part + lanes < length
        token = slot.to(tl.int64) * frame_tokens + start + part
        within = lanes.to(tl.int64)
        key = load_rows(k + token * k_stride + within * k_stride, present, columns, HEAD_DIM)  # [BLOCK_N, DIM]
        value = load_rows(v + token * v_stride + within * v_stride, present, columns, HEAD_DIM)
        row_max, row_sum, accumulator = attend_tile(
            query, key, value, present, part + BLOCK_N > length, wanted, scale_log2, row_max, row_sum, accumulator,
            GUARD,
        )  # fmt: skip
        last_part = step % PARTS == PARTS - 1
        cursor += (wanted & last_part).to(tl.int32)
        heads = heads_of_lists(lists, cursor, used, blocks)
        wanted = heads == index
        slot, start, length = bank_place(
            index, blocks, blocks_per_frame, frame_tokens, memory_slots, physical_frames, BLOCK_SIZE
        )
        index = tl.load(union + (step + 2) // PARTS, mask=step + 2 < size * PARTS, other=-1)
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
