"""The relevance of every frame of the history to the prompt, over all layers in one or two launches.

A sum over layers and heads is the inner dimension of one matrix product. It is split into as many parts as fill the
device; the product of each part goes to memory, and the next kernel adds the parts up in order. The candidates may be
any rows of the stored means: they are not gathered first.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.integers import cdiv, next_power_of_2
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import LOG2_E, load_rows, matmul
from memflow_ops.kernels.selection.scores import score_tile

HIGHEST = tl.constexpr(3.4028234663852886e38)

PROGRAMS = 264
"""How many programs a product is split into: two per multiprocessor of an H100."""


@triton.jit
def finite(x):
    """x with NaN as the lowest finite number and infinities as the finite numbers next to them; -inf means "taken"."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -HIGHEST), HIGHEST), -HIGHEST)


@triton.jit
def clamped_length(lengths, batch, least, most):
    """The number of text tokens that are not padding, clamped to least..most; `most` where lengths is None."""
    length = most
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + batch), least), most)
    return length


@triton.jit
def row_of_frame(rows, frame, mask, stored):
    """The row of the stored means that a candidate is: by the table of this batch element (clamped), or its number."""
    row = frame
    if rows is not None:
        row = tl.minimum(tl.maximum(tl.load(rows + frame, mask=mask, other=0), 0), stored - 1)
    return row.to(tl.int64)


# FLOPs: one addition per element. Bytes: the text keys once; bound by memory.
@triton.jit
def text_mean_kernel(
    text,  # (layers, B, Lt, H, D)
    lengths,  # (B,) int32 or None
    means,  # (layers, B, Hkv, D) float32, contiguous
    text_strides,  # (layers, B, Lt, H), in elements
    words,  # Lt
    GROUP: tl.constexpr,  # H / Hkv
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The mean text key over the prompt's tokens and the heads that share a key head."""
    head = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    length = clamped_length(lengths, batch, 1, words)
    columns = tl.arange(0, COLUMNS)
    text += layer * text_strides[0] + batch * text_strides[1] + (head * GROUP).to(tl.int64) * text_strides[3]
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, length, ROWS):
        rows = start + tl.arange(0, ROWS)
        for shared in range(GROUP):
            pointers = text + rows.to(tl.int64) * text_strides[2] + shared * text_strides[3]
            total += tl.sum(load_rows(pointers, rows < length, columns, HEAD_DIM).to(tl.float32), 0)
    target = ((layer * tl.num_programs(2) + batch) * tl.num_programs(0) + head) * HEAD_DIM
    tl.store(means + target + columns, total / (length * GROUP), mask=columns < HEAD_DIM)


@triton.jit
def averaged_rows(pointers, mask, part_stride, weights, dims, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr):
    """The tile [ROWS, DIMS] of rows that consist of PARTS parts: the mean of these by weights (None: equal ones)."""
    if PARTS == 1:
        tile = load_rows(pointers, mask, dims, HEAD_DIM)
    else:
        tile = tl.zeros([pointers.shape[0], dims.shape[0]], tl.float32)
        for part in range(PARTS):
            weight = 1.0 / PARTS
            if weights is not None:
                weight = tl.load(weights + part)
            tile += weight * load_rows(pointers + part * part_stride, mask, dims, HEAD_DIM).to(tl.float32)
    return tile


# FLOPs: 2 * M * F * layers * Hkv * D. Bytes: each side once per tile of the other (from L2), a float32 per product and
# split. Half precisions with one part on both sides are multiplied on tensor cores, where their products are exact.
@triton.jit(do_not_specialize=["left_count", "right_count"])
def products_kernel(
    left,  # (layers, B, rows, parts, Hkv, D)
    right,  # (layers, B, rows, parts, Hkv, D)
    left_rows,  # (B, M) int32, which rows, or None: the first M
    right_rows,  # (B, F) int32 or None
    left_lengths,  # (B,) int32: how many of the M rows are wanted; or None: all
    right_weights,  # (parts,) float32, of the parts of both sides where both are means
    products,  # (splits, B, M, F) float32, contiguous
    left_strides,  # (layers, B, rows, parts, Hkv), in elements
    right_strides,
    left_count,  # M
    right_count,  # F
    left_stored,
    right_stored,
    layers,
    layers_per_split,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    LEFT_PARTS: tl.constexpr,
    RIGHT_PARTS: tl.constexpr,
    LEFT_MEANS: tl.constexpr,  # the parts of the left side are weighted like those of the right
    TENSOR_CORES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    column_tiles = tl.cdiv(right_count, COLUMNS)
    rows = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    row_mask = rows < clamped_length(left_lengths, batch, 0, left_count)
    column_mask = columns < right_count
    if left_rows is not None:
        left_rows += batch * left_count
    if right_rows is not None:
        right_rows += batch * right_count
    left += batch * left_strides[1] + row_of_frame(left_rows, rows, row_mask, left_stored) * left_strides[2]
    right += batch * right_strides[1] + row_of_frame(right_rows, columns, column_mask, right_stored) * right_strides[2]
    left_weights = None
    if LEFT_MEANS:
        left_weights = right_weights
    first = split * layers_per_split
    end = tl.minimum(first + layers_per_split, layers)
    if tl.max(row_mask.to(tl.int32), 0) == 0:  # all rows are padding
        end = first
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(first * HEADS, end * HEADS):
        layer = (tl.zeros([], tl.int64) + step) // HEADS
        head = (tl.zeros([], tl.int64) + step) % HEADS
        a = left + layer * left_strides[0] + head * left_strides[4]
        b = right + layer * right_strides[0] + head * right_strides[4]
        for start in range(0, HEAD_DIM, DIM_TILE):
            dims = start + tl.arange(0, DIM_TILE)
            x = averaged_rows(a, row_mask, left_strides[3], left_weights, dims, HEAD_DIM, LEFT_PARTS)
            y = averaged_rows(b, column_mask, right_strides[3], right_weights, dims, HEAD_DIM, RIGHT_PARTS)
            if TENSOR_CORES:
                total = matmul(x, tl.trans(y), total)
            else:
                total = tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), total, input_precision="ieee")
    target = (split * tl.num_programs(2) + batch) * left_count + rows
    mask = (rows < left_count)[:, None] & column_mask[None, :]
    tl.store(products + target[:, None] * right_count + columns[None, :], total, mask=mask)


@triton.jit
def column_pointers(means, strides, layer, batch, head, rows, frames, parts, mask, stored):
    """Pointers [COLUMNS] to the means of parts [COLUMNS] of frames [COLUMNS]."""
    row = row_of_frame(rows, frames, mask, stored)
    base = means + layer * strides[0] + batch * strides[1] + head * strides[4]
    return base + row * strides[2] + parts.to(tl.int64) * strides[3]


@triton.jit
def add_to_sum(scores, row_max, row_sum):
    """One step of the log-sum-exp, in base 2, of rows whose scores [ROWS, COLUMNS] arrive in tiles with a key each."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    return new_max, row_sum * tl.math.exp2(row_max - new_max) + tl.sum(tl.math.exp2(scores - new_max[:, None]), 1)


# FLOPs: 2 * valid words * F * n * D per layer and head. Bytes: a float32 per word and head; the rest is in L2.
@triton.jit(do_not_specialize=["frames"])
def word_lse_kernel(
    text,  # (layers, B, Lt, H, D)
    means,  # (layers, B, R, n, Hkv, D)
    rows,  # (B, F) int32 or None
    lengths,  # (B,) int32 or None
    weights,  # (n,) float32: tokens of each part
    lse,  # (layers * H, B, Lt) float32, contiguous, base 2
    text_strides,  # (layers, B, Lt, H), in elements
    mean_strides,  # (layers, B, R, n, Hkv)
    scale,
    words,
    frames,
    stored,
    parts,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """The log-sum-exp of each word's scores over the parts of all candidates."""
    layer = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    length = clamped_length(lengths, batch, 1, words)
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    text_rows = text + layer * text_strides[0] + batch * text_strides[1] + head * text_strides[3]
    text_rows += tokens.to(tl.int64) * text_strides[2]
    query = None
    if TENSOR_CORES:
        query = load_rows(text_rows, tokens < length, tl.arange(0, DIM_TILE), HEAD_DIM)
    if rows is not None:
        rows += batch * frames
    count = tl.where(tl.program_id(0) * ROWS < length, frames * parts, 0)  # a tile of padding has nothing to do
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for start in range(0, count, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        valid = columns < count
        frame, part = columns // parts, columns % parts
        pointers = column_pointers(means, mean_strides, layer, batch, head // GROUP, rows, frame, part, valid, stored)
        scores = score_tile(
            query, text_rows, tokens < length, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE
        )  # [ROWS, COLUMNS]
        bias = tl.log2(tl.load(weights + part))
        scores = tl.where(valid[None, :], scores * (scale * LOG2_E) + bias[None, :], float("-inf"))
        row_max, row_sum = add_to_sum(scores, row_max, row_sum)
    target = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch) * words + tokens
    tl.store(lse + target, row_max + tl.log2(row_sum), mask=tokens < length)


# FLOPs: as word_lse_kernel. Bytes: a float32 per frame and head; the rest is in L2.
@triton.jit(do_not_specialize=["frames"])
def frame_mass_kernel(
    text,  # (layers, B, Lt, H, D)
    means,  # (layers, B, R, n, Hkv, D)
    rows,  # (B, F) int32 or None
    lengths,  # (B,) int32 or None
    weights,  # (n,) float32: tokens of each part
    lse,  # (layers * H, B, Lt) float32, contiguous, base 2
    mass,  # (layers * H, B, 1, F) float32, contiguous
    text_strides,  # (layers, B, Lt, H), in elements
    mean_strides,  # (layers, B, R, n, Hkv)
    scale,
    words,
    frames,
    stored,
    parts,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
    ROWS: tl.constexpr,
    FRAMES: tl.constexpr,  # frames of a program
    PARTS: tl.constexpr,  # parts of a frame at a time
    DIM_TILE: tl.constexpr,
):
    """The share of each frame in the softmax of every word, averaged over the words."""
    COLUMNS: tl.constexpr = FRAMES * PARTS
    layer = (tl.program_id(1) // HEADS).to(tl.int64)
    head = (tl.program_id(1) % HEADS).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    length = clamped_length(lengths, batch, 1, words)
    text += layer * text_strides[0] + batch * text_strides[1] + head * text_strides[3]
    if rows is not None:
        rows += batch * frames
    lse += (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch) * words
    columns = tl.arange(0, COLUMNS)
    frame = tl.program_id(0) * FRAMES + columns // PARTS
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(0, parts, PARTS):
        part = first + columns % PARTS
        valid = (frame < frames) & (part < parts)
        pointers = column_pointers(means, mean_strides, layer, batch, head // GROUP, rows, frame, part, valid, stored)
        bias = tl.log2(tl.load(weights + part, mask=valid, other=1.0))
        for start in range(0, length, ROWS):
            tokens = start + tl.arange(0, ROWS)
            text_rows = text + tokens.to(tl.int64) * text_strides[2]
            query = None
            if TENSOR_CORES:
                query = load_rows(text_rows, tokens < length, tl.arange(0, DIM_TILE), HEAD_DIM)
            scores = score_tile(query, text_rows, tokens < length, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
            normaliser = tl.load(lse + tokens, mask=tokens < length, other=0.0)
            weight = tl.math.exp2(scores * (scale * LOG2_E) + bias[None, :] - normaliser[:, None])
            total += tl.sum(tl.where((tokens < length)[:, None] & valid[None, :], weight, 0.0), 0)
    share = tl.sum(tl.reshape(total, [FRAMES, PARTS]), 1) / length
    frame = tl.program_id(0) * FRAMES + tl.arange(0, FRAMES)
    target = (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + batch) * frames + frame
    tl.store(mass + target, share, mask=frame < frames)


@triton.jit
def summed(partials, offsets, mask, split_stride, splits):
    """The sum over all splits of the numbers at `offsets`, added in order."""
    total = tl.zeros(offsets.shape, tl.float32)
    for _ in range(splits):
        total += tl.load(partials + offsets, mask=mask, other=0.0)
        partials += split_stride
    return total


# FLOPs: one addition per partial score. Bytes: the partial scores once.
@triton.jit(do_not_specialize=["frames", "splits"])
def sum_scores_kernel(
    partials,  # (splits, B, 1, F) float32, contiguous
    scores,  # (B, F) float32, contiguous
    factor,
    frames,
    splits,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(1).to(tl.int64)
    offsets = batch * frames + columns
    total = summed(partials, offsets, columns < frames, tl.num_programs(1) * frames, splits)
    tl.store(scores + offsets, finite(total * factor), mask=columns < frames)


# FLOPs: a softmax per word. Bytes: the products of every split once, the shares once.
@triton.jit(do_not_specialize=["frames", "splits"])
def word_shares_kernel(
    products,  # (splits, B, Lt, F) float32, contiguous
    lengths,  # (B,) int32 or None
    shares,  # (B, Lt, F) float32, contiguous
    factor,
    words,
    frames,
    splits,
    COLUMNS: tl.constexpr,
):
    """Share out each word over the frames by a softmax of its products. Rows of padding are not written."""
    word = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row = (batch * words + word) * frames
    split_stride = tl.num_programs(1).to(tl.int64) * words * frames
    count = tl.where(word < clamped_length(lengths, batch, 0, words), frames, 0)
    columns = tl.arange(0, COLUMNS)
    highest = -HIGHEST
    for start in range(0, count, COLUMNS):
        mask = start + columns < count
        logits = finite(summed(products, row + start + columns, mask, split_stride, splits) * factor)
        highest = tl.maximum(highest, tl.max(tl.where(mask, logits, -HIGHEST), 0))
    total = 0.0
    for start in range(0, count, COLUMNS):
        mask = start + columns < count
        logits = finite(summed(products, row + start + columns, mask, split_stride, splits) * factor)
        total += tl.sum(tl.where(mask, tl.exp(logits - highest), 0.0), 0)
    for start in range(0, count, COLUMNS):
        mask = start + columns < count
        logits = finite(summed(products, row + start + columns, mask, split_stride, splits) * factor)
        tl.store(shares + row + start + columns, tl.exp(logits - highest) / total, mask=mask)


class Allocate:
    """Makes empty tensors on one device, float32 by default."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def plan_text_means(text: torch.Tensor, lengths: torch.Tensor | None, text_means: torch.Tensor) -> Launch:
    """The launch that fills text_means (layers, B, Hkv, D) from text (layers, B, Lt, H, D)."""
    layers, batch, kv_heads, head_dim = text_means.shape
    columns = max(next_power_of_2(head_dim), 16)
    arguments = dict(
        text=text, lengths=lengths, means=text_means, text_strides=text.stride()[:4], words=text.shape[2],
        GROUP=text.shape[3] // kv_heads, HEAD_DIM=head_dim, ROWS=8192 // columns, COLUMNS=columns,
    )  # fmt: skip
    return Launch(text_mean_kernel, (kv_heads, layers, batch), arguments, dict(num_warps=4, num_stages=2))


def _product_config(exact: bool, rows: int, head_dim: int) -> dict[str, int | bool]:
    """ROWS, COLUMNS, DIM_TILE and TENSOR_CORES. IEEE products of 64 rows of float32 would become TF32 on sm_100."""
    if exact:
        dim = max(next_power_of_2(head_dim), 16)
        return dict(ROWS=64 if rows > 16 else 16, COLUMNS=64, DIM_TILE=dim, TENSOR_CORES=True)
    return dict(ROWS=32 if rows > 16 else 16, COLUMNS=64, DIM_TILE=16, TENSOR_CORES=False)


def _exact_products(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether tensor cores multiply both sides without rounding: both are stored in one half precision."""
    return left.dtype == right.dtype and left.dtype in (torch.float16, torch.bfloat16)


def plan_products(
    new: Allocate,
    *,
    left: torch.Tensor,
    left_count: int,
    right: torch.Tensor,
    right_count: int,
    right_rows: torch.Tensor | None,
    right_weights: torch.Tensor,
    left_rows: torch.Tensor | None = None,
    left_lengths: torch.Tensor | None = None,
    left_means: bool = False,
) -> tuple[Launch, torch.Tensor]:
    """The launch that fills products (splits, B, M, F) of rows of left and right, and the products.

    left, right (layers, B, rows, parts, Hkv, D). The sum over splits is the product over all layers and heads.
    """
    layers, batch, _, left_parts, heads, head_dim = left.shape
    right_parts = right.shape[3]
    exact = _exact_products(left, right) and left_parts == right_parts == 1
    config = _product_config(exact, left_count, head_dim)
    tiles = cdiv(left_count, config["ROWS"]) * cdiv(right_count, config["COLUMNS"])
    layers_per_split = cdiv(layers, min(layers, max(1, PROGRAMS // (tiles * batch))))
    splits = cdiv(layers, layers_per_split)
    products = new(splits, batch, left_count, right_count)
    arguments = dict(
        left=left, right=right, left_rows=left_rows, right_rows=right_rows, left_lengths=left_lengths,
        right_weights=right_weights, products=products, left_strides=left.stride()[:5],
        right_strides=right.stride()[:5], left_count=left_count, right_count=right_count, left_stored=left.shape[2],
        right_stored=right.shape[2], layers=layers, layers_per_split=layers_per_split, HEADS=heads, HEAD_DIM=head_dim,
        LEFT_PARTS=left_parts, RIGHT_PARTS=right_parts, LEFT_MEANS=left_means, **config,
    )  # fmt: skip
    # With 4 warps the products of float32 spill registers in triton 3.6.0 and on sm_100.
    options = dict(num_warps=4 if exact else 8, num_stages=3)
    return Launch(products_kernel, (tiles, splits, batch), arguments, options), products


def plan_softmax(
    new: Allocate,
    text: torch.Tensor,
    means: torch.Tensor,
    rows: torch.Tensor | None,
    lengths: torch.Tensor | None,
    weights: torch.Tensor,
    softmax_scale: float,
) -> tuple[list[Launch], torch.Tensor]:
    """The launches that fill the mass (layers * H, B, F) of frames in the softmax of a layer and head, and the mass.

    The mass is averaged over the words.
    """
    layers, batch, words, heads, head_dim = text.shape
    stored, parts, kv_heads = means.shape[2:5]
    frames = stored if rows is None else rows.shape[1]
    config = _product_config(_exact_products(text, means), words, head_dim)
    columns = config.pop("COLUMNS")
    lse, mass = new(layers * heads, batch, words), new(layers * heads, batch, frames)
    shared = dict(
        text=text, means=means, rows=rows, lengths=lengths, weights=weights, lse=lse, text_strides=text.stride()[:4],
        mean_strides=means.stride()[:5], scale=softmax_scale, words=words, frames=frames, stored=stored, parts=parts,
        HEADS=heads, GROUP=heads // kv_heads, HEAD_DIM=head_dim, **config,
    )  # fmt: skip
    options = dict(num_warps=4, num_stages=2)
    grid = (cdiv(words, config["ROWS"]), layers * heads, batch)
    first = Launch(word_lse_kernel, grid, dict(**shared, COLUMNS=columns), options)
    at_once = min(next_power_of_2(parts), columns)
    shared.update(mass=mass, FRAMES=columns // at_once, PARTS=at_once)
    grid = (cdiv(frames, columns // at_once), layers * heads, batch)
    return [first, Launch(frame_mass_kernel, grid, shared, options)], mass
