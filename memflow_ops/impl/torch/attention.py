"""Attention over the dense keys and the selected blocks, vectorised and without a dense mask.

The dense keys go through torch's fused attention, which returns the LSE. The selected blocks are gathered a few query
groups at a time into one small buffer that stays in the processor's cache, attended to, and merged into the dense
result in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl.dense import attend_folded, cpu_attention
from memflow_ops.impl.precision import wide_dtype
from memflow_ops.impl.torch.gather import (
    PLANNED_KEYS,
    SCORE_ELEMENTS,
    SelectedBlocks,
    groups_of_one_size,
    on_host,
    tile_slices,
    tiles_of,
)
from memflow_ops.impl.torch.window import attend_window, window_of

# Each thread gathers so many bytes of keys and values at a time: what its L2 cache holds.
_GATHER_BYTES = 2 << 20


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention from q [b, h, n, D] to k and v [b, h, S, D], and its LSE; bias [b, h, 1 or n, S] holds 0 and -inf."""
    return (cpu_attention if q.device.type == "cpu" else _attention_in_steps)(q, k, v, scale, bias)


def _attention_in_steps(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`_attention` on any device, with the scores of some queries at a time."""
    wide = wide_dtype(q.dtype)
    k, v = k.to(wide), v.to(wide)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)
    step = max(1, SCORE_ELEMENTS // (k.shape[0] * k.shape[1] * k.shape[2]))
    for n in range(0, q.shape[2], step):
        scores = q[:, :, n : n + step].to(wide) @ k.mT * scale
        if bias is not None:
            scores += bias if bias.shape[2] == 1 else bias[:, :, n : n + step]
        total = scores.logsumexp(-1)
        without_keys = (total == -torch.inf).unsqueeze(-1)  # Their softmax is 0 / 0.
        lse[:, :, n : n + step] = total
        out[:, :, n : n + step] = (scores.softmax(-1) @ v).masked_fill_(without_keys, 0.0).to(q.dtype)
    return out, lse


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    indices: Tensor,
    geometry: Geometry,
    resume: tuple[Tensor, Tensor] | None = None,
    memory_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    scale = geometry.softmax_scale
    k, v = (None if x is None else window_of(x, geometry) for x in (k, v))
    if k is not None and v is not None and k.shape[1] and geometry.sees_all:
        out, lse = attend_folded(_attention, q, k, v, scale)
    elif resume is not None:
        lse = resume[1].clone(memory_format=torch.contiguous_format)
        out = resume[0].clone(memory_format=torch.contiguous_format)
        if not (on_host(lse) and bool(lse.isfinite().all())):
            # The out of a state without keys is ignored, NaN included.
            state_lse = lse.transpose(1, 2).unsqueeze(-1)
            out.masked_fill_(state_lse == -torch.inf, 0.0).masked_fill_(state_lse.isnan(), torch.nan)
    else:
        out = q.new_zeros(q.shape)
        lse = q.new_full((batch, heads, queries), -torch.inf, dtype=wide_dtype(q.dtype))
        if k is not None and v is not None and k.shape[1]:
            attend_window(_attention, q, k, v, geometry, (out, lse))
    if memory_k is None or memory_v is None or not indices.numel():
        return out, lse
    selected = SelectedBlocks(memory_k, memory_v, indices, geometry)
    q = q if memory_q is None else memory_q
    for rows, groups, n in groups_of_one_size(queries, geometry.query_group):
        out_tiles, lse_tiles = tiles_of(out[:, rows], n), lse[:, :, rows].flatten(0, 1).unflatten(1, (-1, n))
        _add_blocks(tiles_of(q[:, rows], n), selected.of_groups(groups), scale, out_tiles, lse_tiles)
        if out_tiles.data_ptr() != out[:, rows].data_ptr():  # The tiles are a copy here; those of the LSE never are.
            out[:, rows] = out_tiles.view(batch, heads, -1, out.shape[-1]).transpose(1, 2)
    return out, lse


def _add_blocks(q: Tensor, selected: SelectedBlocks, scale: float, out: Tensor, lse: Tensor) -> None:
    """Merge attention from the tiles q [B * H, G, n, D] to their blocks into out (like q) and lse [B * H, G, n]."""
    keys = selected.start.shape[2] * selected.block
    # Every thread has one tile at least.
    count = torch.get_num_threads() * max(1, _GATHER_BYTES // (2 * keys * q.shape[-1] * q.element_size()))
    for planned in tile_slices(q.shape, max(count, PLANNED_KEYS // keys)):
        tokens, masked = selected.tokens(planned)
        tiles_q, tiles_out, tiles_lse = q[planned], out[planned], lse[planned]
        bias = None if masked is None else torch.zeros_like(masked, dtype=q.dtype).masked_fill_(masked, -torch.inf)
        empty = None if selected.empty is None else selected.empty[planned]
        for tiles, k, v in selected.gather(tokens, planned, count):
            part, part_lse = _attention(tiles_q[tiles], k, v, scale, None if bias is None else bias[tiles].unsqueeze(2))
            if empty is not None:
                part.masked_fill_(empty[tiles][..., None, None], 0.0)
                part_lse.masked_fill_(empty[tiles].unsqueeze(-1), -torch.inf)
            before = tiles_lse[tiles]
            # The weight is the part's share of the softmax, and 0 where the part has no key, even if neither has one.
            weight = (part_lse - before).sigmoid_().masked_fill_(part_lse == -torch.inf, 0.0).unsqueeze(-1)
            merged = tiles_out[tiles]
            if merged.dtype == weight.dtype:
                merged.lerp_(part, weight)
            else:  # A weight rounded to half precision is too inexact where values are large, so only the result is.
                merged.copy_(merged.to(weight.dtype).lerp_(part.to(weight.dtype), weight))
            torch.logaddexp(before, part_lse, out=before)
