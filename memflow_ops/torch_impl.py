"""`impl="torch"`: vectorised, gathers only what is selected, never a dense mask; the default on a CPU.

The dense keys go through torch's fused attention, which returns the LSE. The selected blocks are gathered a few query
groups at a time into one small buffer that stays in the cache, attended to, and merged into the dense result in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of gathered keys and values at a time and thread: half of what a core's L2 cache holds.
_GATHER_BYTES = 1 << 20
# Keys whose places are worked out at a time.
_PLANNED_KEYS = 1 << 20
# Elements of scores, and of keys and values, that are held at a time.
_SCORE_ELEMENTS = 4 << 20
# Scores of a tile of the backward, which stay in the cache of a core, and queries of one.
_TILE_SCORES = 256 << 10
_TILE_ROWS = 1024


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def describe_blocks(k: Tensor, block_size: int, frame_tokens: int) -> Tensor:
    batch, tokens, heads, size = k.shape
    frames = k.unflatten(1, (-1, frame_tokens)) if tokens else k.view(batch, 0, frame_tokens, heads, size)
    whole = frame_tokens // block_size * block_size
    parts = []
    if whole:
        parts.append(frames[:, :, :whole].unflatten(2, (-1, block_size)).mean(3, dtype=_wide(k.dtype)))
    if whole < frame_tokens:
        parts.append(frames[:, :, whole:].mean(2, keepdim=True, dtype=_wide(k.dtype)))
    return torch.cat(parts, 2).flatten(1, 2).to(k.dtype)


def select_blocks(
    q: Tensor,
    descriptors: Tensor,
    top_k: int,
    query_group: int,
    memory_frames: Tensor | None,
    memory_slots: Tensor | None,
    blocks_per_frame: int,
) -> Tensor:
    batch, _, heads, _ = q.shape
    if memory_slots is not None:
        frames = descriptors.unflatten(1, (-1, blocks_per_frame))
        slots = memory_slots.clamp(0, frames.shape[1] - 1).long()
        descriptors = frames[torch.arange(batch, device=q.device).unsqueeze(1), slots].flatten(1, 2)
    blocks = descriptors.shape[1]
    chosen = min(top_k, blocks)
    wide = _wide(q.dtype)
    table = descriptors.to(wide).permute(0, 2, 3, 1)  # [B, Hkv, D, N]
    means = _group_means(q, query_group).transpose(1, 2).unflatten(1, (table.shape[1], -1))  # [B, Hkv, rep, G, D]
    repeats, groups = means.shape[2:4]
    indices = q.new_empty((batch, heads, groups, chosen), dtype=torch.int32)
    if not chosen:
        return indices
    invalid = None
    if memory_frames is not None:
        valid = memory_frames.clamp(0).unsqueeze(1) * blocks_per_frame
        invalid = (torch.arange(blocks, device=q.device) >= valid)[:, None, None, None, :]
    step = max(1, _SCORE_ELEMENTS // (batch * heads * blocks))
    for start in range(0, groups, step):
        part = means[:, :, :, start : start + step]
        scores = _ieee_product(part.flatten(2, 3), table).unflatten(2, (repeats, -1))  # [B, Hkv, rep, g, N]
        order = _best(scores, chosen, invalid).sort(-1).values
        indices[:, :, start : start + step] = order.masked_fill_(order == blocks, -1).flatten(1, 2)
    return indices


def _group_means(q: Tensor, group: int) -> Tensor:
    """(B, Lq, H, D) -> (B, G, H, D), float32 or wider; the last group may be short."""
    wide = _wide(q.dtype)
    if group == 1:
        return q.to(wide)
    whole = q.shape[1] // group * group
    parts = [q[:, :whole].unflatten(1, (-1, group)).mean(2, dtype=wide)] if whole else []
    if whole < q.shape[1]:
        parts.append(q[:, whole:].mean(1, keepdim=True, dtype=wide))
    return torch.cat(parts, 1)


def _ieee_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b as float32 means it, whatever the user allows other products to round: selections must agree."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return a @ b
    finally:
        torch.set_float32_matmul_precision(allowed)


def _best(scores: Tensor, count: int, invalid: Tensor | None) -> Tensor:
    """Indices [..., count] of the best scores [..., N] in no order; ties to the lower index, N for an invalid one."""
    # integers in the order of the scores: -0 equals +0, NaN is the lowest but one, the lowest is for invalid ones
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[scores.dtype]
    lowest = torch.iinfo(integer).min
    bits = (scores + 0.0).view(integer)  # adding +0 turns -0 into +0
    ranks = torch.where(bits < 0, bits ^ ~lowest, bits).masked_fill_(scores.isnan(), lowest + 1)
    if invalid is not None:
        ranks.masked_fill_(invalid, lowest)
    if integer is torch.int32:
        # rank and index in one integer: a partial selection without ties, six times faster than a stable sort
        keys = ranks.long().mul_(2**32).add_(torch.arange(scores.shape[-1], device=scores.device).flip(0))
        order = keys.topk(count, -1, sorted=False).indices
    else:
        order = torch.sort(ranks, dim=-1, descending=True, stable=True).indices[..., :count]
    return order.masked_fill_(ranks.gather(-1, order) == lowest, scores.shape[-1])


class _Rows:
    """A memory tensor (B, L, Hkv, D) of any strides seen as a table of rows of D elements, without a copy."""

    def __init__(self, x: Tensor):
        size = x.shape[3]
        strides = x.stride()[:3]
        self.unit = math.gcd(*(s for s, n in zip(strides, x.shape[:3], strict=True) if n > 1)) or size
        last = sum(s * (n - 1) for s, n in zip(strides, x.shape[:3], strict=True))
        self.table = x.as_strided((last // self.unit + 1, size), (self.unit, 1))
        self.batch_step, self.token_step, self.head_step = (s // self.unit for s in strides)
        self.strides = strides


class _Bank:
    """The selected blocks of a memory, gathered for a few tiles (query groups of a head) at a time."""

    def __init__(
        self, memory_k: Tensor, memory_v: Tensor, indices: Tensor, block: int, frame: int, slots: Tensor | None
    ):
        batch, heads = indices.shape[:2]
        self.k, self.v = _Rows(memory_k), _Rows(memory_v)
        self.block, self.device = block, memory_k.device
        blocks = -(-frame // block)
        frames = memory_k.shape[1] // frame if slots is None else slots.shape[1]
        used = (indices >= 0) & (indices < frames * blocks)
        # an unused entry repeats the tile's first used block, masked, so that nothing unselected is read
        first = indices.gather(-1, used.byte().argmax(-1, keepdim=True))
        places = torch.where(used, indices, first).clamp(0, frames * blocks - 1).long()
        bank_frames, self.start = places // blocks, places % blocks * block
        length = (frame - self.start).clamp_(max=block)
        if slots is not None:
            table = slots.clamp(0, memory_k.shape[1] // frame - 1).long()
            bank_frames = table.gather(1, bank_frames.flatten(1)).view_as(bank_frames)
        self.start = (self.start + bank_frames * frame).flatten(0, 1)  # [B * H, G, K] first token
        self.length = torch.where(used, length, 0).flatten(0, 1)  # [B * H, G, K] tokens, 0: unused
        self.empty = ~used.any(-1).flatten(0, 1)  # [B * H, G]
        # host reads: on CUDA they would stall, so there the masks are always applied
        self.ragged = memory_k.is_cuda or bool((self.length < block).any())
        self.some_empty = memory_k.is_cuda or bool(self.empty.any())
        head = torch.arange(batch * heads, device=self.device)
        self.b, self.h = (head // heads).view(-1, 1, 1), (head % heads // (heads // memory_k.shape[2])).view(-1, 1, 1)

    def tokens(self, tiles: tuple[slice, slice]) -> tuple[Tensor, Tensor | None]:
        """Tokens [r, g, K * block] of some tiles, and which of them to mask."""
        offsets = torch.arange(self.block, device=self.device)
        start, length = self.start[tiles].unsqueeze(-1), self.length[tiles].unsqueeze(-1)
        if not self.ragged:
            return (start + offsets).flatten(2), None
        inside = torch.minimum(offsets, (length - 1).clamp_(min=0))
        return (start + inside).flatten(2), (offsets >= length).flatten(2)

    def rows(self, tokens: Tensor, tiles: tuple[slice, slice], rows: _Rows) -> Tensor:
        """Row of every token [r, g, K * block]."""
        heads = self.b[tiles[0]] * rows.batch_step + self.h[tiles[0]] * rows.head_step
        return tokens * rows.token_step + heads

    def gather(
        self, tokens: Tensor, tiles: tuple[slice, slice], count: int
    ) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Keys and values [r, g, K * block, D] of about `count` of the tiles at a time, in buffers used again."""
        rows_k = self.rows(tokens, tiles, self.k)
        rows_v = rows_k if self.v.strides == self.k.strides else self.rows(tokens, tiles, self.v)
        keys, size = tokens.shape[2], self.k.table.shape[1]
        sources = [(_Gather(x.table, min(count, tokens.shape[:2].numel()) * keys)) for x in (self.k, self.v)]
        for part in _walk(tokens.shape, count):
            k, v = (source(rows[part].reshape(-1)) for source, rows in zip(sources, (rows_k, rows_v), strict=True))
            shape = (*rows_k[part].shape[:2], keys, size)
            yield part, k.view(shape), v.view(shape)


class _Gather:
    """Rows of a table into a buffer of up to `count` rows, which is used again."""

    def __init__(self, table: Tensor, count: int):
        self.buffer = torch.empty((count, table.shape[1]), dtype=table.dtype, device=table.device)
        per_word = 8 // table.element_size()
        # as 8-byte words, where the rows divide, gathering half precisions is a third faster
        whole = all(n % per_word == 0 for n in (table.shape[1], table.stride(0), table.storage_offset()))
        self.source, self.target = (x.view(torch.int64) if whole else x for x in (table, self.buffer))

    def __call__(self, rows: Tensor) -> Tensor:
        torch.index_select(self.source, 0, rows, out=self.target[: len(rows)])
        return self.buffer[: len(rows)]


def _walk(shape: Sequence[int], tiles: int) -> Iterator[tuple[slice, slice]]:
    """Slices of about `tiles` tiles that cover all rows and groups of a shape [rows, groups, ...]."""
    rows, groups = shape[:2]
    row_step, group_step = max(1, tiles // groups), min(tiles, groups)
    for r in range(0, rows, row_step):
        for g in range(0, groups, group_step):
            yield slice(r, min(r + row_step, rows)), slice(g, min(g + group_step, groups))


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Plain attention with its LSE: q [b, h, n, D], k and v [b, h, S, D], bias [b, h, 1, S] of 0 and -inf."""
    if q.device.type == "cpu":
        if any(s == 1 and n > 1 for s, n in zip(q.stride()[:3], q.shape[:3], strict=True)):
            q = q.contiguous()  # the kernel lays its output out like q, and takes another stride of 1 for the last
        if bias is not None:
            bias = bias.expand(-1, -1, q.shape[2], -1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    wide = _wide(q.dtype)
    k, v = k.to(wide), v.to(wide)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)
    step = max(1, _SCORE_ELEMENTS // (k.shape[0] * k.shape[1] * k.shape[2]))
    for n in range(0, q.shape[2], step):
        scores = q[:, :, n : n + step].to(wide) @ k.mT * scale
        if bias is not None:
            scores += bias
        lse[:, :, n : n + step] = scores.logsumexp(-1)
        out[:, :, n : n + step] = (scores.softmax(-1) @ v).to(q.dtype)
    return out, lse


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention of (B, Lq, H, D) over (B, Lk, Hkv, D): out (B, Lq, H, D) and LSE (B, H, Lq)."""
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    # the query heads that share a key head become more queries of it
    folded = q.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * queries, size)
    out, lse = _attention(folded, k.transpose(1, 2), v.transpose(1, 2), scale)
    out = out.reshape(batch, heads, queries, size).transpose(1, 2).contiguous()
    return out, lse.reshape(batch, heads, queries).contiguous()


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    memory_k: Tensor | None,
    memory_v: Tensor | None,
    indices: Tensor,
    *,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    memory_slots: Tensor | None,
    resume_out: Tensor | None,
    resume_lse: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    if k is not None and v is not None and k.shape[1]:
        out, lse = _dense(q, k, v, softmax_scale)
    elif resume_out is not None and resume_lse is not None:
        gone = (resume_lse == -torch.inf).transpose(1, 2).unsqueeze(-1)
        out, lse = (
            resume_out.masked_fill(gone, 0.0).contiguous(),
            resume_lse.clone(memory_format=torch.contiguous_format),
        )
    else:
        out = q.new_zeros(q.shape)
        lse = q.new_full((batch, heads, queries), -torch.inf, dtype=_wide(q.dtype))
    if memory_k is None or memory_v is None or not indices.shape[-1]:
        return out, lse
    for rows, groups, n in _equal_groups(queries, query_group):
        bank = _Bank(memory_k, memory_v, indices[:, :, groups], block_size, frame_tokens, memory_slots)
        out_tiles, lse_tiles = _tiles(out[:, rows], n), lse[:, :, rows].flatten(0, 1).unflatten(1, (-1, n))
        _add_bank(_tiles(q[:, rows], n), bank, softmax_scale, out_tiles, lse_tiles)
        if out_tiles.data_ptr() != out[:, rows].data_ptr():  # the tiles are a copy; those of the LSE never are
            out[:, rows] = out_tiles.view(batch, heads, -1, out.shape[-1]).transpose(1, 2)
    return out, lse


def _equal_groups(queries: int, group: int) -> Iterator[tuple[slice, slice, int]]:
    """Queries, query groups and their size: the whole groups, then the short one, where there are such."""
    groups = queries // group
    if groups:
        yield slice(0, groups * group), slice(0, groups), group
    if queries % group:
        yield slice(groups * group, queries), slice(groups, None), queries % group


def _tiles(x: Tensor, n: int) -> Tensor:
    """(B, G * n, H, D) -> [B * H, G, n, D]; a view where B is 1."""
    return x.transpose(1, 2).flatten(0, 1).unflatten(1, (-1, n))


def _add_bank(q: Tensor, bank: _Bank, scale: float, out: Tensor, lse: Tensor) -> None:
    """Merge attention of the tiles q [B * H, G, n, D] over the bank into out and lse [B * H, G, n], in place."""
    keys = bank.start.shape[2] * bank.block
    # a tile per thread at least
    count = torch.get_num_threads() * max(1, _GATHER_BYTES // (2 * keys * q.shape[-1] * q.element_size()))
    for planned in _walk(q.shape, max(count, _PLANNED_KEYS // keys)):
        tokens, masked = bank.tokens(planned)
        bias = None
        if masked is not None:
            bias = torch.zeros(masked.shape, dtype=q.dtype, device=q.device).masked_fill_(masked, -torch.inf)
        states = [
            _attention(q[planned][tiles], k, v, scale, None if bias is None else bias[tiles].unsqueeze(2))
            for tiles, k, v in bank.gather(tokens, planned, count)
        ]
        # merged at once: many small operations on strided tiles cost more than this copy
        part = torch.cat([x.flatten(0, 1) for x, _ in states]).view(q[planned].shape)
        part_lse = torch.cat([x.flatten(0, 1) for _, x in states]).view(lse[planned].shape)
        if bank.some_empty:
            part.masked_fill_(bank.empty[planned][..., None, None], 0.0)
            part_lse.masked_fill_(bank.empty[planned].unsqueeze(-1), -torch.inf)
        # the part's share of the softmax; 0 / 0 where neither has a key
        weight = torch.sigmoid(part_lse - lse[planned]).nan_to_num_(0.0)
        out[planned].lerp_(part, weight.to(out.dtype).unsqueeze(-1))
        lse[planned] = torch.logaddexp(lse[planned], part_lse)


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
    *,
    wanted: Sequence[bool],
    block_size: int,
    frame_tokens: int,
    query_group: int,
    softmax_scale: float,
    memory_slots: Tensor | None,
) -> list[Tensor | None]:
    batch, queries, heads, size = q.shape
    wide = _wide(q.dtype)
    grads = [
        torch.zeros(x.shape, dtype=wide, device=q.device) if want and x is not None else None
        for x, want in zip((q, k, v, memory_k, memory_v), wanted, strict=True)
    ]
    delta = (grad_out.to(wide) * out.to(wide)).sum(-1).transpose(1, 2)
    if grad_lse is not None:
        delta = delta - grad_lse
    # a query without keys: P = exp(score - inf) = 0
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    if k is not None and v is not None and k.shape[1] and any(wanted[:3]):
        for b in range(batch):
            for h in range(heads):
                kv = h // (heads // k.shape[2])
                above = _Upstream(q[b, :, h], grad_out[b, :, h], lse[b, h], delta[b, h])
                places = ((b, slice(None), h), (b, slice(None), kv), (b, slice(None), kv))
                targets = [None if x is None else x[place] for x, place in zip(grads[:3], places, strict=True)]
                _dense_backward(above, k[b, :, kv], v[b, :, kv], softmax_scale, *targets)
    if memory_k is not None and memory_v is not None and indices.shape[-1] and (wanted[0] or any(wanted[3:])):
        for rows, groups, n in _equal_groups(queries, query_group):
            bank = _Bank(memory_k, memory_v, indices[:, :, groups], block_size, frame_tokens, memory_slots)
            lse_tiles, delta_tiles = (x[:, :, rows].flatten(0, 1).unflatten(1, (-1, n)) for x in (lse, delta))
            upstream = _Upstream(_tiles(q[:, rows], n), _tiles(grad_out[:, rows], n), lse_tiles, delta_tiles)
            dq = _bank_backward(upstream, bank, softmax_scale, wanted[0], grads[3], grads[4])
            if grads[0] is not None and dq is not None:
                grads[0][:, rows] += dq.view(batch, heads, -1, size).transpose(1, 2)
    return [None if x is None else x.to(q.dtype) for x in grads]


class _Upstream(NamedTuple):
    """Queries of some tiles and what arrives at them from above."""

    q: Tensor  # [..., n, D]
    grad_out: Tensor  # [..., n, D]
    lse: Tensor  # [..., n]
    delta: Tensor  # [..., n]


def _tile_backward(
    tiles: _Upstream, k: Tensor, v: Tensor, scale: float, wanted: Sequence[bool], masked: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dQ, dK, dV of tiles [..., n, D] over keys [..., S, D], all wide: dS = P * (dO V^T - delta), final LSE."""
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


def _dense_backward(
    above: _Upstream,
    k: Tensor,
    v: Tensor,
    scale: float,
    grad_q: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
) -> None:
    """Add the gradients of queries [n, D] over keys [S, D] to those wanted: _tile_backward in tiles whose scores stay
    in the cache, in buffers that are used again, because fresh memory costs more than what is computed in it."""
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
            if grad_v is not None:
                grad_v[place].addmm_(p.T, grad[part])
            if grad_q is None and grad_k is None:
                continue
            torch.addmm(delta[part], grad[part], values.T, out=ds).mul_(p)
            if grad_q is not None:
                grad_q[part].addmm_(ds, keys, alpha=scale)
            if grad_k is not None:
                grad_k[place].addmm_(ds.T, queries[part])


def _bank_backward(
    upstream: _Upstream, bank: _Bank, scale: float, query: bool, grad_k: Tensor | None, grad_v: Tensor | None
) -> Tensor | None:
    """dQ [B * H, G, n, D] of the tiles if `query`; adds to grad_k and grad_v (B, Lm, Hkv, D), None: not wanted."""
    q, wide = upstream.q, _wide(upstream.q.dtype)
    keys = bank.start.shape[2] * bank.block
    count = max(1, min(_TILE_SCORES // q.shape[2], _SCORE_ELEMENTS // (2 * q.shape[3])) // keys)
    grad_q = torch.empty(q.shape, dtype=wide, device=q.device) if query else None
    wanted = (query, grad_k is not None, grad_v is not None)
    for planned in _walk(q.shape, max(count, _PLANNED_KEYS // keys)):
        tokens, masked = bank.tokens(planned)
        above = _Upstream(*(x[planned] for x in upstream))
        empty = bank.empty[planned][..., None, None]
        rows = [None if x is None else bank.rows(tokens, planned, _Rows(x)) for x in (grad_k, grad_v)]
        found = []
        for tiles, k, v in bank.gather(tokens, planned, count):
            part = _Upstream(*(x[tiles].to(wide) for x in above))
            mask = None if masked is None else masked[tiles]
            dq, *of_keys = _tile_backward(part, k.to(wide), v.to(wide), scale, wanted, mask)
            found.append(dq)
            for grad, row, x in zip((grad_k, grad_v), rows, of_keys, strict=True):
                if grad is not None and row is not None and x is not None:
                    x = x.masked_fill_(empty[tiles], 0.0)
                    grad.view(-1, q.shape[-1]).index_add_(0, row[tiles].flatten(), x.flatten(0, 2))
        if grad_q is not None:
            made = torch.cat([x.flatten(0, 1) for x in found if x is not None]).view(q[planned].shape)
            grad_q[planned] = made.masked_fill_(empty, 0.0)
    return grad_q
