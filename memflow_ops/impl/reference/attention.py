"""`impl="reference"`: the specification, in loops over what the contract speaks of.

    for every batch element, query head and query group:
        descriptor of the group = mean of its queries
        score of block j        = descriptor of the group . descriptor j
        selected                = the top_k best, ties to the lower block
        out                     = softmax(q . [dense keys, keys of the selected blocks] * scale) . their values

Any floating dtype and device; float64 in, float64 throughout: the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from memflow_ops.impl.reference.selection import slot_table, wide


def tiles(
    q: Tensor,
    k: Tensor | None,
    memory_k: Tensor | None,
    indices: Tensor,
    block_size: int,
    frame_tokens: int,
    query_group: int,
    memory_slots: Tensor | None,
) -> Iterator[tuple[int, slice, int, int, list[int]]]:
    """(batch, queries, query head, key head, selected tokens of the bank) of every query group."""
    batch, queries, heads, _ = q.shape
    keys = memory_k if k is None else k
    assert keys is not None
    blocks = -(-frame_tokens // block_size)
    slots = slot_table(memory_slots, batch, 0 if memory_k is None else memory_k.shape[1] // frame_tokens)
    for b, h, g in torch.cartesian_prod(*map(torch.arange, indices.shape[:3])).tolist():
        tokens: list[int] = []
        for index in indices[b, h, g].tolist():
            if 0 <= index < len(slots[b]) * blocks:
                start = index % blocks * block_size
                frame = slots[b][index // blocks] * frame_tokens
                tokens += range(frame + start, frame + min(start + block_size, frame_tokens))
        yield b, slice(g * query_group, min((g + 1) * query_group, queries)), h, h // (heads // keys.shape[2]), tokens


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
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = wide(q.new_empty(q.shape[0], q.shape[2], q.shape[1]))
    for b, rows, h, kv, tokens in tiles(q, k, memory_k, indices, block_size, frame_tokens, query_group, memory_slots):
        keys = wide(gather(k, memory_k, b, kv, tokens))
        values = wide(gather(v, memory_v, b, kv, tokens))
        scores = wide(q[b, rows, h]) @ keys.T * softmax_scale
        if resume_out is not None and resume_lse is not None:
            # what is resumed is one more key: its score the LSE, its value the out
            scores = torch.cat([scores, resume_lse[b, h, rows, None]], 1)
        total = scores.logsumexp(-1, keepdim=True)
        p = torch.where(total == -torch.inf, 0.0, (scores - total).exp())
        result = p[:, : len(keys)] @ values
        if resume_out is not None:
            result += torch.where(p[:, -1:] > 0, p[:, -1:] * wide(resume_out[b, rows, h]), 0.0)
        out[b, rows, h] = result.to(q.dtype)
        lse[b, h, rows] = total[:, 0]
    return out, lse


def gather(dense: Tensor | None, memory: Tensor | None, b: int, kv: int, tokens: list[int]) -> Tensor:
    """The keys (or values) of a tile: all dense ones, then the selected ones of the bank."""
    return torch.cat([x for x in (dense[b, :, kv] if dense is not None else None,
                                  memory[b, tokens, kv] if memory is not None else None) if x is not None])  # fmt: skip


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
    """P = exp(scores - final LSE); dV = P^T dO; dS = P * (dO V^T - delta); dQ = dS K; dK = dS^T Q.

    delta = rowsum(dO * final out) - dLSE (FlashAttention-2, arXiv 2307.08691, algorithm 2, with an LSE that is used).
    """
    inputs = (q, k, v, memory_k, memory_v)
    grads = [wide(torch.zeros(() if x is None else x.shape, dtype=q.dtype, device=q.device)) for x in inputs]
    dense = 0 if k is None else k.shape[1]
    for b, rows, h, kv, tokens in tiles(q, k, memory_k, indices, block_size, frame_tokens, query_group, memory_slots):
        keys = wide(gather(k, memory_k, b, kv, tokens))
        values = wide(gather(v, memory_v, b, kv, tokens))
        queries, grad = wide(q[b, rows, h]), wide(grad_out[b, rows, h])
        delta = (grad * wide(out[b, rows, h])).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= grad_lse[b, h, rows, None]
        total = lse[b, h, rows, None]
        p = torch.where(total == -torch.inf, 0.0, (queries @ keys.T * softmax_scale - total).exp())
        ds = p * (grad @ values.T - delta) * softmax_scale
        dk, dv = ds.T @ queries, p.T @ grad
        grads[0][b, rows, h] = ds @ keys
        if k is not None:
            grads[1][b, :, kv] += dk[:dense]
            grads[2][b, :, kv] += dv[:dense]
        if memory_k is not None:
            index = torch.tensor(tokens, dtype=torch.int64, device=q.device)
            grads[3][b, :, kv].index_add_(0, index, dk[dense:])
            grads[4][b, :, kv].index_add_(0, index, dv[dense:])
    chosen = zip(grads, inputs, wanted, strict=True)
    return [grad.to(q.dtype) if want and x is not None else None for grad, x, want in chosen]
