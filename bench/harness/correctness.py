"""What every contender is held against before it is timed: float64, worked out here and by nothing that is measured.

A result that is off is an AssertionError, which says where and by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.bench.sizes import Size

KeysOf = Callable[[int, int], tuple[Tensor, Tensor]]
"""keys_of(head, group) -> keys and values (S, D) that this query group attends to."""

# Scores nearer to one another than this times sum(|q| |d|) may be ranked either way: the op's contract.
_ALIKE = 2**-18
# Of sums in float32 of a frame's values, before they are rounded to their dtype.
_SUMMED = 2e-6
# Frames that are taken in float64 at a time.
_FRAMES = 40
# Queries of a group whose attention is checked, of heads between the first and the last.
_INNER_QUERIES = 32


def sampled(heads: int, groups: int) -> Iterator[tuple[int, int]]:
    """The heads and query groups that are checked: every head, those between the first and the last in one group each,
    which moves on with the head."""
    for head in range(heads):
        outer = head in (0, heads - 1)
        for group in sorted({0, groups // 2, groups - 1}) if outer else [head * groups // heads]:
            yield head, group


def rows_of(size: Size, group: int) -> slice:
    """The queries of a group."""
    return slice(group * size.query_group, (group + 1) * size.query_group)


def selected_tokens(size: Size, blocks: Tensor, slots: Tensor | None = None) -> Tensor:
    """Tokens of the bank in a query group's selected blocks; slots: the frame of the pool that each bank frame is."""
    blocks = blocks[blocks >= 0].long()
    frame, start = blocks // size.blocks_per_frame, blocks % size.blocks_per_frame * size.block_size
    frame = frame if slots is None else slots[frame].long()
    within = start[:, None] + torch.arange(size.block_size, device=blocks.device)
    return (frame[:, None] * size.frame_tokens + within)[within < size.frame_tokens]


# -------------------------------------------------------------------------------------------------- means and selection


def check_rounded(found: Tensor, exact: Tensor, what: str) -> None:
    """found is exact, computed in float32 or wider and rounded once to its dtype."""
    off = (found.double() - exact).abs()
    allowed = torch.finfo(found.dtype).eps / 2 * exact.abs() + _SUMMED * max(1.0, float(exact.abs().max()))
    wrong = ~(off <= allowed)  # so that NaN is wrong
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} values are off, by up to {off.max():.2e}"


def check_means(means: Tensor, keys: Tensor, count: int, frame_tokens: int, what: str) -> None:
    """means (N, ..., D) against those of every `count` consecutive keys of a frame, the last of a frame of the rest;
    keys (F * T, ..., D)."""
    frames = keys.unflatten(0, (-1, frame_tokens))
    of_frames = means.unflatten(0, (len(frames), -1))
    assert of_frames.shape[1] == -(-frame_tokens // count), f"{what}: {of_frames.shape[1]} of a frame"
    for first in range(0, len(frames), _FRAMES):
        some = slice(first, first + _FRAMES)
        exact = torch.stack([block.mean(1) for block in frames[some].double().split(count, 1)], 1)
        check_rounded(of_frames[some], exact, f"{what}, frame {first} and on")


def check_selection(tile: Tensor, described: Tensor, chosen: Tensor, count: int, where: str, alike: float = 0) -> None:
    """chosen (K,): the `count` of described (N, D) whose products with the mean of the queries tile (n, D) are highest.

    Those whose products rounding cannot tell apart may stand for one another: alike, or what the op's contract allows
    where that is more, times sum(|q| |d|).
    """
    listed = chosen[chosen >= 0].long()
    mean, table = tile.double().mean(0), described.double()
    count = min(count, len(table))
    assert len(listed) == count, f"{where}: {len(listed)} are selected, expected {count}"
    assert len(listed.unique()) == count and int(listed.max()) < len(table), f"{where}: {listed.tolist()} are selected"
    scores = table @ mean
    others = torch.ones_like(scores, dtype=torch.bool)
    others[listed] = False
    if others.any():
        best = scores.masked_fill(~others, -torch.inf).argmax()
        missed = float(scores[best] - scores[listed].min())
        allowed = max(alike, _ALIKE) * float((table.abs() @ mean.abs()).max())
        assert missed <= allowed, (
            f"{where}: {int(best)} is left out, whose score is higher by {missed:.2e} than one that is selected"
        )


def exact_projection(x: Tensor, rotation: tuple[Tensor, Tensor], weight: Tensor | None, eps: float) -> Tensor:
    """What the cache and the attention make of projected queries or keys (B, L, H, D): RMSNorm over all heads (no
    weight: it is behind them), then RoPE by the cosines and sines (1, L, 1, D / 2) of each interleaved pair."""
    x = x.double()
    if weight is not None:
        flat = x.flatten(2)
        x = (flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).view(x.shape)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(*(part.double() for part in rotation))).flatten(-2)


# ------------------------------------------------------------------------------------------------------------ attention


def check_attention(size: Size, q: Tensor, out: Tensor, keys_of: KeysOf) -> None:
    """out (1, Lq, H, D) against float64 in every head, on a sample of query groups.

    float32 to 1e-5; half precisions to twice the error of torch's own attention in that dtype over the same keys, and
    two roundings of the largest output. On average (the root of the mean square) to 2.5 times that error: a block in
    another's place moves most outputs by less than the largest is rounded.
    """
    assert out.shape == q.shape, f"shape {tuple(out.shape)}, expected {tuple(q.shape)}"
    heads = q.shape[2]
    for head, group in sampled(heads, -(-q.shape[1] // size.query_group)):
        rows = rows_of(size, group)
        if 0 < head < heads - 1:
            count = len(range(q.shape[1])[rows])
            rows = slice(rows.start, rows.stop, max(1, count // _INNER_QUERIES))
        tile, (keys, values) = q[0, rows, head], keys_of(head, group)
        exact = attend_one_head(tile.double(), keys.double(), values.double())
        off = out[0, rows, head].double() - exact
        limit = mean_limit = 1e-5
        if q.dtype != torch.float32:
            theirs = attend_one_head(tile, keys, values).double() - exact
            limit = 2 * float(theirs.abs().max()) + 2 * torch.finfo(q.dtype).eps * float(exact.abs().max())
            mean_limit = 2.5 * _mean_size(theirs)
        error, mean = float(off.abs().max()), _mean_size(off)
        where = f"head {head}, group {group}"
        assert error <= limit, f"{where}: error {error:.2e}, at most {limit:.2e} is allowed"
        assert mean <= mean_limit, f"{where}: mean error {mean:.2e}, at most {mean_limit:.2e} is allowed"


def attend_one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By torch: (n, D) over (S, D)."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def _mean_size(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def check_copy(call: Callable[[], object], kept: list[Tensor], given: list[Tensor]) -> None:
    """The call leaves copies of `given` in `kept`."""
    for x in kept:
        x.fill_(torch.nan)
    call()
    assert all(torch.equal(x, of) for x, of in zip(kept, given, strict=True)), "not a copy"
