"""Keys and values of a dense segment or of selected blocks of a memory bank, and the three ways to walk over them.

A walk visits tiles of keys and hands each to a step: `attend_tile` of the forward pass, or `queries_tile` of the
backward pass. The keys of a dense segment are visited in order, the blocks of a list that all rows share one after
the other; rows with lists of their own visit the union of the lists together. With a causal mask rows see different
numbers of the keys of the dense segment.

step(rows, state, key, value, present, ragged, wanted, GUARD) -> state
rows: what the step knows of its rows of queries · state: what it has accumulated so far · key, value [BLOCK_N, DIM],
0 where there is no key · present [BLOCK_N] false: there is no such key; or [BLOCK_M, BLOCK_N] false: the row does not
see it · ragged: whether any is false · wanted
[BLOCK_M] false: this row does not attend to the tile; or None: all rows do · GUARD: rows that do not want the tile
keep their state even if the tile holds values that are not finite
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.int8 import numbers_of, scales_of, scales_of_head
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import load_rows, slots_of_batch, stored_frame, strided


class Segment(NamedTuple):
    """Keys and values (B, L, Hkv, D) as an argument, or those of one batch element and head in a kernel.

    Segment() is one without keys. A kernel asks for `segment.k is None`: triton 3.6.0 cannot compare a tuple that
    holds None.
    """

    k: Any = None
    v: Any = None
    k_strides: Any = None
    """(B, L, Hkv), in elements. The last dimension is contiguous."""
    v_strides: Any = None
    """None: those of k. One offset for both saves registers."""
    frames: Any = None
    """Frames of a window that lies among other frames; None: the keys follow one another. The bank's are an argument of
    their own, because blocks are located by them."""
    scales: Any = None
    """Scales of a bank that is int8; None: it is not."""


def segment_of(k: torch.Tensor | None, v: torch.Tensor | None) -> Segment:
    """The argument tuple of keys and values (B, L, Hkv, D), Segment() for None or no tokens."""
    if k is None or v is None or not k.shape[1]:
        return Segment()
    return Segment(k, v, k.stride()[:3], strided(v, like=k).strides)


def bank_of(k: torch.Tensor | None, v: torch.Tensor | None, geometry: Geometry) -> Segment:
    """As segment_of, for the keys and values of the bank, which may be int8."""
    segment, int8 = segment_of(k, v), geometry.int8
    return segment if segment.k is None or int8 is None else segment._replace(scales=scales_of(int8))


def window_of(k: torch.Tensor | None, v: torch.Tensor | None, geometry: Geometry) -> Segment:
    """As segment_of, for the keys and values of the window, which may lie among other frames."""
    segment, slots = segment_of(k, v), geometry.window_slots
    if segment.k is None or slots is None:
        return segment
    return segment._replace(frames=table_of(slots, geometry.stored_frames(segment.k), geometry.frame_tokens))


def valid_keys_of(geometry: Geometry) -> torch.Tensor | None:
    """How many leading keys of the window are valid, (B,) int32, contiguous; None: all."""
    return None if geometry.seqused_k is None else geometry.seqused_k.contiguous()


class Frames(NamedTuple):
    """Where the frames of the bank lie in the memory, as an argument."""

    slots: Any
    """The slot table (B, F) int32; None: the stored frames are the bank."""
    slot_stride: Any
    """Between the tables of two batch elements."""
    count: Any
    """F, the frames of the bank."""
    stored: Any
    """The frames that the memory holds."""
    tokens: Any
    """Tokens per frame."""


def frames_of(memory: torch.Tensor, geometry: Geometry) -> Frames:
    """The argument tuple for a memory (B, stored frames * frame_tokens, Hkv, D)."""
    stored, slots = geometry.stored_frames(memory), geometry.memory_slots
    if slots is not None:
        return table_of(slots, stored, geometry.frame_tokens)
    return Frames(None, None, stored, stored, geometry.frame_tokens)


def table_of(slots: torch.Tensor, stored: int, tokens: int) -> Frames:
    """The argument tuple for a slot table (B, F) of any strides, into so many stored frames of so many tokens."""
    slots = slots if slots.stride(1) == 1 else slots.contiguous()
    return Frames(slots, slots.stride(0), slots.shape[1], stored, tokens)


class Blocks(NamedTuple):
    """Where the blocks of the bank of one batch element lie, in a kernel."""

    slots: Any
    """Of slots_of_batch."""
    stored_frames: Any
    frame_tokens: Any
    per_frame: Any
    count: Any


@triton.jit
def segment_of_head(segment, batch, kv_head):
    """The keys and values of one batch element and head; frames and scales in tuples, empty for None (see
    slots_of_batch)."""
    v_strides = segment.v_strides
    if v_strides is None:
        v_strides = segment.k_strides
    k = segment.k + (batch * segment.k_strides[0] + kv_head * segment.k_strides[2])
    v = segment.v + (batch * v_strides[0] + kv_head * v_strides[2])
    frames = ()
    if segment.frames is not None:
        of_all = segment.frames
        slots = of_all.slots + batch * of_all.slot_stride
        frames = (Frames(slots, of_all.slot_stride, of_all.count, of_all.stored, of_all.tokens),)
    scales = ()
    if segment.scales is not None:
        scales = (scales_of_head(segment.scales, batch, kv_head),)
    return Segment(k, v, segment.k_strides, v_strides, frames, scales)


@triton.jit
def stored_tokens(frames, token, present):
    """Where tokens of the window lie among the stored ones, int64; frames: Frames of the batch element."""
    frame = token // frames.tokens
    slot = stored_frame((frames.slots,), frame, present, frames.stored)
    return slot.to(tl.int64) * frames.tokens + (token - frame * frames.tokens)


@triton.jit
def load_keys(segment, token, lanes, present, columns, HEAD_DIM: tl.constexpr):
    """The keys and values [BLOCK_N, DIM] of the tokens `token + lanes`; 0, and not read, where `present` is false."""
    # What all lanes share is added first: it needs no registers per lane.
    key_rows = segment.k + token * segment.k_strides[1] + lanes * segment.k_strides[1]
    value_rows = segment.v + token * segment.v_strides[1] + lanes * segment.v_strides[1]
    return load_rows(key_rows, present, columns, HEAD_DIM), load_rows(value_rows, present, columns, HEAD_DIM)


@triton.jit
def load_block(
    segment,
    blocks,
    slot,  # of locate_block, like start and length
    start,
    length,
    part,  # the first token in the block, or [BLOCK_N] those of all lanes
    lanes,
    present,
    columns,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SHARED: tl.constexpr,  # one block for all lanes
):
    """What load_keys gives for the tokens `part + lanes` of blocks of the bank, which may be int8."""
    token = slot.to(tl.int64) * blocks.frame_tokens + start + part
    key, value = load_keys(segment, token, lanes, present, columns, HEAD_DIM)
    if len(segment.scales) > 0:
        block = slot.to(tl.int64) * blocks.per_frame + start // BLOCK_SIZE
        there = length > 0 if SHARED else present
        key, value = numbers_of(
            key, value, segment.scales[0], block, there, token + lanes, present, columns, HEAD_DIM, SHARED
        )
    return key, value


@triton.jit
def blocks_of(frames, batch, BLOCK_SIZE: tl.constexpr):
    """The Blocks of one batch element."""
    slots = slots_of_batch(frames.slots, batch, frames.slot_stride)
    per_frame = tl.cdiv(frames.tokens, BLOCK_SIZE)
    return Blocks(slots, frames.stored, frames.tokens, per_frame, frames.count * per_frame)


@triton.jit
def locate_block(index, blocks, BLOCK_SIZE: tl.constexpr):
    """Where blocks lie, by their index in bank order (a scalar or [BLOCK_N]).

    Returns the stored frame, the first token in it, and the number of tokens, 0 if there is no such block.
    """
    inside = (index >= 0) & (index < blocks.count)
    frame = index // blocks.per_frame
    first = (index - frame * blocks.per_frame) * BLOCK_SIZE
    slot = stored_frame(blocks.slots, frame, inside, blocks.stored_frames)
    return slot, first, tl.where(inside, tl.minimum(blocks.frame_tokens - first, BLOCK_SIZE), 0)


@triton.jit
def list_pointers(indices, batch, head, group):
    """Pointers to the lists of groups (a scalar or [BLOCK_M]) in the indices (B, H, G, K)."""
    strides = indices.strides
    return indices.pointer + (batch * strides[0] + head * strides[1] + group.to(tl.int64) * strides[2])


@triton.jit
def tile_mask(present):
    """What a step gets as `present`, as a mask [1 or BLOCK_M, BLOCK_N] of scores."""
    if len(present.shape) == 1:
        present = present[None, :]
    return present


@triton.jit
def count_valid_keys(seqused, batch, keys):
    """How many leading keys of the window are valid: seqused[batch] clamped to 0..keys; all of them for None."""
    if seqused is not None:
        keys = tl.minimum(tl.maximum(tl.load(seqused + batch), 0), keys)
    return keys


@triton.jit
def walk_segment(
    step: tl.constexpr, rows, state, segment, begin, end, seen, columns, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Visit the keys begin..end-1 of a segment. Returns the state after the last step.

    seen [BLOCK_M]: how many leading keys of the segment each row sees, at most `end`; None: all rows see all.
    """
    if len(segment.frames) > 0:
        coming = begin + tl.arange(0, BLOCK_N)
        ahead = stored_tokens(segment.frames[0], coming, coming < end)
    for first in range(begin, end, BLOCK_N):
        lanes = tl.arange(0, BLOCK_N)
        if len(segment.frames) == 0:
            token = tl.zeros([], tl.int64) + first
        else:  # Tokens are located a step ahead, as in walk_list. A tile may cross into another frame.
            token = ahead
            coming = first + BLOCK_N + lanes
            ahead = stored_tokens(segment.frames[0], coming, coming < end)
        present = first + lanes < end
        within = lanes.to(tl.int64) if len(segment.frames) == 0 else 0
        key, value = load_keys(segment, token, within, present, columns, HEAD_DIM)
        if seen is None:
            state = step(rows, state, key, value, present, first + BLOCK_N > end, None, False)
        else:
            state = step(rows, state, key, value, (first + lanes)[None, :] < seen[:, None], True, None, False)
    return state


@triton.jit
def walk_window(
    step: tl.constexpr,
    rows,
    state,
    segment,
    keys,  # valid ones
    numbers,  # [BLOCK_M] int64, of the rows among the queries
    row_mask,
    queries,
    columns,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Visit the keys of the window that the rows see. Returns the state after the last step.

    CAUSAL: query i of them sees the first i + 1 + keys - queries. Tiles that all rows see need no mask for that, and
    tiles that no row sees are not visited.
    """
    if CAUSAL:
        seen = (numbers + (keys + 1 - queries)).to(tl.int32)
        end = tl.max(tl.where(row_mask, seen, 0), 0)
        seen_by_all = tl.maximum(tl.min(tl.where(row_mask, seen, end), 0), 0)
        diagonal = seen_by_all // BLOCK_N * BLOCK_N
        state = walk_segment(step, rows, state, segment, 0, diagonal, None, columns, HEAD_DIM, BLOCK_N)
        state = walk_segment(step, rows, state, segment, diagonal, end, seen, columns, HEAD_DIM, BLOCK_N)
    else:
        state = walk_segment(step, rows, state, segment, 0, keys, None, columns, HEAD_DIM, BLOCK_N)
    return state


@triton.jit
def used_entries(list_pointer, entries, blocks, CHUNK: tl.constexpr):
    """The number of leading entries of a list that reach up to its last valid index."""
    used = tl.zeros([CHUNK], tl.int32)
    for first in range(0, entries, CHUNK):
        places = first + tl.arange(0, CHUNK)
        index = tl.load(list_pointer + places, mask=places < entries, other=-1)
        used = tl.where((index >= 0) & (index < blocks), places + 1, used)
    return tl.max(used, 0)


@triton.jit
def walk_list(
    step: tl.constexpr,
    rows,
    state,
    segment,  # of the batch element and head
    blocks,  # of the batch element
    list_pointer,
    used,
    columns,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Visit the first `used` blocks of a list that all rows share. Returns the state after the last step.

    A tile is located one step ahead, and its index is read two steps ahead: otherwise keys would wait for both, one
    after the other.
    """
    lanes = tl.arange(0, BLOCK_N)
    # A tile is a part of one block, or holds several blocks one after the other: then each lane has its own entry.
    shared: tl.constexpr = BLOCK_SIZE % BLOCK_N == 0
    offset = 0 if shared else lanes
    end = used * BLOCK_SIZE
    index = tl.load(list_pointer + offset // BLOCK_SIZE, mask=offset < end, other=-1)
    slot, start, length = locate_block(index, blocks, BLOCK_SIZE)
    offset += BLOCK_N
    index = tl.load(list_pointer + offset // BLOCK_SIZE, mask=offset < end, other=-1)
    for first in range(0, end, BLOCK_N):
        if shared:
            part = first % BLOCK_SIZE
            present = part + lanes < length
            ragged = part + BLOCK_N > length
        else:
            part = (first + lanes) % BLOCK_SIZE
            present = part < length
            ragged = True
        within = 0 if not shared else lanes.to(tl.int64)
        key, value = load_block(
            segment, blocks, slot, start, length, part, within, present, columns, HEAD_DIM, BLOCK_SIZE, shared
        )
        state = step(rows, state, key, value, present, ragged, None, False)
        slot, start, length = locate_block(index, blocks, BLOCK_SIZE)
        offset += BLOCK_N
        index = tl.load(list_pointer + offset // BLOCK_SIZE, mask=offset < end, other=-1)
    return state


# Rows with lists of their own walk over the union of the lists as one merges sorted lists: the next block is the lowest
# that stands at the cursor of any row; the rows where it stands want it and move on. An entry that is no block is
# visited like one. Lists in any order are visited to their end all the same, only less of the walk is shared.


@triton.jit
def used_entries_of_rows(lists, row_mask, entries, blocks, ROWS: tl.constexpr):
    """What used_entries gives, for each of the lists [ROWS] (pointers)."""
    used = tl.zeros([ROWS], tl.int32)
    for entry in range(entries):
        index = tl.load(lists + entry, mask=row_mask, other=-1)
        used = tl.where((index >= 0) & (index < blocks), entry + 1, used)
    return used


@triton.jit
def heads_of_lists(lists, cursor, used, blocks):
    """The entry at each row's cursor: -1 if it is no block, the largest integer after the end of the list."""
    index = tl.load(lists + cursor, mask=cursor < used, other=0)
    return tl.where(cursor < used, tl.where((index >= 0) & (index < blocks), index, -1), 0x7FFFFFFF)


class Unions(NamedTuple):
    """What union_kernel writes: the entries that the rows of each tile visit together."""

    entries: Any
    """(B, H, tiles, ROWS * K) int32, contiguous."""
    sizes: Any
    """(B, H, tiles) int32, contiguous: how many entries there are."""


# Bytes: the indices once, the union once. Bound by the latency of its steps.
@triton.jit
def union_kernel(
    indices,  # Strided (B, H, G, K) int32
    unions,  # Unions
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
    lists = list_pointers(indices, batch, head, rows // query_group)
    place = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tile
    union = unions.entries + place * ROWS * entries
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
    tl.store(unions.sizes + place, size)


@triton.jit
def union_of_tile(unions, batch, head, tile, entries, ROWS: tl.constexpr):
    """Pointer to the union of a tile's lists, and its size."""
    number = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tile
    return unions.entries + number * ROWS * entries, tl.load(unions.sizes + number)


@triton.jit
def walk_union(
    step: tl.constexpr,
    rows,
    state,
    segment,  # of the batch element and head
    blocks,  # of the batch element
    lists,  # [BLOCK_M] pointers, each row's own list
    row_mask,
    entries,
    union,  # of union_of_tile
    size,
    columns,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GUARD: tl.constexpr,
):
    """Visit the blocks of each row's own list, all rows together those of the union. Returns the state at the end."""
    PARTS: tl.constexpr = (BLOCK_SIZE + BLOCK_N - 1) // BLOCK_N
    lanes = tl.arange(0, BLOCK_N)
    used = used_entries_of_rows(lists, row_mask, entries, blocks.count, BLOCK_M)
    cursor = tl.zeros([BLOCK_M], tl.int32)
    heads = heads_of_lists(lists, cursor, used, blocks.count)
    # Indices are read ahead as in walk_list.
    index = tl.load(union, mask=size > 0, other=-1)
    slot, start, length = locate_block(index, blocks, BLOCK_SIZE)
    wanted = heads == index
    index = tl.load(union + 1 // PARTS, mask=size * PARTS > 1, other=-1)
    for number in range(size * PARTS):
        part = number % PARTS * BLOCK_N
        present = part + lanes < length
        key, value = load_block(
            segment, blocks, slot, start, length, part, lanes.to(tl.int64), present, columns, HEAD_DIM, BLOCK_SIZE, True
        )
        state = step(rows, state, key, value, present, part + BLOCK_N > length, wanted, GUARD)
        last_part = number % PARTS == PARTS - 1
        cursor += (wanted & last_part).to(tl.int32)
        heads = heads_of_lists(lists, cursor, used, blocks.count)
        wanted = heads == index
        slot, start, length = locate_block(index, blocks, BLOCK_SIZE)
        index = tl.load(union + (number + 2) // PARTS, mask=number + 2 < size * PARTS, other=-1)
    return state


def plan_unions(indices: torch.Tensor, queries: int, query_group: int, blocks: int, rows: int) -> tuple[Launch, Unions]:
    """The launch that fills the unions of the lists (B, H, G, K) of each tile of `rows` queries, and the unions."""
    batch, heads, _, entries = indices.shape
    tiles = cdiv(queries, rows)
    unions = Unions(
        torch.empty((batch, heads, tiles, rows * entries), dtype=torch.int32, device=indices.device),
        torch.empty((batch, heads, tiles), dtype=torch.int32, device=indices.device),
    )
    arguments = dict(
        indices=strided(indices),
        unions=unions,
        queries=queries,
        query_group=query_group,
        entries=entries,
        blocks=blocks,
        ROWS=rows,
    )
    return Launch(union_kernel, (tiles, heads, batch), arguments, dict(num_warps=1, num_stages=1)), unions
