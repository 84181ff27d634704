"""Attention over the dense keys and the selected blocks, group by group, and its gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl.precision import widened
from memflow_ops.impl.reference.selection import slot_lists


class Tile(NamedTuple):
    """One query group of one head, and what it attends to in the bank."""

    batch: int
    queries: slice
    head: int
    kv_head: int
    tokens: list[int]
    """The tokens of memory_k and memory_v that the group has selected."""
    window: list[int]
    """The tokens of k and v that are the valid keys of the window, in order."""
    seen: Tensor | None
    """[rows, 1]: how many of them each query sees; None: all."""


def tiles(q: Tensor, k: Tensor | None, memory_k: Tensor | None, indices: Tensor, geometry: Geometry) -> Iterator[Tile]:
    """Every query group of every head. Indices outside of the bank are unused entries."""
    batch, queries, heads, _ = q.shape
    keys = memory_k if k is None else k
    assert keys is not None
    heads_per_kv_head = heads // keys.shape[2]
    blocks, group = geometry.blocks_per_frame, geometry.query_group
    slots = slot_lists(geometry, batch, 0 if memory_k is None else geometry.stored_frames(memory_k))
    window = 0 if k is None else geometry.window_keys(k)
    used = [window] * batch if geometry.seqused_k is None else geometry.seqused_k.clamp(0, window).tolist()
    window_tokens = [list(range(window))] * batch
    if geometry.window_slots is not None and k is not None:
        stored = geometry.window_slots.clamp(0, geometry.stored_frames(k) - 1).tolist()
        size = geometry.frame_tokens
        window_tokens = [[token for slot in of for token in range(slot * size, (slot + 1) * size)] for of in stored]
    rows = torch.arange(queries, dtype=torch.int64, device=q.device).unsqueeze(1)
    for b, h, g in itertools.product(*map(range, indices.shape[:3])):
        tokens: list[int] = []
        for index in indices[b, h, g].tolist():
            if 0 <= index < len(slots[b]) * blocks:
                frame = slots[b][index // blocks] * geometry.frame_tokens
                start = index % blocks * geometry.block_size
                tokens += range(frame + start, frame + min(start + geometry.block_size, geometry.frame_tokens))
        place = slice(g * group, min((g + 1) * group, queries))
        seen = rows[place] + 1 + used[b] - queries if geometry.causal else None
        yield Tile(b, place, h, h // heads_per_kv_head, tokens, window_tokens[b][: used[b]], seen)


def gather(dense: Tensor | None, memory: Tensor | None, tile: Tile) -> Tensor:
    """The keys (or values) that a tile attends to: the valid ones of the window, then the selected ones of the bank."""
    parts = []
    if dense is not None:
        parts.append(dense[tile.batch, tile.window, tile.kv_head])
    if memory is not None:
        parts.append(memory[tile.batch, tile.tokens, tile.kv_head])
    return torch.cat(parts)


def keys_and_values(
    k: Tensor | None, v: Tensor | None, memory_k: Tensor | None, memory_v: Tensor | None, tile: Tile, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """What a tile attends to, in the dtype to compute in.

    Of an int8 bank: key = mean of its block + k_scale * stored key, value = v_scale * stored value.
    """
    if geometry.int8 is None or memory_k is None or memory_v is None:
        return widened(gather(k, memory_k, tile)), widened(gather(v, memory_v, tile))
    descriptors, k_scale, v_scale = (widened(x[tile.batch, :, tile.kv_head]) for x in geometry.int8)
    frames = [token // geometry.frame_tokens for token in tile.tokens]
    within = [token % geometry.frame_tokens // geometry.block_size for token in tile.tokens]
    blocks = [frame * geometry.blocks_per_frame + block for frame, block in zip(frames, within, strict=True)]
    stored_k, stored_v = (x[tile.batch, tile.tokens, tile.kv_head].to(k_scale.dtype) for x in (memory_k, memory_v))
    keys = descriptors[blocks, : k_scale.shape[-1]] + k_scale[blocks] * stored_k
    values = v_scale[tile.tokens, None] * stored_v
    if k is None or v is None:
        return keys, values
    return torch.cat([widened(gather(k, None, tile)), keys]), torch.cat([widened(gather(v, None, tile)), values])


def scores_of(queries: Tensor, keys: Tensor, tile: Tile, softmax_scale: float) -> Tensor:
    """Scaled scores [rows, keys], -inf for the keys of the window that a query does not see."""
    scores = queries @ keys.T * softmax_scale
    if tile.seen is not None:
        place = torch.arange(len(keys), dtype=torch.int64, device=keys.device)
        scores = torch.where((place < len(tile.window)) & (place >= tile.seen), -torch.inf, scores)
    return scores


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
    """
    for every batch element, query head and query group:
        scores = [q . dense keys that the query sees, memory_q . keys of the selected blocks] * scale
        lse    = log(sum(exp(scores)))
        out    = exp(scores - lse) . [dense values, values of the selected blocks]

    memory_q is q where it is None. A resumed state takes part as one more key, whose score is its LSE and whose value
    is its out.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = widened(q.new_empty(q.shape[0], q.shape[2], q.shape[1]))
    for tile in tiles(q, k, memory_k, indices, geometry):
        b, rows, h = tile[:3]
        keys, values = keys_and_values(k, v, memory_k, memory_v, tile, geometry)
        scores = scores_of(widened(q[b, rows, h]), keys, tile, geometry.softmax_scale)
        if memory_q is not None:
            window = 0 if k is None else len(tile.window)
            of_bank = widened(memory_q[b, rows, h]) @ keys[window:].T * geometry.softmax_scale
            scores = torch.cat([scores[:, :window], of_bank], 1)
        if resume is not None:
            scores = torch.cat([scores, resume[1][b, h, rows, None]], 1)
        total = scores.logsumexp(-1, keepdim=True)
        p = torch.where(total == -torch.inf, 0.0, (scores - total).exp())
        result = p[:, : len(keys)] @ values
        if resume is not None:
            # The out of a state without keys is ignored, NaN included.
            result += torch.where(p[:, -1:] == 0, 0.0, p[:, -1:] * widened(resume[0][b, rows, h]))
        out[b, rows, h] = result.to(q.dtype)
        lse[b, h, rows] = total[:, 0]
    return out, lse


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
    """P = exp(scores - LSE); dV = P^T dO; dS = P * (dO V^T - delta); dQ = dS K; dK = dS^T Q.

    delta = rowsum(dO * out) - dLSE; out and LSE are those of the whole softmax (FlashAttention-2, arXiv 2307.08691,
    algorithm 2, with an LSE that is used).
    """
    inputs, scale = (q, k, v, memory_k, memory_v), geometry.softmax_scale
    grads = [widened(torch.zeros(() if x is None else x.shape, dtype=q.dtype, device=q.device)) for x in inputs]
    for tile in tiles(q, k, memory_k, indices, geometry):
        b, rows, h, kv, tokens, window, _ = tile
        keys, values = widened(gather(k, memory_k, tile)), widened(gather(v, memory_v, tile))
        queries, grad = widened(q[b, rows, h]), widened(grad_out[b, rows, h])
        delta = (grad * widened(out[b, rows, h])).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= grad_lse[b, h, rows, None]
        total = lse[b, h, rows, None]
        p = torch.where(total == -torch.inf, 0.0, (scores_of(queries, keys, tile, scale) - total).exp())
        ds = p * (grad @ values.T - delta) * scale
        dk, dv = ds.T @ queries, p.T @ grad
        grads[0][b, rows, h] = ds @ keys
        dense = len(window)
        parts = ((k, window, slice(0, dense), 1), (memory_k, tokens, slice(dense, None), 3))
        for x, keys_of_part, of_part, number in parts:
            if x is not None:
                index = torch.tensor(keys_of_part, dtype=torch.int64, device=q.device)
                grads[number][b, :, kv].index_add_(0, index, dk[of_part])
                grads[number + 1][b, :, kv].index_add_(0, index, dv[of_part])
    return [
        grad.to(q.dtype) if want and x is not None else None
        for grad, x, want in zip(grads, inputs, wanted, strict=True)
    ]
