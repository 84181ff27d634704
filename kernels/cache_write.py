"""The cache write: one reading of the projections normalises, rotates and stores them in the pool.

The norm is over all heads of a token, so a program handles a few tokens of all heads: of q, of k, or of v. A mean is
over more tokens than that: programs write down the sums of their keys, and a small second launch adds these up. The
sums are an eighth of the size of the float32 keys, so this costs less than reading the keys again. The order of every
addition is fixed.
"""

import math

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import WriteTarget
from memflow_ops.kernels.launch import Launch, run_all
from memflow_ops.kernels.primitives import cast

TILE_TOKENS = 8
"""The most tokens that one program handles."""

TILE_ELEMENTS = 4096
"""Elements of the tokens that are in registers at a time: 80 registers on sm_90, three programs per multiprocessor."""


@triton.jit
def heads_of_token(columns, head_stride, HEAD_DIM: tl.constexpr):
    """The offsets [COLUMNS] of the elements of all heads in a token, head by head."""
    return (columns // HEAD_DIM).to(tl.int64) * head_stride + columns % HEAD_DIM


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


@triton.jit
def normalise_and_rotate(
    x,  # pointer to this batch element
    strides,  # of x (B, L, H)
    tokens,  # [ROWS]
    row_mask,
    weight,
    cosines,  # pointer to this batch element
    sines,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile [ROWS, COLUMNS] of all heads of the tokens in float32, before and after rotation; 0 where masked."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    columns = tl.arange(0, COLUMNS)
    offsets = tokens.to(tl.int64)[:, None] * strides[1] + heads_of_token(columns, strides[2], HEAD_DIM)[None, :]
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    tile = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    plain = rms_normalise(tile, weight, columns, eps, WIDTH)
    angles = tokens.to(tl.int64) * (HEAD_DIM // 2)
    return plain, rotate_pairs(plain, cosines + angles, sines + angles, row_mask, WIDTH, HEAD_DIM)


@triton.jit
def store_heads(
    x,  # pointer to this batch element
    strides,
    tokens,
    mask,
    tile,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store the tile [ROWS, COLUMNS], which has the dtype of x, at its tokens."""
    columns = tl.arange(0, tile.shape[1])
    offsets = tokens.to(tl.int64)[:, None] * strides[1] + heads_of_token(columns, strides[2], HEAD_DIM)[None, :]
    tl.store(x + offsets, tile, mask=mask[:, None] & (columns < HEADS * HEAD_DIM)[None, :])


# FLOPs: about 12 per element. Bytes: q, k and v are read once and written once; cosines and sines, 4 D per token, are
# read twice (mostly from L2); where means are wanted an eighth of the keys is written in float32. Bound by memory.
@triton.jit
def write_projections_kernel(
    q,  # (B, L, H, D)
    k,  # (B, L, Hkv, D)
    v,  # (B, L, Hkv, D)
    weight_q,  # (H * D,), or None: q and k are not normalised
    weight_k,  # (Hkv * D,)
    cosines,  # (1 or B, L, D / 2) float32
    sines,
    places,  # (B, F) int32
    rotated_q,  # (B, L, H, D)
    memory_k,  # (B, P * T, Hkv, D)
    memory_v,
    rotated_sums,  # (B, F, tiles, Hkv * D) float32, contiguous, or None
    plain_sums,  # (B, M, tiles, Hkv * D) float32, contiguous, or None
    q_strides,  # (B, L, H), in elements
    k_strides,
    v_strides,
    rotated_q_strides,
    memory_k_strides,
    memory_v_strides,
    rotation_stride,  # of cosines and sines between batch elements, 0 where all share one
    place_stride,  # of places between batch elements
    eps,
    frames,
    frame_tokens,
    pool_frames,
    mean_frames,  # M
    unit_tokens,  # a mean is over whole units, and no tile crosses their bounds
    tiles_per_unit,
    tiles,  # of a frame
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    Q_COLUMNS: tl.constexpr,
    KV_COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    KV_ROWS: tl.constexpr,
):
    frame = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    which = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    unit = tile // tiles_per_unit
    first = unit * unit_tokens + tile % tiles_per_unit * TILE  # in the frame
    end = tl.minimum(tl.minimum((unit + 1) * unit_tokens, first + TILE), frame_tokens)
    cosines += batch * rotation_stride
    sines += batch * rotation_stride
    if which == 0:
        for start in range(first, end, Q_ROWS):
            rows = start + tl.arange(0, Q_ROWS)
            tokens = frame * frame_tokens + rows
            _, rotated = normalise_and_rotate(
                q + batch * q_strides[0], q_strides, tokens, rows < end, weight_q, cosines, sines, eps,
                HEADS, HEAD_DIM, Q_COLUMNS,
            )  # fmt: skip
            out = rotated_q + batch * rotated_q_strides[0]
            rotated = cast(rotated, rotated_q.dtype.element_ty)
            store_heads(out, rotated_q_strides, tokens, rows < end, rotated, HEADS, HEAD_DIM)
    else:
        place = tl.load(places + batch * place_stride + frame)
        inside = (place >= 0) & (place < pool_frames)
        to = place.to(tl.int64) * frame_tokens
        if which == 1:
            columns = tl.arange(0, KV_COLUMNS)
            rotated_sum = tl.zeros([KV_COLUMNS], tl.float32)
            plain_sum = tl.zeros([KV_COLUMNS], tl.float32)
            for start in range(first, end, KV_ROWS):
                rows = start + tl.arange(0, KV_ROWS)
                plain, rotated = normalise_and_rotate(
                    k + batch * k_strides[0], k_strides, frame * frame_tokens + rows, rows < end, weight_k, cosines,
                    sines, eps, KV_HEADS, HEAD_DIM, KV_COLUMNS,
                )  # fmt: skip
                stored = cast(rotated, memory_k.dtype.element_ty)
                pool = memory_k + batch * memory_k_strides[0]
                store_heads(pool, memory_k_strides, to + rows, (rows < end) & inside, stored, KV_HEADS, HEAD_DIM)
                if rotated_sums is not None:
                    rotated_sum += tl.sum(stored.to(tl.float32), 0)
                if plain_sums is not None:
                    plain_sum += tl.sum(plain, 0)
            mask = columns < KV_HEADS * HEAD_DIM
            if rotated_sums is not None:
                row = (batch * frames + frame) * tiles + tile
                tl.store(rotated_sums + row * (KV_HEADS * HEAD_DIM) + columns, rotated_sum, mask=mask)
            if plain_sums is not None:
                row = (batch * mean_frames + frame) * tiles + tile
                mask = mask & (frame < mean_frames)
                tl.store(plain_sums + row * (KV_HEADS * HEAD_DIM) + columns, plain_sum, mask=mask)
        else:
            columns = tl.arange(0, KV_COLUMNS)
            for start in range(first, end, KV_ROWS):
                rows = start + tl.arange(0, KV_ROWS)
                tokens = (frame * frame_tokens + rows).to(tl.int64)
                offsets = tokens[:, None] * v_strides[1] + heads_of_token(columns, v_strides[2], HEAD_DIM)[None, :]
                mask = (rows < end)[:, None] & (columns < KV_HEADS * HEAD_DIM)[None, :]
                values = tl.load(v + batch * v_strides[0] + offsets, mask=mask & inside)
                pool = memory_v + batch * memory_v_strides[0]
                store_heads(pool, memory_v_strides, to + rows, (rows < end) & inside, values, KV_HEADS, HEAD_DIM)


@triton.jit
def mean_of_sums(
    sums,  # pointer to this batch element and frame
    index,  # the number of the mean in its frame
    size,  # tokens of a mean
    columns,  # [COLUMNS]
    frame_tokens,
    unit_tokens,
    tiles_per_unit,
    tiles,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean [COLUMNS] of up to `size` tokens from the sums of their tiles."""
    tiles_of_mean = tl.cdiv(size, unit_tokens) * tiles_per_unit
    end = tl.minimum((index + 1) * tiles_of_mean, tiles)
    total = tl.zeros([columns.shape[0]], tl.float32)
    for start in range(index * tiles_of_mean, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & (columns < WIDTH)[None, :]
        total += tl.sum(tl.load(sums + rows[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0), 0)
    length = tl.minimum(size, frame_tokens - index * size)
    return tl.div_rn(total, tl.zeros([columns.shape[0]], tl.float32) + length.to(tl.float32))


# FLOPs: one addition per element. Bytes: the sums once (from L2), each mean once.
@triton.jit
def means_of_sums_kernel(
    rotated_sums,  # (B, F, tiles, Hkv * D) float32, contiguous, or None
    plain_sums,  # (B, M, tiles, Hkv * D) float32, contiguous, or None
    places,  # (B, F) int32
    descriptors,  # (B, P * blocks, Hkv, D) or None
    means,  # (B, M, n, Hkv, D) or None
    descriptor_strides,  # (B, block, Hkv), in elements
    mean_strides,  # (B, M, n, Hkv)
    place_stride,
    frames,
    frame_tokens,
    pool_frames,
    mean_frames,  # M
    unit_tokens,
    tiles_per_unit,
    tiles,
    block_size,
    blocks,  # of a frame
    mean_size,
    means_per_frame,  # n
    described,  # F * blocks, or 0: how many programs, the first ones, make descriptors; the others make means
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    index = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    if index < described:
        if rotated_sums is not None:
            frame = index // blocks
            block = index % blocks
            place = tl.load(places + batch * place_stride + frame)
            inside = (place >= 0) & (place < pool_frames)
            sums = rotated_sums + (batch * frames + frame) * tiles * WIDTH
            mean = mean_of_sums(
                sums, block, block_size, columns, frame_tokens, unit_tokens, tiles_per_unit, tiles, WIDTH, ROWS
            )
            row = batch * descriptor_strides[0] + (place.to(tl.int64) * blocks + block) * descriptor_strides[1]
            target = descriptors + row + heads_of_token(columns, descriptor_strides[2], HEAD_DIM)
            tl.store(target, cast(mean, descriptors.dtype.element_ty), mask=(columns < WIDTH) & inside)
    else:
        if plain_sums is not None:
            frame = (index - described) // means_per_frame
            part = (index - described) % means_per_frame
            sums = plain_sums + (batch * mean_frames + frame) * tiles * WIDTH
            mean = mean_of_sums(
                sums, part, mean_size, columns, frame_tokens, unit_tokens, tiles_per_unit, tiles, WIDTH, ROWS
            )
            row = batch * mean_strides[0] + frame.to(tl.int64) * mean_strides[1] + part.to(tl.int64) * mean_strides[2]
            target = means + row + heads_of_token(columns, mean_strides[3], HEAD_DIM)
            tl.store(target, cast(mean, means.dtype.element_ty), mask=columns < WIDTH)


def plan_write_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    memory_k: torch.Tensor,
    memory_v: torch.Tensor,
    places: torch.Tensor,
    weight_q: torch.Tensor | None,
    weight_k: torch.Tensor | None,
    descriptors: torch.Tensor | None,
    means: torch.Tensor | None,
    *,
    frame_tokens: int,
    block_size: int,
    mean_size: int,
    eps: float,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches of `write_projections`, in order, and the rotated q that they fill."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the kernels take float16, bfloat16 and float32, got {q.dtype}: use impl='torch'")
    frames = length // frame_tokens
    # Tiles lie within units, so that every mean is over whole tiles. A frame without means is one unit.
    sizes = [size for size, out in ((block_size, descriptors), (mean_size, means)) if out is not None]
    unit = math.gcd(*(size for size in sizes if size < frame_tokens)) or frame_tokens
    tile = min(TILE_TOKENS, triton.next_power_of_2(unit))
    tiles_per_unit = triton.cdiv(unit, tile)
    tiles = triton.cdiv(frame_tokens, unit) * tiles_per_unit
    columns = {n: max(triton.next_power_of_2(n * head_dim), 16) for n in (heads, kv_heads)}
    rows = {n: max(1, min(tile, TILE_ELEMENTS // columns[n])) for n in columns}
    rotated_q = torch.empty((batch, length, heads, head_dim), dtype=q.dtype, device=q.device)
    mean_frames = 0 if means is None else means.shape[1]
    rotated_sums, plain_sums = (
        None if out is None else torch.empty((batch, count, tiles, kv_heads * head_dim), device=q.device)
        for out, count in ((descriptors, frames), (means, mean_frames))
    )
    shared = dict(
        places=places,
        rotated_sums=rotated_sums,
        plain_sums=plain_sums,
        place_stride=places.stride(0),
        frames=frames,
        frame_tokens=frame_tokens,
        pool_frames=memory_k.shape[1] // frame_tokens,
        mean_frames=mean_frames,
        unit_tokens=unit,
        tiles_per_unit=tiles_per_unit,
        tiles=tiles,
        HEAD_DIM=head_dim,
    )
    strides = {
        f"{name}_strides": x.stride()[:3]
        for name, x in dict(q=q, k=k, v=v, rotated_q=rotated_q, memory_k=memory_k, memory_v=memory_v).items()
    }
    arguments = dict(
        **shared,
        **strides,
        q=q,
        k=k,
        v=v,
        weight_q=weight_q,
        weight_k=weight_k,
        cosines=cosines,
        sines=sines,
        rotated_q=rotated_q,
        memory_k=memory_k,
        memory_v=memory_v,
        rotation_stride=0 if cosines.shape[0] == 1 else cosines.stride(0),
        eps=eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        Q_COLUMNS=columns[heads],
        KV_COLUMNS=columns[kv_heads],
        TILE=tile,
        Q_ROWS=rows[heads],
        KV_ROWS=rows[kv_heads],
    )
    options = dict(num_warps=8 if max(columns.values()) <= TILE_ELEMENTS else 16, num_stages=2)
    launches = [Launch(write_projections_kernel, (frames * tiles, 3, batch), arguments, options)]
    if descriptors is not None or means is not None:
        launches.append(_plan_means(shared, descriptors, means, block_size, mean_size, kv_heads, batch))
    return launches, rotated_q


def _plan_means(
    shared: dict,
    descriptors: torch.Tensor | None,
    means: torch.Tensor | None,
    block_size: int,
    mean_size: int,
    kv_heads: int,
    batch: int,
) -> Launch:
    """The launch that makes descriptors and means from the sums. shared: the arguments that both launches have."""
    width = kv_heads * shared["HEAD_DIM"]
    blocks = triton.cdiv(shared["frame_tokens"], block_size)
    described = 0 if descriptors is None else shared["frames"] * blocks
    means_per_frame = 1 if means is None else means.shape[2]
    arguments = dict(
        **shared,
        descriptors=descriptors,
        means=means,
        descriptor_strides=(0, 0, 0) if descriptors is None else descriptors.stride()[:3],
        mean_strides=(0, 0, 0, 0) if means is None else means.stride()[:4],
        block_size=block_size,
        blocks=blocks,
        mean_size=mean_size,
        means_per_frame=means_per_frame,
        described=described,
        WIDTH=width,
        COLUMNS=128,
        ROWS=32,
    )
    grid = (described + shared["mean_frames"] * means_per_frame, triton.cdiv(width, 128), batch)
    return Launch(means_of_sums_kernel, grid, arguments, dict(num_warps=4, num_stages=2))


def write_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    norm: tuple[torch.Tensor | None, torch.Tensor | None, float],
    target: WriteTarget,
) -> torch.Tensor:
    """Normalise, rotate and store the projections, see `memflow_ops.write_projections`. Returns the rotated q."""
    weight_q, weight_k, eps = norm
    written = (target.memory_k, target.memory_v, target.places, weight_q, weight_k, target.descriptors, target.means)
    sizes = dict(frame_tokens=target.frame_tokens, block_size=target.block_size, mean_size=target.mean_size)
    launches, rotated_q = plan_write_projections(q, k, v, *rotation, *written, **sizes, eps=eps)
    run_all(launches)
    return rotated_q
