"""The second launch of the cache write: block descriptors and frame means from the sums of tiles of keys.

The sums are an eighth of the size of the float32 keys, so this costs less than reading the keys again. For variances
there are also the squared distances of a tile's keys to their mean, which are combined with the distances between these
means (Chan, Golub and LeVeque, 1979). The order of every addition is fixed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import WriteTarget
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import cast, limited, mask_if


class Tiling(NamedTuple):
    """How the tokens of a frame are divided among programs, as an argument."""

    frame_tokens: Any
    unit_tokens: Any
    """A mean is over whole units, and no tile crosses their bounds."""
    tiles_per_unit: Any
    tiles: Any
    """Tiles of a frame."""
    tile_tokens: Any
    """The most tokens of a tile."""


class Destinations(NamedTuple):
    """Where frames go, as an argument."""

    places: Any
    """(B, F) int32: the place of each frame in the pool; it is not written if there is no such place."""
    place_stride: Any
    """Between batch elements."""
    frames: Any
    """F"""
    pool_frames: Any


class Sums(NamedTuple):
    """What the first kernel writes for the second: the sums of each tile's keys, as an argument."""

    rotated: Any
    """(B, F, tiles, Hkv * D) float32, contiguous, of the stored keys; None: no descriptors are wanted."""
    distances: Any
    """Like rotated: the sums of the stored keys' squared distances to their mean in the tile; None: no variances are
    wanted."""
    plain: Any
    """(B, M, tiles, Hkv * D) float32, contiguous, of the keys before rotation; None: no means are wanted."""
    mean_frames: Any
    """M"""


@triton.jit
def heads_of_token(columns, head_stride, HEAD_DIM: tl.constexpr):
    """The offsets [COLUMNS] of the elements of all heads in a token, head by head."""
    return (columns // HEAD_DIM).to(tl.int64) * head_stride + columns % HEAD_DIM


@triton.jit
def mean_of_sums(
    sums,  # pointer to the sums of a batch element and frame
    index,  # the number of the mean in its frame
    size,  # tokens of a mean
    columns,  # [COLUMNS]
    tiling,  # Tiling
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean [COLUMNS] of up to `size` tokens from the sums of their tiles."""
    tiles_of_mean = tl.cdiv(size, tiling.unit_tokens) * tiling.tiles_per_unit
    end = tl.minimum((index + 1) * tiles_of_mean, tiling.tiles)
    total = tl.zeros([columns.shape[0]], tl.float32)
    for start in range(index * tiles_of_mean, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        total += tl.sum(tl.load(sums + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0), 0)
    length = tl.minimum(size, tiling.frame_tokens - index * size)
    return tl.div_rn(total, tl.zeros([columns.shape[0]], tl.float32) + length.to(tl.float32))


@triton.jit
def variance_of_sums(
    sums,  # pointer to the sums of a batch element and frame
    distances,  # pointer to their tiles' squared distances
    mean,  # [COLUMNS] of all of them
    index,  # the number of the mean in its frame
    size,  # tokens of a mean
    columns,  # [COLUMNS]
    tiling,  # Tiling
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """The variance [COLUMNS] of up to `size` tokens: the distances in their tiles, and those of the tiles' means."""
    tiles_of_mean = tl.cdiv(size, tiling.unit_tokens) * tiling.tiles_per_unit
    end = tl.minimum((index + 1) * tiles_of_mean, tiling.tiles)
    total = tl.zeros([columns.shape[0]], tl.float32)
    for start in range(index * tiles_of_mean, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        unit = rows // tiling.tiles_per_unit
        first = unit * tiling.unit_tokens + rows % tiling.tiles_per_unit * tiling.tile_tokens
        last = tl.minimum(tl.minimum((unit + 1) * tiling.unit_tokens, first + tiling.tile_tokens), tiling.frame_tokens)
        mask = ((rows < end) & (first < last))[:, None] & (columns < WIDTH)[None, :]
        offsets = rows[:, None] * WIDTH + columns[None, :]
        tokens = tl.maximum(last - first, 1).to(tl.float32)[:, None]
        distance = tl.load(sums + offsets, mask=mask, other=0.0) / tokens - mean[None, :]
        within = tl.load(distances + offsets, mask=mask, other=0.0)
        total += tl.sum(tl.where(mask, within + tokens * distance * distance, 0.0), 0)
    length = tl.minimum(size, tiling.frame_tokens - index * size)
    return limited(total / length.to(tl.float32), LARGEST)


# FLOPs: one addition per element. Bytes: the sums once (from L2; with variances three times as much), each mean once.
@triton.jit
def means_of_sums_kernel(
    sums,  # Sums
    destinations,  # Destinations
    tiling,  # Tiling
    descriptors,  # (B, P * blocks, Hkv, D), (B, P * blocks, Hkv, 2 D) with variances, or None
    means,  # (B, M, n, Hkv, D) or None
    descriptor_strides,  # (B, block, Hkv), in elements
    mean_strides,  # (B, M, n, Hkv)
    block_size,
    blocks,  # of a frame
    mean_size,
    means_per_frame,  # n
    described,  # F * blocks, or 0: how many programs, the first ones, make descriptors; the others make means
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LARGEST: tl.constexpr,  # of the dtype of the descriptors: no variance is larger
):
    index = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    if index < described:
        if sums.rotated is not None:
            frame = index // blocks
            block = index % blocks
            place = tl.load(destinations.places + batch * destinations.place_stride + frame)
            inside = (place >= 0) & (place < destinations.pool_frames)
            frame_sums = sums.rotated + (batch * destinations.frames + frame) * tiling.tiles * WIDTH
            mean = mean_of_sums(frame_sums, block, block_size, columns, tiling, WIDTH, ROWS)
            row = batch * descriptor_strides[0] + (place.to(tl.int64) * blocks + block) * descriptor_strides[1]
            target = descriptors + row + heads_of_token(columns, descriptor_strides[2], HEAD_DIM)
            tl.store(target, cast(mean, descriptors.dtype.element_ty), mask=mask_if(inside, columns < WIDTH))
            if sums.distances is not None:
                frame_distances = sums.distances + (batch * destinations.frames + frame) * tiling.tiles * WIDTH
                variance = variance_of_sums(
                    frame_sums, frame_distances, mean, block, block_size, columns, tiling, WIDTH, ROWS, LARGEST
                )
                variance = cast(variance, descriptors.dtype.element_ty)
                tl.store(target + HEAD_DIM, variance, mask=mask_if(inside, columns < WIDTH))
    else:
        if sums.plain is not None:
            frame = (index - described) // means_per_frame
            part = (index - described) % means_per_frame
            frame_sums = sums.plain + (batch * sums.mean_frames + frame) * tiling.tiles * WIDTH
            mean = mean_of_sums(frame_sums, part, mean_size, columns, tiling, WIDTH, ROWS)
            row = batch * mean_strides[0] + frame.to(tl.int64) * mean_strides[1] + part.to(tl.int64) * mean_strides[2]
            target = means + row + heads_of_token(columns, mean_strides[3], HEAD_DIM)
            tl.store(target, cast(mean, means.dtype.element_ty), mask=columns < WIDTH)


def plan_means_of_sums(
    sums: Sums, destinations: Destinations, tiling: Tiling, target: WriteTarget, batch: int, shape: tuple[int, int]
) -> Launch:
    """The launch that makes descriptors and means from the sums. shape: key heads and head size."""
    descriptors, means = target.descriptors, target.means
    width = shape[0] * shape[1]
    blocks = cdiv(target.frame_tokens, target.block_size)
    described = 0 if descriptors is None else destinations.frames * blocks
    means_per_frame = 1 if means is None else means.shape[2]
    arguments = dict(
        sums=sums,
        destinations=destinations,
        tiling=tiling,
        descriptors=descriptors,
        means=means,
        descriptor_strides=(0, 0, 0) if descriptors is None else descriptors.stride()[:3],
        mean_strides=(0, 0, 0, 0) if means is None else means.stride()[:4],
        block_size=target.block_size,
        blocks=blocks,
        mean_size=target.mean_size,
        means_per_frame=means_per_frame,
        described=described,
        WIDTH=width,
        HEAD_DIM=shape[1],
        COLUMNS=128,
        ROWS=32,
        LARGEST=torch.finfo(target.memory_k.dtype).max,
    )
    grid = (described + sums.mean_frames * means_per_frame, cdiv(width, 128), batch)
    return Launch(means_of_sums_kernel, grid, arguments, dict(num_warps=4, num_stages=2))
