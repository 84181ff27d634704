"""The cache write: one reading of the projections normalises, rotates and stores them in the pool.

The norm is over all heads of a token, so a program handles a few tokens of all heads: of q, of k, or of v. A mean is
over more tokens than that: programs write down the sums of their keys, and for variances their squared distances to the
mean of these, and a small second launch adds these up (cache_write_means.py).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import WriteTarget
from memflow_ops.kernels.cache_write_means import (
    Destinations,
    Sums,
    Tiling,
    heads_of_token,
    plan_means_of_sums,
)
from memflow_ops.kernels.integers import cdiv, next_power_of_2
from memflow_ops.kernels.launch import Launch, run_all
from memflow_ops.kernels.primitives import cast, mask_if, strided

TILE_TOKENS = 8
"""The most tokens that one program handles."""

TILE_ELEMENTS = 4096
"""Elements of the tokens that are in registers at a time: 80 registers on sm_90, three programs per multiprocessor."""


@triton.jit
def rms_normalise(x, weight, columns, eps, WIDTH: tl.constexpr):
    """x [ROWS, COLUMNS] float32 divided by its root mean square, times the weight (a pointer; None: x is returned)."""
    if weight is not None:
        scale = tl.load(weight + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None] * scale[None, :]
    return x


@triton.jit
def rotate_pairs(x, cosines, sines, row_mask, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """x [ROWS, COLUMNS] with its interleaved pairs rotated by the angles of their token.

    cosines, sines: pointers [ROWS] to HEAD_DIM / 2 numbers each.
    """
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    pairs = tl.arange(0, PAIRS)
    places = (pairs % (HEAD_DIM // 2))[None, :]
    mask = row_mask[:, None] & (2 * pairs < WIDTH)[None, :]
    c = tl.load(cosines[:, None] + places, mask=mask, other=0.0)
    s = tl.load(sines[:, None] + places, mask=mask, other=0.0)
    even, odd = tl.split(tl.reshape(x, [ROWS, PAIRS, 2]))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [ROWS, 2 * PAIRS])


class Rotation(NamedTuple):
    """The cosines and sines that rotate, as an argument."""

    cosines: Any
    """(1 or B, L, D / 2) float32, contiguous but for the first dimension."""
    sines: Any
    batch_stride: Any
    """Between batch elements, 0 where all share one."""


def rotation_of(cosines: torch.Tensor | None, sines: torch.Tensor | None) -> Rotation | None:
    """The argument tuple of cosines and sines (1 or B, L, D / 2), contiguous; None for None."""
    if cosines is None:
        return None
    return Rotation(cosines, sines, 0 if cosines.shape[0] == 1 else cosines.stride(0))


@triton.jit
def token_offsets(tokens, strides, columns, HEAD_DIM: tl.constexpr):
    """The offsets [ROWS, COLUMNS] of all heads of tokens [ROWS] in a tensor with strides (B, L, H)."""
    return tokens.to(tl.int64)[:, None] * strides[1] + heads_of_token(columns, strides[2], HEAD_DIM)[None, :]


@triton.jit
def normalise_and_rotate(
    x,  # Strided (B, L, H, D)
    batch,
    tokens,  # [ROWS]
    row_mask,
    weight,
    rotation,  # Rotation
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile [ROWS, COLUMNS] of all heads of the tokens in float32, before and after rotation; 0 where masked."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    columns = tl.arange(0, COLUMNS)
    offsets = token_offsets(tokens, x.strides, columns, HEAD_DIM)
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    tile = tl.load(x.pointer + batch * x.strides[0] + offsets, mask=mask, other=0.0).to(tl.float32)
    plain = rms_normalise(tile, weight, columns, eps, WIDTH)
    cosines = rotation.cosines + batch * rotation.batch_stride
    sines = rotation.sines + batch * rotation.batch_stride
    angles = tokens.to(tl.int64) * (HEAD_DIM // 2)
    return plain, rotate_pairs(plain, cosines + angles, sines + angles, row_mask, WIDTH, HEAD_DIM)


@triton.jit
def store_heads(
    x,  # Strided (B, L, H, D)
    batch,
    tokens,
    mask,
    tile,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store the tile [ROWS, COLUMNS], which has the dtype of x, at its tokens."""
    columns = tl.arange(0, tile.shape[1])
    pointers = x.pointer + batch * x.strides[0] + token_offsets(tokens, x.strides, columns, HEAD_DIM)
    tl.store(pointers, tile, mask=mask[:, None] & (columns < HEADS * HEAD_DIM)[None, :])


@triton.jit
def write_keys(
    k,  # Strided (B, L, Hkv, D)
    memory_k,  # Strided (B, P * T, Hkv, D)
    sums,  # Sums
    weight,
    rotation,
    tiling,
    frames,
    batch,
    frame,
    tile,
    first,  # tokens of the tile in the frame
    end,
    to,  # the first token of the place in the pool
    inside,  # whether there is such a place
    eps,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Normalise, rotate and store the keys of one tile, and write the sums that are wanted."""
    columns = tl.arange(0, COLUMNS)
    rotated_sum = tl.zeros([COLUMNS], tl.float32)
    plain_sum = tl.zeros([COLUMNS], tl.float32)
    # Distances to the tile's first token, so that little cancels where keys lie far from 0.
    origin = tl.zeros([COLUMNS], tl.float32)
    distance_sum = tl.zeros([COLUMNS], tl.float32)
    square_sum = tl.zeros([COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        plain, rotated = normalise_and_rotate(
            k, batch, frame * tiling.frame_tokens + rows, rows < end, weight, rotation, eps, KV_HEADS, HEAD_DIM, COLUMNS
        )
        stored = cast(rotated, memory_k.pointer.dtype.element_ty)
        store_heads(memory_k, batch, to + rows, mask_if(inside, rows < end), stored, KV_HEADS, HEAD_DIM)
        if sums.rotated is not None:
            rotated_sum += tl.sum(stored.to(tl.float32), 0)
        if sums.distances is not None:
            key = stored.to(tl.float32)
            origin = tl.where(start == first, tl.sum(tl.where((rows == first)[:, None], key, 0.0), 0), origin)
            distance = tl.where((rows < end)[:, None], key - origin[None, :], 0.0)
            distance_sum += tl.sum(distance, 0)
            square_sum += tl.sum(distance * distance, 0)
        if sums.plain is not None:
            plain_sum += tl.sum(plain, 0)
    mask = columns < KV_HEADS * HEAD_DIM
    if sums.rotated is not None:
        row = (batch * frames + frame) * tiling.tiles + tile
        tl.store(sums.rotated + row * (KV_HEADS * HEAD_DIM) + columns, rotated_sum, mask=mask)
        if sums.distances is not None:
            to_mean = square_sum - distance_sum * distance_sum / tl.maximum(end - first, 1).to(tl.float32)
            to_mean = tl.where(to_mean < 0.0, 0.0, to_mean)
            tl.store(sums.distances + row * (KV_HEADS * HEAD_DIM) + columns, to_mean, mask=mask)
    if sums.plain is not None:
        row = (batch * sums.mean_frames + frame) * tiling.tiles + tile
        mask = mask_if(frame < sums.mean_frames, mask)
        tl.store(sums.plain + row * (KV_HEADS * HEAD_DIM) + columns, plain_sum, mask=mask)


# FLOPs: about 12 per element. Bytes: q, k and v are read once and written once; cosines and sines, 4 D per token, are
# read twice (mostly from L2); where means are wanted an eighth of the keys is written in float32. Bound by memory.
@triton.jit
def write_projections_kernel(
    q,  # Strided (B, L, H, D)
    k,  # Strided (B, L, Hkv, D)
    v,  # Strided (B, L, Hkv, D)
    weight_q,  # (H * D,), or None: q and k are not normalised
    weight_k,  # (Hkv * D,)
    rotation,  # Rotation
    rotated_q,  # Strided (B, L, H, D)
    memory_rotation,  # Rotation, or None: there is no memory_q
    memory_q,  # Strided (B, L, H, D), or None
    memory_k,  # Strided (B, P * T, Hkv, D)
    memory_v,
    destinations,  # Destinations
    sums,  # Sums
    tiling,  # Tiling
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    Q_COLUMNS: tl.constexpr,
    KV_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
):
    frame = tl.program_id(0) // tiling.tiles
    tile = tl.program_id(0) % tiling.tiles
    which = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    unit = tile // tiling.tiles_per_unit
    first = unit * tiling.unit_tokens + tile % tiling.tiles_per_unit * TILE  # in the frame
    end = tl.minimum(tl.minimum((unit + 1) * tiling.unit_tokens, first + TILE), tiling.frame_tokens)
    if which == 0:
        for start in range(first, end, Q_ROWS):
            rows = start + tl.arange(0, Q_ROWS)
            tokens = frame * tiling.frame_tokens + rows
            plain, rotated = normalise_and_rotate(
                q, batch, tokens, rows < end, weight_q, rotation, eps, HEADS, HEAD_DIM, Q_COLUMNS
            )
            rotated = cast(rotated, rotated_q.pointer.dtype.element_ty)
            store_heads(rotated_q, batch, tokens, rows < end, rotated, HEADS, HEAD_DIM)
            if memory_q is not None:
                angles = batch * memory_rotation.batch_stride + tokens.to(tl.int64) * (HEAD_DIM // 2)
                rotated = rotate_pairs(
                    plain, memory_rotation.cosines + angles, memory_rotation.sines + angles, rows < end,
                    HEADS * HEAD_DIM, HEAD_DIM,
                )  # fmt: skip
                rotated = cast(rotated, memory_q.pointer.dtype.element_ty)
                store_heads(memory_q, batch, tokens, rows < end, rotated, HEADS, HEAD_DIM)
    else:
        place = tl.load(destinations.places + batch * destinations.place_stride + frame)
        inside = (place >= 0) & (place < destinations.pool_frames)
        to = place.to(tl.int64) * tiling.frame_tokens
        if which == 1:
            write_keys(
                k, memory_k, sums, weight_k, rotation, tiling, destinations.frames, batch, frame, tile, first, end, to,
                inside, eps, KV_HEADS, HEAD_DIM, KV_COLUMNS, KV_ROWS,
            )  # fmt: skip
        else:
            columns = tl.arange(0, KV_COLUMNS)
            for start in range(first, end, KV_ROWS):
                rows = start + tl.arange(0, KV_ROWS)
                offsets = token_offsets(frame * tiling.frame_tokens + rows, v.strides, columns, HEAD_DIM)
                mask = (rows < end)[:, None] & (columns < KV_HEADS * HEAD_DIM)[None, :]
                values = tl.load(v.pointer + batch * v.strides[0] + offsets, mask=mask_if(inside, mask))
                store_heads(memory_v, batch, to + rows, mask_if(inside, rows < end), values, KV_HEADS, HEAD_DIM)


def tiling_of(target: WriteTarget) -> tuple[Tiling, int]:
    """The argument tuple, and the number of tokens of a tile.

    Tiles lie within units, so that every mean is over whole tiles. A frame without means is one unit.
    """
    sizes = [(target.block_size, target.descriptors), (target.mean_size, target.means)]
    parts = [size for size, out in sizes if out is not None and size < target.frame_tokens]
    unit = math.gcd(*parts) or target.frame_tokens
    tile = min(TILE_TOKENS, next_power_of_2(unit))
    tiles_per_unit = cdiv(unit, tile)
    tiles = cdiv(target.frame_tokens, unit) * tiles_per_unit
    return Tiling(target.frame_tokens, unit, tiles_per_unit, tiles, tile), tile


def plan_write_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float],
    target: WriteTarget,
    memory_rotation: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    memory_q: torch.Tensor | None = None,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches of `write_projections`, in order, and the rotated q that they fill."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the kernels take float16, bfloat16 and float32, got {q.dtype}: use impl='torch'")
    tiling, tile = tiling_of(target)
    frames = length // target.frame_tokens
    columns = {n: max(next_power_of_2(n * head_dim), 16) for n in (heads, kv_heads)}
    rows = {n: max(1, min(tile, TILE_ELEMENTS // columns[n])) for n in columns}
    rotated_q = torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device)
    mean_frames = 0 if target.means is None else target.means.shape[1]
    rotated_sums, distances, plain_sums = (
        None if out is None else torch.empty((*shape, kv_heads * head_dim), dtype=torch.float32, device=q.device)
        for out, shape in (
            (target.descriptors, (batch, frames, tiling.tiles)),
            (target.descriptors if target.moments == 2 else None, (batch, frames, tiling.tiles)),
            (target.means, (batch, mean_frames, tiling.tiles)),
        )
    )
    sums = Sums(rotated_sums, distances, plain_sums, mean_frames)
    pool_frames = target.memory_k.shape[1] // target.frame_tokens
    destinations = Destinations(target.places, target.places.stride(0), frames, pool_frames)
    arguments = dict(
        q=strided(q),
        k=strided(k),
        v=strided(v),
        weight_q=norm[0],
        weight_k=norm[1],
        rotation=rotation_of(*rotation),
        rotated_q=strided(rotated_q),
        memory_rotation=rotation_of(*memory_rotation),
        memory_q=None if memory_q is None else strided(memory_q),
        memory_k=strided(target.memory_k),
        memory_v=strided(target.memory_v),
        destinations=destinations,
        sums=sums,
        tiling=tiling,
        eps=norm[2],
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        Q_COLUMNS=columns[heads],
        KV_COLUMNS=columns[kv_heads],
        TILE=tile,
        Q_ROWS=rows[heads],
        KV_ROWS=rows[kv_heads],
    )
    options = dict(num_warps=8 if max(columns.values()) <= TILE_ELEMENTS else 16, num_stages=2)
    launches = [Launch(write_projections_kernel, (frames * tiling.tiles, 3, batch), arguments, options)]
    if target.descriptors is not None or target.means is not None:
        launches.append(plan_means_of_sums(sums, destinations, tiling, target, batch, (kv_heads, head_dim)))
    return launches, rotated_q


def write_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float],
    target: WriteTarget,
    memory_rotation: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
    memory_q: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise, rotate and store the projections, see `memflow_ops.write_projections`. Returns the rotated q."""
    launches, rotated_q = plan_write_projections(q, k, v, rotation, norm, target, memory_rotation, memory_q)
    run_all(launches)
    return rotated_q
