"""The last wave of tiles, split along their keys among multiprocessors that would be idle, and the launch to merge it.

444 tiles, one at a time on each of 132 multiprocessors, are 3.36 waves and take as long as 4. Two programs for each of
the last 48, with half of the keys each, make it 3.5 and the merge. Which tiles are split follows from shapes alone, and
what the programs found is merged in the order of their keys: the bits are the same from run to run.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import LN_2, LOG2_E, cast


@triton.jit
def rows_of_tile(tile, first, queries, query_group, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Group, rows [ROWS] from row `first` of a tile of TILE queries on, and which of them there are.

    A tile of queries belongs to one group, because a group shares its selection.
    """
    tiles_per_group = tl.cdiv(query_group, TILE)
    group = tile // tiles_per_group
    offset = (tile - group * tiles_per_group) * TILE + first + tl.arange(0, ROWS)
    rows = group * query_group + offset
    return group, rows, (offset < query_group) & (rows < queries)


@triton.jit
def place_of_tile(number, tiles, heads):
    """Tile, head and batch of the tile with this number; the tiles of a head lie side by side, as in a grid."""
    head = number // tiles
    return number % tiles, (head % heads).to(tl.int64), (head // heads).to(tl.int64)


@triton.jit
def tile_and_split(whole_tiles, tiles, heads, SPLITS: tl.constexpr):
    """What this program does: tile, head, batch, which part of the tile's keys, and of how many parts.

    One program for each of the first whole_tiles tiles, then SPLITS for each of the others.
    """
    program = tl.program_id(0)
    late = tl.maximum(program - whole_tiles, 0)
    tile, head, batch = place_of_tile(tl.minimum(program, whole_tiles) + late // SPLITS, tiles, heads)
    return tile, head, batch, late % SPLITS, tl.where(program < whole_tiles, 1, SPLITS)


# FLOPs: 2 * D per partial row. Bytes: the partial results once, out and lse of the split tiles.
@triton.jit
def merge_splits_kernel(
    partial_out,  # (split tiles * SPLITS, BLOCK_M, HEAD_DIM) float32, contiguous
    partial_lse,  # (split tiles * SPLITS, BLOCK_M) float32, natural logarithm, contiguous
    out,  # (B, Lq, H, D)
    lse,  # (B, H, Lq) float32
    out_strides,  # (B, L, H), in elements
    lse_strides,  # (B, H, L)
    queries,
    query_group,
    whole_tiles,
    tiles,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    number = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    tile, head, batch = place_of_tile(whole_tiles + number, tiles, heads)
    _, rows, row_mask = rows_of_tile(tile, first, queries, query_group, BLOCK_M, ROWS)
    columns = tl.arange(0, DIM)
    mask = row_mask[:, None] & (columns < HEAD_DIM)[None, :]
    partial_rows = number.to(tl.int64) * SPLITS * BLOCK_M + first + tl.arange(0, ROWS)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        row_max = tl.maximum(row_max, tl.load(partial_lse + partial_rows + split * BLOCK_M, mask=row_mask, other=0.0))
    reference = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, DIM], tl.float32)
    for split in tl.static_range(SPLITS):
        split_rows = partial_rows + split * BLOCK_M
        weight = tl.load(partial_lse + split_rows, mask=row_mask, other=0.0) - reference
        weight = tl.math.exp2(weight * LOG2_E)
        part = tl.load(partial_out + split_rows[:, None] * HEAD_DIM + columns[None, :], mask=mask, other=0.0)
        row_sum += weight
        accumulator += part * weight[:, None]
    # A row without any key: out 0, lse -inf.
    row_sum_or_one = tl.where(row_sum == 0.0, 1.0, row_sum)
    normalised = accumulator / row_sum_or_one[:, None]
    rows = rows.to(tl.int64)
    out_rows = out + batch * out_strides[0] + rows * out_strides[1] + head * out_strides[2]
    tl.store(out_rows[:, None] + columns[None, :], cast(normalised, out.dtype.element_ty), mask=mask)
    lse_rows = lse + batch * lse_strides[0] + head * lse_strides[1] + rows * lse_strides[2]
    tl.store(lse_rows, row_max + tl.math.log2(row_sum_or_one) * LN_2, mask=row_mask)


def plan_merge_splits(
    out: torch.Tensor,
    lse: torch.Tensor,
    whole_tiles: int,
    tiles: int,
    splits: int,
    query_group: int,
    sizes: dict[str, int],
) -> Launch:
    """The launch that merges the partial results, which attend_kernel writes where its arguments say, into out and lse.

    whole_tiles: how many tiles of all heads are not split; tiles: of one head; sizes: BLOCK_M and DIM of attend_kernel.
    """
    batch, queries, heads, head_dim = out.shape
    split_tiles, block_m = batch * heads * tiles - whole_tiles, sizes["BLOCK_M"]
    rows = min(block_m, 16)
    shape = (split_tiles * splits, block_m)
    arguments = dict(
        partial_out=torch.empty((*shape, head_dim), dtype=torch.float32, device=out.device),
        partial_lse=torch.empty(shape, dtype=torch.float32, device=out.device),
        out=out,
        lse=lse,
        out_strides=out.stride()[:3],
        lse_strides=lse.stride()[:3],
        queries=queries,
        query_group=query_group,
        whole_tiles=whole_tiles,
        tiles=tiles,
        heads=heads,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        DIM=sizes["DIM"],
        ROWS=rows,
        SPLITS=splits,
    )
    grid = (split_tiles, block_m // rows, 1)
    return Launch(merge_splits_kernel, grid, arguments, dict(num_warps=4, num_stages=1))
