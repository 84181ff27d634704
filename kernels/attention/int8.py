"""Keys and values of an int8 bank: tiles become numbers after their load, and the products are those of any bank."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from memflow_ops.geometry import Int8Bank
from memflow_ops.kernels.primitives import Strided, cast, load_rows, mask_if, strided


class Scales(NamedTuple):
    """What an int8 bank is read with, as an argument, or that of one batch element and head in a kernel.

    The tiles get the dtype of the means.
    """

    means: Any
    """Strided (B, N, Hkv, D or 2 D), of the blocks of the stored frames."""
    k_scale: Any
    """Strided (B, N, Hkv, D)."""
    v_scale: Any
    """Strided (B, L, Hkv)."""


def scales_of(int8: Int8Bank) -> Scales:
    """The argument tuple for a bank that is int8."""
    return Scales(*map(strided, int8))  # with all of their strides: triton 3.6.0 compares no tuple that holds None


@triton.jit
def at_head(tensor, batch, kv_head):
    """A Strided tensor (B, L, Hkv, ...) from one batch element and head on."""
    strides = tensor.strides
    return Strided(tensor.pointer + (batch * strides[0] + kv_head * strides[2]), strides)


@triton.jit
def scales_of_head(scales, batch, kv_head):
    """The Scales of one batch element and head."""
    return Scales(
        at_head(scales.means, batch, kv_head),
        at_head(scales.k_scale, batch, kv_head),
        at_head(scales.v_scale, batch, kv_head),
    )


@triton.jit
def rows_of_blocks(vectors, block, present, columns, HEAD_DIM: tl.constexpr, SHARED: tl.constexpr):
    """The vectors of stored blocks in float32: [1, DIM] of one that all lanes share, or [BLOCK_N, DIM] of one for each.

    present: whether there is such a block, a scalar or [BLOCK_N]. Where there is none the vector is 0 and not read.
    """
    rows = vectors.pointer + block * vectors.strides[1]
    if SHARED:
        of_blocks = tl.load(rows + columns, mask=mask_if(present, columns < HEAD_DIM), other=0.0)[None, :]
    else:
        of_blocks = load_rows(rows, present, columns, HEAD_DIM)
    return of_blocks.to(tl.float32)


@triton.jit
def numbers_of(
    key,  # [BLOCK_N, DIM] int8
    value,  # [BLOCK_N, DIM] int8
    scales,  # Scales of the batch element and head
    block,  # among those of the stored frames, int64, a scalar or [BLOCK_N]
    there,  # of rows_of_blocks
    token,  # [BLOCK_N] int64
    present,  # [BLOCK_N]
    columns,
    HEAD_DIM: tl.constexpr,
    SHARED: tl.constexpr,
):
    """The tiles of keys and values as numbers, rounded once."""
    dtype: tl.constexpr = scales.means.pointer.dtype.element_ty
    mean = rows_of_blocks(scales.means, block, there, columns, HEAD_DIM, SHARED)
    scale = rows_of_blocks(scales.k_scale, block, there, columns, HEAD_DIM, SHARED)
    of_values = tl.load(scales.v_scale.pointer + token * scales.v_scale.strides[1], mask=present, other=0.0)
    key = cast(key.to(tl.float32) * scale + mean, dtype)
    return key, cast(value.to(tl.float32) * of_values.to(tl.float32)[:, None], dtype)
