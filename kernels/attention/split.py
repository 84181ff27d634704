"""The tiles of the last wave are split along their keys among multiprocessors that would be idle, then merged.

444 tiles, one at a time on each of 132 multiprocessors, are 3.36 waves and take as long as 4. Two programs for each of
the last 48 tiles, with half of the keys each, make it 3.5 waves and a merge. Which tiles are split follows from shapes
alone, and partial results are merged in the order of their keys: the bits are the same from run to run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import LN_2, LOG2_E, cast, lse_pointers, row_pointers, strided


class PartialResults(NamedTuple):
    """What the programs of split tiles write, and which tiles are split."""

    out: Any
    """(split tiles * SPLITS, BLOCK_M, HEAD_DIM) float32, contiguous."""
    lse: Any
    """(split tiles * SPLITS, BLOCK_M) float32, natural logarithm, contiguous."""
    whole_tiles: Any
    """The number of tiles of all heads that are not split; they come first."""
    tiles: Any
    """The number of tiles of one head."""


@triton.jit
def rows_of_group(tile, first, queries, query_group, TILE: tl.constexpr, ROWS: tl.constexpr):
    """The group of a tile of TILE queries, its rows [ROWS] from row `first` on, and which of these rows exist.

    Each group begins with a tile of its own, because a group shares its selection.
    """
    tiles_per_group = tl.cdiv(query_group, TILE)
    group = tile // tiles_per_group
    offset = (tile - group * tiles_per_group) * TILE + first + tl.arange(0, ROWS)
    rows = group * query_group + offset
    return group, rows, (offset < query_group) & (rows < queries)


@triton.jit
def rows_of_tile(tile, queries, query_group, SHARED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The group of a tile of queries, its rows [BLOCK_M], and which of these rows exist.

    SHARED: all rows of a tile are of one group. Otherwise tiles go on across groups, and each row has its own group.
    """
    if SHARED:
        group, rows, row_mask = rows_of_group(tile, 0, queries, query_group, BLOCK_M, BLOCK_M)
    else:
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < queries
        group = rows // query_group
    return group, rows, row_mask


@triton.jit
def place_of_tile(number, tiles, heads):
    """Tile, head and batch element of a tile by its number: tiles of a head count first, then heads, as in a grid."""
    head = number // tiles
    return number % tiles, (head % heads).to(tl.int64), (head // heads).to(tl.int64)


@triton.jit
def tile_and_split(partial, heads, SPLITS: tl.constexpr):
    """The tile, head and batch element of this program, which part of the tile's keys it has, and of how many parts.

    The tiles that are not split have one program each and come first. Each of the others has SPLITS programs.
    """
    whole_tiles = partial.whole_tiles
    program = tl.program_id(0)
    late = tl.maximum(program - whole_tiles, 0)
    tile, head, batch = place_of_tile(tl.minimum(program, whole_tiles) + late // SPLITS, partial.tiles, heads)
    return tile, head, batch, late % SPLITS, tl.where(program < whole_tiles, 1, SPLITS)


# FLOPs: 2 * D per partial row. Bytes: the partial results once, out and lse of the split tiles.
@triton.jit
def merge_splits_kernel(
    partial,  # PartialResults
    out,  # Strided (B, Lq, H, D)
    lse,  # Strided (B, H, Lq) float32, natural logarithm
    queries,
    query_group,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    number = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    tile, head, batch = place_of_tile(partial.whole_tiles + number, partial.tiles, heads)
    _, rows, row_mask = rows_of_group(tile, first, queries, query_group, BLOCK_M, ROWS)
    columns = tl.arange(0, DIM)
    mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    partial_rows = number.to(tl.int64) * SPLITS * BLOCK_M + first + tl.arange(0, ROWS)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        row_max = tl.maximum(row_max, tl.load(partial.lse + partial_rows + split * BLOCK_M, mask=row_mask, other=0.0))
    reference = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, DIM], tl.float32)
    for split in tl.static_range(SPLITS):
        split_rows = partial_rows + split * BLOCK_M
        weight = tl.load(partial.lse + split_rows, mask=row_mask, other=0.0) - reference
        weight = tl.math.exp2(weight * LOG2_E)
        part = tl.load(partial.out + split_rows[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
        row_sum += weight
        accumulator += part * weight[:, None]
    # The result of a row without any key is out 0, lse -inf.
    row_sum_or_one = tl.where(row_sum == 0.0, 1.0, row_sum)
    normalised = accumulator / row_sum_or_one[:, None]
    rows = rows.to(tl.int64)
    out_rows = row_pointers(out, batch, rows, head)
    tl.store(out_rows[:, None] + columns[None, :], cast(normalised, out.pointer.dtype.element_ty), mask=mask)
    tl.store(lse_pointers(lse, batch, head, rows), row_max + tl.math.log2(row_sum_or_one) * LN_2, mask=row_mask)


def plan_merge_splits(
    out: torch.Tensor,
    lse: torch.Tensor,
    whole_tiles: int,
    tiles: int,
    splits: int,
    query_group: int,
    sizes: dict[str, int],
) -> tuple[Launch, PartialResults]:
    """The launch that merges partial results into out and lse, and the partial results, for attend_kernel to write.

    whole_tiles, tiles: see PartialResults; splits: programs per split tile; sizes: BLOCK_M and DIM of attend_kernel.
    """
    batch, queries, heads, head_dim = out.shape
    split_tiles, block_m = batch * heads * tiles - whole_tiles, sizes["BLOCK_M"]
    rows = min(block_m, 16)
    shape = (split_tiles * splits, block_m)
    partial = PartialResults(
        torch.empty((*shape, head_dim), dtype=torch.float32, device=out.device),
        torch.empty(shape, dtype=torch.float32, device=out.device),
        whole_tiles,
        tiles,
    )
    arguments = dict(
        partial=partial,
        out=strided(out),
        lse=strided(lse),
        queries=queries,
        query_group=query_group,
        heads=heads,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        DIM=sizes["DIM"],
        ROWS=rows,
        SPLITS=splits,
    )
    grid = (split_tiles, block_m // rows, 1)
    return Launch(merge_splits_kernel, grid, arguments, dict(num_warps=4, num_stages=1)), partial
