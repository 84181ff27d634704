"""Where the keys of the window lie, which of them queries see, and attention to a window of which they see a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl.dense import attend_folded
from memflow_ops.impl.precision import wide_dtype
from memflow_ops.impl.torch.gather import on_host

# Queries of a part that needs a mask: a part reads the keys that its last query sees.
_MASKED_QUERIES = 256


class WindowPart(NamedTuple):
    """Some queries, and the keys of the window that they read."""

    batch: slice
    queries: slice
    keys: int
    """These leading keys of the window hold all that the queries see."""
    hidden: Tensor | None
    """[queries, keys]: which of them a query does not see; None: each sees all of them."""


def window_parts(queries: int, keys: int, batch: int, geometry: Geometry, device: torch.device) -> Iterator[WindowPart]:
    """Parts that together cover all queries. Only on a CPU does the host read how many keys are valid."""
    for elements, used in _valid_keys(keys, batch, geometry):
        step = queries if isinstance(used, int) and not geometry.causal else _MASKED_QUERIES
        for first in range(0, queries, step):
            rows = slice(first, min(first + step, queries))
            # Without causal mask a query sees as many keys as the last one.
            before_last = torch.arange(
                rows.start + 1 - queries, rows.stop + 1 - queries, dtype=torch.int64, device=device
            ).unsqueeze(1)
            seen = before_last + used if geometry.causal else torch.zeros_like(before_last) + used
            read, all_seen = keys, False
            if isinstance(used, int):
                read = max(used - (queries - rows.stop if geometry.causal else 0), 0)
                all_seen = not geometry.causal or read == 0
            yield WindowPart(
                elements, rows, read, None if all_seen else torch.arange(read, dtype=torch.int64, device=device) >= seen
            )


def _valid_keys(keys: int, batch: int, geometry: Geometry) -> Iterator[tuple[slice, int | Tensor]]:
    """Batch elements, and how many leading keys are valid in them: an int where the host may know it."""
    if geometry.seqused_k is None:
        yield slice(0, batch), keys
        return
    used = geometry.seqused_k.clamp(0, keys)
    for b in range(batch):
        yield slice(b, b + 1), int(used[b]) if on_host(used) else used[b]


def window_of(x: Tensor, geometry: Geometry) -> Tensor:
    """The keys or values (B, Lk, Hkv, D) of the window: a copy where x holds stored frames, else x itself."""
    if geometry.window_slots is None:
        return x
    each = torch.arange(x.shape[0], dtype=torch.int64, device=x.device).unsqueeze(1)
    return x.unflatten(1, (-1, geometry.frame_tokens))[each, _stored_frames_of(x, geometry)].flatten(1, 2)


def gradient_of_stored(grad: Tensor | None, x: Tensor, geometry: Geometry) -> Tensor | None:
    """The gradient of x from that of `window_of(x, geometry)`: frames that are in the window twice add up."""
    if grad is None or geometry.window_slots is None:
        return grad
    made = torch.zeros(x.shape, dtype=wide_dtype(x.dtype), device=x.device)
    frames = made.unflatten(1, (-1, geometry.frame_tokens))  # a view, like those of its batch elements
    for b, slots in enumerate(_stored_frames_of(x, geometry)):
        frames[b].index_add_(0, slots, grad[b].to(made.dtype).unflatten(0, (-1, geometry.frame_tokens)))
    return made


def _stored_frames_of(x: Tensor, geometry: Geometry) -> Tensor:
    """(B, W) int64: which frame of x each frame of the window is."""
    assert geometry.window_slots is not None
    return geometry.window_slots.clamp(0, geometry.stored_frames(x) - 1).long()


def without_invalid(k: Tensor, v: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """k and v (B, Lk, Hkv, D), 0 where keys are not valid. The same tensors where the host knows what not to read."""
    if geometry.seqused_k is None or on_host(geometry.seqused_k):
        return k, v
    invalid = torch.arange(k.shape[1], dtype=torch.int64, device=k.device) >= geometry.seqused_k.unsqueeze(1)
    return tuple(x.masked_fill(invalid[..., None, None], 0.0) for x in (k, v))  # type: ignore[return-value]


def attend_window(
    attention: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    state: tuple[Tensor, Tensor],
) -> None:
    """Write attention from q (B, Lq, H, D) to the window over `state`, which holds 0 and -inf.

    attention(q, k, v, scale, bias=None) takes q [b, h, n, D], k and v [b, h, S, D] and a bias [b, h, n, S] of 0 and
    -inf, and returns out and LSE.
    """
    batch, queries, heads, _ = q.shape
    kv_heads = k.shape[2]
    k, v = without_invalid(k, v, geometry)
    for part in window_parts(queries, k.shape[1], batch, geometry, q.device):
        if not part.keys:
            continue
        at = (part.batch, part.queries)
        attend = attention
        if part.hidden is not None:
            # As in attend_folded, the query heads that share a key head are more queries of it.
            bias = torch.zeros_like(part.hidden, dtype=q.dtype).masked_fill_(part.hidden, -torch.inf)
            bias = bias.repeat(heads // kv_heads, 1).expand(len(range(batch)[part.batch]), kv_heads, -1, -1)
            attend = partial(attention, bias=bias)
        keys, values = (x[part.batch, : part.keys] for x in (k, v))
        out, lse = attend_folded(attend, q[at], keys, values, geometry.softmax_scale)
        if part.hidden is not None:
            empty = part.hidden.all(-1)
            out.masked_fill_(empty[:, None, None], 0.0)
            lse.masked_fill_(empty, -torch.inf)
        state[0][at] = out
        state[1][part.batch, :, part.queries] = lse
