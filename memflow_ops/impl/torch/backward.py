"""The gradients of attention.py's attention: every part under the final out and LSE, in float32 or wider.

The formulas are those of FlashAttention-2 (arXiv 2307.08691, algorithm 2), see impl/reference/attention.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl.precision import wide_dtype
from memflow_ops.impl.torch.gather import (
    PLANNED_KEYS,
    SCORE_ELEMENTS,
    SelectedBlocks,
    TokenTable,
    groups_of_one_size,
    on_host,
    tile_slices,
    tiles_of,
)
from memflow_ops.impl.torch.window import gradient_of_stored, window_of, window_parts, without_invalid

# The scores and the queries of one step: the scores stay in the cache of a core.
_TILE_SCORES = 256 << 10
_TILE_ROWS = 1024


def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    batch, queries, heads, size = q.shape
    wide, scale = wide_dtype(q.dtype), geometry.softmax_scale
    stored = (k, v)
    k, v = (None if x is None else window_of(x, geometry) for x in stored)
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse
    # A query without keys has P = exp(score - inf) = 0.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    grads: list[Tensor | None] = [None] * 5
    fused = on_host(q) and grad_lse is None and geometry.sees_all
    dense = (k, v) if k is not None and v is not None and k.shape[1] and any(wanted[:3]) else None
    if dense and fused:
        grads[:3] = _fused_backward(grad_out, q, *dense, out, lse, scale, wanted)
    for i, (x, want) in enumerate(zip((q, k, v, memory_k, memory_v), wanted, strict=True)):
        if grads[i] is None and want and x is not None:
            grads[i] = torch.zeros(x.shape, dtype=wide, device=q.device)
    if dense and not fused:
        above = _Upstream(q.transpose(1, 2), grad_out.transpose(1, 2), lse, delta)
        _dense_backward(above, *dense, geometry, *grads[:3])
    if memory_k is not None and memory_v is not None and indices.numel() and (wanted[0] or any(wanted[3:])):
        selected = SelectedBlocks(memory_k, memory_v, indices, geometry)
        for rows, groups, n in groups_of_one_size(queries, geometry.query_group):
            lse_tiles, delta_tiles = (x[:, :, rows].flatten(0, 1).unflatten(1, (-1, n)) for x in (lse, delta))
            upstream = _Upstream(tiles_of(q[:, rows], n), tiles_of(grad_out[:, rows], n), lse_tiles, delta_tiles)
            dq = _blocks_backward(upstream, selected.of_groups(groups), scale, wanted[0], grads[3], grads[4])
            if grads[0] is not None and dq is not None:
                grads[0][:, rows] += dq.view(batch, heads, -1, size).transpose(1, 2)
    for i, x in enumerate(stored, start=1):
        if x is not None:
            grads[i] = gradient_of_stored(grads[i], x, geometry)
    return [None if x is None else x.to(q.dtype) for x in grads]


class _Upstream(NamedTuple):
    """The queries of some tiles, and what reaches them from later in the network."""

    q: Tensor  # [..., n, D]
    grad_out: Tensor  # [..., n, D]
    lse: Tensor  # [..., n]
    delta: Tensor  # [..., n]


def _tile_backward(
    tiles: _Upstream, k: Tensor, v: Tensor, scale: float, wanted: Sequence[bool], masked: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dQ, dK, dV (None: not wanted) of tiles [..., n, D] over keys [..., S, D], all of them wide.

    masked [..., S]: the keys that take no part.
    """
    q = tiles.q * scale
    p = q @ k.mT
    if masked is not None:
        p.masked_fill_(masked.unsqueeze(-2), -torch.inf)
    p.sub_(tiles.lse.unsqueeze(-1)).exp_()
    dv = p.mT @ tiles.grad_out if wanted[2] else None
    if not (wanted[0] or wanted[1]):
        return None, None, dv
    ds = (tiles.grad_out @ v.mT).sub_(tiles.delta.unsqueeze(-1)).mul_(p)
    return (ds @ k).mul_(scale) if wanted[0] else None, ds.mT @ q if wanted[1] else None, dv


def _fused_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of queries (B, Lq, H, D), keys and values (B, Lk, Hkv, D) by torch's kernel for CPUs.

    The kernel uses matrix units. out and lse (B, H, Lq) may be over more keys than these. dQ is wide.
    """
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    # As in the forward, the query heads that share a key head become more queries of it.
    rows = [x.transpose(1, 2).reshape(batch, kv_heads, -1, size) for x in (grad_out, q, out)]
    inputs = (rows[0], rows[1], k.transpose(1, 2), v.transpose(1, 2), rows[2], lse.reshape(batch, kv_heads, -1))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    found = kernel(*inputs, 0.0, False, scale=scale)  # without dropout and causal mask
    grads = found[0].reshape(batch, heads, queries, size).to(lse.dtype), *found[1:]
    return [x.transpose(1, 2).contiguous() if want else None for x, want in zip(grads, wanted, strict=False)]


def _dense_backward(
    above: _Upstream,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
) -> None:
    """Add the gradients of queries [B, H, Lq, D] and keys (B, Lk, Hkv, D) to grad_* (None: not wanted)."""
    batch, heads, queries = above.q.shape[:3]
    k, v = without_invalid(k, v, geometry)
    for part in window_parts(queries, k.shape[1], batch, geometry, k.device):
        for b, h in itertools.product(range(batch)[part.batch], range(heads) if part.keys else ()):
            seen = (b, slice(0, part.keys), h // (heads // k.shape[2]))
            places = ((b, part.queries, h), seen, seen)
            targets = (None if x is None else x[at] for x, at in zip((grad_q, grad_k, grad_v), places, strict=True))
            rows = _Upstream(*(x[b, h, part.queries] for x in above))
            _head_backward(rows, k[seen], v[seen], geometry.softmax_scale, part.hidden, *targets)


def _head_backward(
    above: _Upstream,
    k: Tensor,
    v: Tensor,
    scale: float,
    hidden: Tensor | None,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
) -> None:
    """Add the gradients of queries [n, D] and keys [S, D] of one head to grad_* (None: not wanted).

    hidden [n, S]: which keys a query does not see; None: each sees all.

    This is `_tile_backward` in steps whose scores stay in the cache of a core. All steps share their buffers, because
    fresh memory costs more than what is computed in it.
    """
    wide = above.lse.dtype
    queries, grad = above.q.to(wide) * scale, above.grad_out.to(wide).contiguous()
    shift, delta = -above.lse.unsqueeze(-1), -above.delta.unsqueeze(-1)
    rows = min(len(queries), _TILE_ROWS)
    columns = min(len(k), max(1, _TILE_SCORES // rows))
    buffers = queries.new_empty(2, rows * columns)
    for first in range(0, len(k), columns):
        place = slice(first, first + columns)
        keys, values = (x[place].to(wide).contiguous() for x in (k, v))
        for start in range(0, len(queries), rows):
            part = slice(start, start + rows)
            shape = (len(queries[part]), len(keys))
            p, ds = (x[: shape[0] * shape[1]].view(shape) for x in buffers)
            torch.addmm(shift[part], queries[part], keys.T, out=p).exp_()
            if hidden is not None:
                p.masked_fill_(hidden[part, place], 0.0)
            if grad_v is not None:
                grad_v[place].addmm_(p.T, grad[part])
            if grad_q is None and grad_k is None:
                continue
            torch.addmm(delta[part], grad[part], values.T, out=ds).mul_(p)
            if grad_q is not None:
                grad_q[part].addmm_(ds, keys, alpha=scale)
            if grad_k is not None:
                grad_k[place].addmm_(ds.T, queries[part])


def _blocks_backward(
    upstream: _Upstream,
    selected: SelectedBlocks,
    scale: float,
    query: bool,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
) -> Tensor | None:
    """dQ [B * H, G, n, D] of the tiles if `query`. Adds to grad_k and grad_v (B, Lm, Hkv, D; None: not wanted)."""
    q, wide = upstream.q, wide_dtype(upstream.q.dtype)
    keys = selected.start.shape[2] * selected.block
    count = max(1, min(_TILE_SCORES // q.shape[2], SCORE_ELEMENTS // (2 * q.shape[3])) // keys)
    grad_q = torch.empty(q.shape, dtype=wide, device=q.device) if query else None
    wanted = (query, grad_k is not None, grad_v is not None)
    for planned in tile_slices(q.shape, max(count, PLANNED_KEYS // keys)):
        tokens, masked = selected.tokens(planned)
        above = _Upstream(*(x[planned] for x in upstream))
        empty = None if selected.empty is None else selected.empty[planned][..., None, None]
        rows = [None if x is None else selected.rows(tokens, planned, TokenTable(x)) for x in (grad_k, grad_v)]
        found = []
        for tiles, k, v in selected.gather(tokens, planned, count):
            part = _Upstream(*(x[tiles].to(wide) for x in above))
            mask = None if masked is None else masked[tiles]
            dq, *of_keys = _tile_backward(part, k.to(wide), v.to(wide), scale, wanted, mask)
            found.append(dq)
            for grad, row, x in zip((grad_k, grad_v), rows, of_keys, strict=True):
                if grad is not None and row is not None and x is not None:
                    if empty is not None:
                        x = x.masked_fill_(empty[tiles], 0.0)
                    grad.view(-1, q.shape[-1]).index_add_(0, row[tiles].flatten(), x.flatten(0, 2))
        if grad_q is not None:
            made = torch.cat([x.flatten(0, 1) for x in found if x is not None]).view(q[planned].shape)
            grad_q[planned] = made if empty is None else made.masked_fill_(empty, 0.0)
    return grad_q
