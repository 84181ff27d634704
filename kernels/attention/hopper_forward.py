"""The forward kernel for Hopper, in Gluon: attend_kernel (forward.py) for the launches that hopper_plan.py gives it.

A program has a tile of 128 queries of one group. One warp copies tiles of keys and of values into slots of shared
memory, and two warpgroups attend to them with 64 queries each: while the values of a tile are multiplied, the weights
of the next one are computed. Mbarriers say when a slot is full, and when both warpgroups have done with it.

No GPU has run this kernel. `FORWARD` in kernels/configs.py says where it takes the place of attend_kernel.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from memflow_ops.kernels.attention.blocks import Blocks, blocks_of, list_pointers, locate_block
from memflow_ops.kernels.primitives import LN_2, LOG2_E, lse_pointers, online_softmax_update, row_pointers

ROWS = gl.constexpr(64)  # of a warpgroup
WARPGROUPS = gl.constexpr(2)

load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # triton 3.9 renamed it


class Tile(NamedTuple):
    """What a program attends with."""

    batch: Any
    head: Any
    """Both int64."""
    kv_head: Any
    group: Any
    first: Any
    """The first row in the group."""


class Slots(NamedTuple):
    """Where tiles of keys and of values lie in shared memory, and the mbarriers of each slot."""

    k: Any
    """[STAGES, 1, .., BLOCK_N, DIM], like v."""
    v: Any
    full_keys: Any
    """Mbarriers [STAGES, 1]: a phase ends when a tile is there."""
    full_values: Any
    empty_keys: Any
    """Likewise: a phase ends when both warpgroups have done with a tile."""
    empty_values: Any


class Walk(NamedTuple):
    """The tiles of keys that the queries attend to."""

    tiles: Any
    """How many."""
    keys: Any
    """Of a window: how many keys it has."""
    lists: Any
    """Of a bank: the pointer to the list of blocks; None for a window."""
    frames: Any
    """Of a bank: Frames; None for a window."""


@gluon.jit
def rows_of_warpgroup(tile, warpgroup, queries, query_group, layout: gl.constexpr):
    """Rows [ROWS] int64 of a warpgroup among the queries, and which of them exist."""
    offset = tile.first + warpgroup * ROWS + gl.arange(0, ROWS, layout)
    rows = tile.group * query_group + offset
    return rows.to(gl.int64), (offset < query_group) & (rows < queries)


@gluon.jit
def entry_of(walk, number, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr):
    """The block of a tile, by the list; -1 beyond the last tile, and 0 in a window."""
    index = 0
    if BLOCK_SIZE is not None:
        index = gl.load(walk.lists + number * BLOCK_N // BLOCK_SIZE, mask=number < walk.tiles, other=-1)
    return index


@gluon.jit
def present_keys(walk, number, index, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many keys of a tile there are: BLOCK_N or more for a whole one, 0 or less for none."""
    if BLOCK_SIZE is None:
        present = walk.keys - number * BLOCK_N
    else:
        frames = walk.frames
        per_frame = gl.cdiv(frames.tokens, BLOCK_SIZE)
        blocks = Blocks((), frames.stored, frames.tokens, per_frame, frames.count * per_frame)
        _, _, length = locate_block(index, blocks, BLOCK_SIZE)
        present = length - number * BLOCK_N % BLOCK_SIZE
    return present


@gluon.jit
def copy_tiles(keys, values, slots, walk, tile, BLOCK_SIZE: gl.constexpr):
    """The task of the copying warp: all tiles of keys and of values, in order.

    What lies beyond the last key of the window, or of a frame, is filled with zeros.
    """
    STAGES: gl.constexpr = slots.k.shape[0]
    BLOCK_N: gl.constexpr = slots.k.shape[-2]
    batch, kv_head = tile.batch.to(gl.int32), tile.kv_head.to(gl.int32)
    if BLOCK_SIZE is not None:
        blocks = blocks_of(walk.frames, tile.batch, BLOCK_SIZE)
    index = entry_of(walk, 0, BLOCK_SIZE, BLOCK_N)
    for number in range(walk.tiles):
        if BLOCK_SIZE is None:
            place = [batch, kv_head, number * BLOCK_N, 0]
        else:
            frame, start, length = locate_block(index, blocks, BLOCK_SIZE)
            # A block that is none is copied from the end of a frame: as zeros.
            token = gl.where(length > 0, start + number * BLOCK_N % BLOCK_SIZE, walk.frames.tokens)
            place = [batch, kv_head, frame, token, 0]
        index = entry_of(walk, number + 1, BLOCK_SIZE, BLOCK_N)
        slot = number % STAGES
        before = (number // STAGES & 1) ^ 1  # At first no tile has been in the slot, and nobody waits.
        mbarrier.wait(slots.empty_keys.index(slot), before)
        mbarrier.expect(slots.full_keys.index(slot), keys.block_type.nbytes)
        load_tile(keys, place, slots.full_keys.index(slot), slots.k.index(slot))
        mbarrier.wait(slots.empty_values.index(slot), before)
        mbarrier.expect(slots.full_values.index(slot), values.block_type.nbytes)
        load_tile(values, place, slots.full_values.index(slot), slots.v.index(slot))


@gluon.jit
def start_scores(query, slots, number, layout: gl.constexpr):
    """Start the product of the queries with the keys of a tile, once these are there."""
    STAGES: gl.constexpr = slots.k.shape[0]
    BLOCK_N: gl.constexpr = slots.k.shape[-2]
    mbarrier.wait(slots.full_keys.index(number % STAGES), number // STAGES & 1)
    key = slots.k.index(number % STAGES).reshape([BLOCK_N, query.shape[1]])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(query, key.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def start_output(weights, slots, number, accumulator):
    """Start adding the weighted values of a tile, once these are there, to the accumulator."""
    STAGES: gl.constexpr = slots.v.shape[0]
    BLOCK_N: gl.constexpr = slots.v.shape[-2]
    mbarrier.wait(slots.full_values.index(number % STAGES), number // STAGES & 1)
    value = slots.v.index(number % STAGES).reshape([BLOCK_N, accumulator.shape[1]])
    return warpgroup_mma(weights, value, accumulator, is_async=True)


@gluon.jit
def weigh(scores, present, scale_log2, row_max, row_sum):
    """What online_softmax_update returns for the scores [ROWS, BLOCK_N] of a tile with so many keys."""
    if present < scores.shape[1]:
        columns = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where((columns < present)[None, :], scores, float("-inf"))
    return online_softmax_update(scores, scale_log2, None, row_max, row_sum)


@gluon.jit
def attend_rows(
    WARPGROUP: gl.constexpr, query_slots, slots, walk, tile, resume, out, lse, queries, query_group, scale_log2,
    BLOCK_SIZE: gl.constexpr,
):  # fmt: skip
    """The task of a warpgroup: its rows of queries attend to all tiles.

    A tile of keys is done with before the weights are computed, one of values when the next tile's weights are.
    """
    STAGES: gl.constexpr = slots.k.shape[0]
    BLOCK_N: gl.constexpr = slots.k.shape[-2]
    DIM: gl.constexpr = slots.k.shape[-1]
    dtype: gl.constexpr = slots.k.dtype
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_output, 2)
    score_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    output_rows: gl.constexpr = gl.SliceLayout(1, of_output)
    query = query_slots.index(WARPGROUP)
    columns = gl.arange(0, DIM, gl.SliceLayout(0, of_output))[None, :]
    rows, exists = rows_of_warpgroup(tile, WARPGROUP, queries, query_group, output_rows)

    row_max = gl.full([ROWS], float("-inf"), gl.float32, score_rows)
    row_sum = gl.zeros([ROWS], gl.float32, score_rows)
    accumulator = gl.zeros([ROWS, DIM], gl.float32, of_output)
    if resume is not None:  # An output is a sum of weight 1.
        lse_rows = lse_pointers(resume[1], tile.batch, tile.head, rows)
        out_rows = row_pointers(resume[0], tile.batch, rows, tile.head)
        before = gl.load(lse_rows, mask=exists, other=float("-inf")) * LOG2_E
        started = exists & (before != float("-inf"))
        accumulator = gl.load(out_rows[:, None] + columns, mask=started[:, None], other=0.0).to(gl.float32)
        row_max = gl.convert_layout(before, score_rows)
        row_sum = gl.where(row_max != float("-inf"), 1.0, 0.0)

    if walk.tiles > 0:
        index = entry_of(walk, 0, BLOCK_SIZE, BLOCK_N)
        multiplying = start_scores(query, slots, 0, of_scores)
        present = present_keys(walk, 0, index, BLOCK_SIZE, BLOCK_N)
        index = entry_of(walk, 1, BLOCK_SIZE, BLOCK_N)
        scores = warpgroup_mma_wait(0, deps=(multiplying,))
        mbarrier.arrive(slots.empty_keys.index(0), count=1)
        weights, correction, row_max, row_sum = weigh(scores, present, scale_log2, row_max, row_sum)
        accumulator *= gl.convert_layout(correction, output_rows)[:, None]
        operand = gl.convert_layout(weights.to(dtype), of_weights)
        for number in range(1, walk.tiles):
            multiplying = start_scores(query, slots, number, of_scores)
            adding = start_output(operand, slots, number - 1, accumulator)
            present = present_keys(walk, number, index, BLOCK_SIZE, BLOCK_N)
            index = entry_of(walk, number + 1, BLOCK_SIZE, BLOCK_N)
            scores = warpgroup_mma_wait(1, deps=(multiplying,))
            mbarrier.arrive(slots.empty_keys.index(number % STAGES), count=1)
            weights, correction, row_max, row_sum = weigh(scores, present, scale_log2, row_max, row_sum)
            accumulator = warpgroup_mma_wait(0, deps=(adding,))
            mbarrier.arrive(slots.empty_values.index((number - 1) % STAGES), count=1)
            accumulator *= gl.convert_layout(correction, output_rows)[:, None]
            operand = gl.convert_layout(weights.to(dtype), of_weights)
        adding = start_output(operand, slots, walk.tiles - 1, accumulator)
        accumulator = warpgroup_mma_wait(0, deps=(adding,))

    row_sum = gl.convert_layout(row_sum, output_rows)
    row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)  # a row without any key: out 0, lse -inf
    row_lse = (gl.convert_layout(row_max, output_rows) + gl.log2(row_sum)) * LN_2
    normalised = (accumulator / row_sum[:, None]).to(out.pointer.dtype.element_ty)
    gl.store(row_pointers(out, tile.batch, rows, tile.head)[:, None] + columns, normalised, mask=exists[:, None])
    gl.store(lse_pointers(lse, tile.batch, tile.head, rows), row_lse, mask=exists)


@gluon.jit
def used_entries(lists, entries, blocks, CHUNK: gl.constexpr):
    """The number of leading entries of a list that reach up to its last valid index; for four warps."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    used = gl.zeros([CHUNK], gl.int32, layout)
    for first in range(0, entries, CHUNK):
        places = first + gl.arange(0, CHUNK, layout)
        index = gl.load(lists + places, mask=places < entries, other=-1)
        used = gl.where((index >= 0) & (index < blocks), places + 1, used)
    return gl.max(used, 0)


@gluon.jit
def mbarriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """An mbarrier [STAGES, 1] for each slot, whose phases end after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(barriers.index(slot), count=ARRIVALS)
    return barriers


# FLOPs, bytes and bound: those of attend_kernel.
@gluon.jit
def hopper_attend_kernel(
    q,  # Strided (B, Lq, H, D)
    keys,  # descriptor of the window (B, Hkv, Lk, D) or of the bank (B, Hkv, stored frames, frame_tokens, D)
    values,  # likewise
    frames,  # Frames of the bank; None: keys and values are a window
    indices,  # Strided (B, H, G, K) int32: the selection; None for a window
    resume,  # (out, lse) to continue, Strided (B, Lq, H, D) and (B, H, Lq) float32, or None: start afresh
    out,  # Strided (B, Lq, H, D)
    lse,  # Strided (B, H, Lq) float32, natural logarithm
    queries,
    window_keys,  # Lk
    query_group,
    entries,  # K
    softmax_scale,
    NEGATIVE_SCALE: gl.constexpr,
    HEADS_PER_KV_HEAD: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,  # None for a window
    STAGES: gl.constexpr,
):
    DIM: gl.constexpr = keys.block_type.shape[-1]
    BLOCK_N: gl.constexpr = keys.block_type.shape[-2]
    dtype: gl.constexpr = keys.dtype
    head = gl.program_id(1).to(gl.int64)
    tiles_per_group = gl.cdiv(query_group, WARPGROUPS * ROWS)
    group = gl.program_id(0) // tiles_per_group
    first = (gl.program_id(0) - group * tiles_per_group) * (WARPGROUPS * ROWS)
    tile = Tile(gl.program_id(2).to(gl.int64), head, head // HEADS_PER_KV_HEAD, group, first)

    of_queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, DIM], dtype)
    query_slots = gl.allocate_shared_memory(dtype, [WARPGROUPS, ROWS, DIM], of_queries)
    slots = Slots(  # Gluon has no starred items of a list.
        gl.allocate_shared_memory(dtype, [STAGES] + keys.block_type.shape, keys.layout),  # noqa: RUF005
        gl.allocate_shared_memory(dtype, [STAGES] + values.block_type.shape, values.layout),  # noqa: RUF005
        mbarriers(STAGES, 1),
        mbarriers(STAGES, 1),
        mbarriers(STAGES, WARPGROUPS),
        mbarriers(STAGES, WARPGROUPS),
    )
    loads: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    columns = gl.arange(0, DIM, gl.SliceLayout(0, loads))[None, :]
    for warpgroup in gl.static_range(WARPGROUPS):
        rows, exists = rows_of_warpgroup(tile, warpgroup, queries, query_group, gl.SliceLayout(1, loads))
        pointers = row_pointers(q, tile.batch, rows, tile.head)[:, None] + columns
        query = gl.load(pointers, mask=exists[:, None], other=0.0)
        if NEGATIVE_SCALE:
            query = -query
        query_slots.index(warpgroup).store(query)
    fence_async_shared()

    if BLOCK_SIZE is None:
        walk = Walk(gl.cdiv(window_keys, BLOCK_N), window_keys, None, None)
    else:
        lists = list_pointers(indices, tile.batch, tile.head, group)
        used = used_entries(lists, entries, frames.count * gl.cdiv(frames.tokens, BLOCK_SIZE), 128)
        walk = Walk(used * (BLOCK_SIZE // BLOCK_N), 0, lists, frames)
    # The softmax takes the maximum first, so its scale is above 0: the least for 0, and a sign went to the query.
    scale_log2 = gl.maximum(gl.abs(softmax_scale), 1.2e-38) * LOG2_E
    gl.warp_specialize(
        [
            (
                attend_rows,
                (0, query_slots, slots, walk, tile, resume, out, lse, queries, query_group, scale_log2, BLOCK_SIZE),
            ),
            (
                attend_rows,
                (1, query_slots, slots, walk, tile, resume, out, lse, queries, query_group, scale_log2, BLOCK_SIZE),
            ),
            (copy_tiles, (keys, values, slots, walk, tile, BLOCK_SIZE)),
        ],
        [4, 1],  # warps of the tasks but the first
        [240, 24],  # and their registers
    )
