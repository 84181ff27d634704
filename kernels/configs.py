"""Tile sizes and launch options of the kernels: one readable table per architecture. Nothing is tuned at import.

The figures of `make aot` (bench/results/aot.json) say what each row takes in registers and shared memory; `make
gpu-bench` times them.
"""

from collections.abc import Mapping
from functools import cache

import torch

from memflow_ops.kernels.integers import cdiv, next_power_of_2


def select_rows_config(
    dtype: torch.dtype, head_dim: int, groups: int, top_k: int
) -> tuple[dict[str, int | bool], dict[str, int]]:
    """ROWS, COLUMNS, DIM_TILE and TENSOR_CORES of select_rows_kernel, and its launch options.

    A tile holds 8192 scores. It has more columns where k is large: the k-th of few class maxima is a poor bound.
    """
    tensor_cores = dtype != torch.float32
    columns = min(max(next_power_of_2(2 * top_k), 64), 512)
    if tensor_cores:
        rows = min(8192 // columns, max(next_power_of_2(groups), 16))
        dim_tile = max(next_power_of_2(head_dim), 16)
    else:
        # 64 rows would become TF32 tensor-core products on sm_100, whatever the precision asked for.
        rows, dim_tile = min(8192 // columns, 32 if groups >= 1024 else 16), 16
    warps = 8 if rows >= 32 else 4
    return (
        dict(ROWS=rows, COLUMNS=columns, DIM_TILE=dim_tile, TENSOR_CORES=tensor_cores),
        dict(num_warps=warps, num_stages=2),
    )


SPAN_BLOCKS = 256
"""Blocks of the bank that one program of span_kernel ranks in registers."""


MERGE_LIMIT = 8192
"""The most candidates that one group may have in the last round: their keys fill the registers of a program."""


def span_config() -> tuple[dict[str, int], dict[str, int]]:
    """ROWS, COLUMNS and DIM_TILE of span_kernel and part_totals_kernel, and launch options. At most 32 rows: above."""
    return dict(ROWS=16, COLUMNS=SPAN_BLOCKS, DIM_TILE=16), dict(num_warps=8, num_stages=2)


def merge_config(candidates: int) -> tuple[dict[str, int], dict[str, int]] | None:
    """COLUMNS of merge_kernel, which merges so many candidates of a group, and its launch options; None: too many.

    A row that fits in one warp needs no barrier between the warps for each of its counts.
    """
    if candidates > MERGE_LIMIT:
        return None
    columns = max(next_power_of_2(candidates), 32)
    return dict(COLUMNS=columns), dict(num_warps=min(max(columns // 512, 1), 8), num_stages=1)


def capability_of(tensor: torch.Tensor) -> int:
    """The compute capability of the tensor's device: 90 for sm_90, also where there is no GPU to ask."""
    return _properties(tensor.device)[0] if tensor.is_cuda else 90


# attend_kernel in half precisions, on tensor cores: BLOCK_M, BLOCK_N, num_warps, num_stages by the largest head size.
# 4 warps do not hold the state of 128 rows in registers, and 128 keys do not fit beside it.
ATTEND_TILES = {
    80: {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    90: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (128, 64, 8, 2)},
    100: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    120: {64: (128, 64, 8, 3), 128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},  # 99 KB of shared memory, as sm_86 and sm_89
}
# The kernel of the forward pass by compute capability, for launches that both can do: "triton" is attend_kernel, and
# "gluon" is hopper_attend_kernel, which takes sm_90 and which no GPU has run.
FORWARD = {90: "triton"}
# hopper_attend_kernel: BLOCK_N and slots for tiles by head size. Shorter blocks have smaller tiles, and more of them.
HOPPER_TILES = {64: (128, 4), 128: (64, 4)}
# backward_queries_kernel: likewise.
BACKWARD_QUERIES_TILES = {
    80: {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
    90: {64: (128, 64, 8, 2), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
    100: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 1)},
    120: {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 8, 1)},
}
# backward_keys_kernel: BLOCK_N keys, whose gradients are the state, and BLOCK_M queries at a time.
BACKWARD_KEYS_TILES = {
    80: {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)},
    90: {64: (64, 128, 8, 3), 128: (64, 128, 8, 2), 256: (32, 64, 8, 2)},
    100: {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (32, 64, 8, 1)},
    120: {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (16, 32, 8, 1)},
}
# The same where a block has at most half of these BLOCK_N keys: 8 warps would hold everything twice.
BACKWARD_BLOCK_TILES = {
    80: {64: (32, 64, 4, 3), 128: (32, 64, 4, 2), 256: (32, 32, 4, 1)},
    90: {64: (64, 64, 4, 3), 128: (32, 64, 4, 3), 256: (32, 32, 4, 1)},
    100: {64: (64, 64, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 1)},
    120: {64: (64, 64, 4, 2), 128: (32, 64, 4, 2), 256: (32, 32, 4, 1)},
}


def attend_config(
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    query_group: int,
    queries: int,
    table: Mapping[int, Mapping[int, tuple[int, int, int, int]]] = ATTEND_TILES,
    int8_block: int | None = None,
) -> tuple[dict[str, int], dict[str, int], bool]:
    """BLOCK_M, BLOCK_N and DIM of attend_kernel, its launch options, and whether each row of a tile has its own blocks.

    Rows have blocks of their own where more than two groups fit in a tile; otherwise a tile is of one group. `table`:
    BACKWARD_QUERIES_TILES gives the sizes of backward_queries_kernel. int8_block: tokens per block of an int8
    bank, None for another: there a tile is of one block, whose mean and scale all of its keys share.
    """
    dim = dim_of(dtype, head_dim)
    if dtype == torch.float32:  # without tensor cores the operands, too, have to fit in registers
        tiles = (32, 16, 8, 3 if capability >= 90 and table is ATTEND_TILES else 2)
    else:
        tiles = _row(table, capability, head_dim)
    block_m, block_n, warps, stages = tiles
    by_row = 2 * query_group < block_m and query_group < queries
    if by_row and capability >= 100 and head_dim > 64 and table is BACKWARD_QUERIES_TILES:
        block_n = min(block_n, 32)  # the cursors of the rows do not fit in registers beside 64 keys
    if int8_block is not None:
        block_n = min(block_n, max(next_power_of_2(int8_block), 16))
        if dtype == torch.float32:
            block_m = 16
        elif head_dim > 64 and (by_row or capability < 90 or capability >= 120):
            # Nor do they fit beside 64 keys that are made from integers. Without the products of warpgroups and of
            # sm_100 every warp makes the numbers of all keys anew.
            block_n = min(block_n, 32)
    large = dim > 128 and dtype != torch.float32 and 90 <= capability < 100
    if by_row and large:
        # Cursors do not fit in registers beside the state of 128 rows.
        block_m, block_n = 64, min(block_n, 32)
    elif not by_row:
        block_m = min(block_m, max(next_power_of_2(query_group), 16))  # 16 rows at least for tensor cores
    if block_m <= 64 and (dim <= 128 or (large and table is ATTEND_TILES and not by_row)) and dtype != torch.float32:
        # Two groups of four warps would split the keys of so few rows, and ptxas serialises their products (C7515).
        # Other heads of 256 dimensions stay at 8 warps: 4 spill registers.
        warps = 4
        block_n = min(block_n, 32) if large else block_n
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, DIM=dim), dict(num_warps=warps, num_stages=stages), by_row


def hopper_config(capability: int, dtype: torch.dtype, head_dim: int, block_size: int | None) -> tuple[int, int] | None:
    """BLOCK_N and STAGES of hopper_attend_kernel; None: attend_kernel. block_size: of the bank, None for a window."""
    if FORWARD.get(capability) != "gluon" or dtype == torch.float32 or head_dim not in HOPPER_TILES:
        return None
    block_n, stages = HOPPER_TILES[head_dim]
    if block_size is not None:
        while block_n > 64 and block_size % block_n:
            block_n, stages = block_n // 2, stages * 2
        if block_size % block_n:
            return None
    return block_n, stages


SPLIT_ROWS = 128
"""Queries of a tile whose program fills a multiprocessor alone."""

SPLIT_SAVES_KEYS = 512
"""A split pays where it takes at least this many keys from the programs of the last wave: 64 keys for 128 queries take
0.6 us and more on sm_90, and merging about 4 us. This is an estimate; `make gpu-bench` times both ways."""

MAX_SPLITS = 8
"""The most programs per tile of the last wave; 1 turns the splitting off."""


def splits_config(tiles: int, keys: int, block_m: int, multiprocessors: int) -> tuple[int, int]:
    """How many of the tiles (of `keys` keys each) are not split, and how many programs each of the others gets.

    The tiles of a last, incomplete wave are split where two programs for each of them are still one wave.
    """
    last = tiles % multiprocessors if multiprocessors else 0
    splits = min(multiprocessors // last, MAX_SPLITS) if last else 1
    if block_m < SPLIT_ROWS or keys - cdiv(keys, splits) < SPLIT_SAVES_KEYS:
        return tiles, 1
    return tiles - last, splits


def multiprocessors_of(tensor: torch.Tensor) -> int:
    """The number of multiprocessors of the tensor's device; 0 where there is no GPU."""
    return _properties(tensor.device)[1] if tensor.is_cuda else 0


@cache
def _properties(device: torch.device) -> tuple[int, int]:
    """Compute capability and multiprocessors of a GPU, which every plan asks for."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def dim_of(dtype: torch.dtype, head_dim: int) -> int:
    """The head size rounded up to a power of two, at least 16. ValueError: the kernels do not take it or the dtype."""
    dim = max(next_power_of_2(head_dim), 16)
    if dtype not in (torch.float16, torch.bfloat16, torch.float32) or dim > 256:
        raise ValueError(
            f"the kernels take float16, bfloat16 and float32 and head sizes up to 256, got {dtype} and {head_dim}: "
            f"use impl='torch'"
        )
    return dim


def _row(
    table: Mapping[int, Mapping[int, tuple[int, int, int, int]]], capability: int, head_dim: int
) -> tuple[int, int, int, int]:
    """The sizes for a head size; an unknown architecture takes the row of the next lower one."""
    if capability not in table:
        capability = max((known for known in table if known <= capability), default=80)
    return next(tiles for size, tiles in table[capability].items() if head_dim <= size)


def backward_keys_config(
    capability: int, dtype: torch.dtype, head_dim: int, block_size: int | None, query_group: int
) -> tuple[dict[str, int | bool], dict[str, int]]:
    """BLOCK_M, BLOCK_N, DIM and PACKED of backward_keys_kernel, and its launch options.

    block_size: None for a dense segment, whose keys every query attended to; its blocks are the tiles.
    """
    dim = dim_of(dtype, head_dim)
    tiles = (16, 32, 8, 2) if dtype == torch.float32 else _row(BACKWARD_KEYS_TILES, capability, head_dim)
    if block_size is not None and dtype != torch.float32 and 2 * block_size <= tiles[1]:
        tiles = _row(BACKWARD_BLOCK_TILES, capability, head_dim)
    block_m, block_n, warps, stages = tiles
    packed = False
    if block_size is not None:
        block_n = min(block_n, max(next_power_of_2(block_size), 16))
        # Pack groups where tiles of one group each would be more than a quarter empty.
        packed = 4 * query_group < 3 * block_m * cdiv(query_group, block_m)
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, DIM=dim, PACKED=packed), dict(num_warps=warps, num_stages=stages)
