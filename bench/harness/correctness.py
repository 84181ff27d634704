"""What every contender is held against before it is timed: float64, computed here and by nothing that is measured.

A wrong result is an AssertionError that says where the result is wrong and by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.bench.sizes import Size

KeysOf = Callable[[int, int], tuple[Tensor, Tensor]]
"""keys_of(head, group) gives the keys and values (S, D) that this query group attends to."""

# Scores that differ by less than this times sum(|q| |d|) may be ranked either way: the op's contract.
_ALIKE = 2**-18
# The relative error of a sum in float32 of a frame's values, before it is rounded to their dtype.
_SUMMED = 2e-6
# Frames that are computed in float64 at a time.
_FRAMES = 40
# Queries of a group whose attention is checked, in the heads between the first and the last.
_INNER_QUERIES = 32
# Where query groups are shorter than this, as many in a row are checked together as hold so many queries.
_LEAST_QUERIES = 16


def sampled(heads: int, groups: int) -> Iterator[tuple[int, int]]:
    """Pairs (head, query group) to check.

    The first and the last head are checked in three groups, each head between them in one, which moves on with the
    head.
    """
    for head in range(heads):
        outer = head in (0, heads - 1)
        for group in sorted({0, groups // 2, groups - 1}) if outer else [head * groups // heads]:
            yield head, group


def queries_of(size: Size, group: int) -> slice:
    """The queries of a group."""
    return slice(group * size.query_group, (group + 1) * size.query_group)


def selected_tokens(size: Size, blocks: Tensor, slots: Tensor | None = None) -> Tensor:
    """The tokens of the bank in some blocks, block after block.

    blocks: (K,) indices of blocks; entries below 0 are unused. slots: (F,) the frame of the pool that each frame of the
    bank is stored in; None: the frame itself.
    """
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
    wrong = ~(off <= allowed)  # Written so that NaN is wrong.
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} values are off, by up to {off.max():.2e}"


def check_means(means: Tensor, keys: Tensor, count: int, frame_tokens: int, what: str) -> None:
    """means (N, ..., D) are those of every `count` consecutive keys of a frame; keys: (F * frame_tokens, ..., D).

    The last mean of a frame is that of the keys that are left.
    """
    frames = keys.unflatten(0, (-1, frame_tokens))
    of_frames = means.unflatten(0, (len(frames), -1))
    assert of_frames.shape[1] == -(-frame_tokens // count), f"{what}: {of_frames.shape[1]} of a frame"
    for first in range(0, len(frames), _FRAMES):
        some = slice(first, first + _FRAMES)
        exact = torch.stack([block.mean(1) for block in frames[some].double().split(count, 1)], 1)
        check_rounded(of_frames[some], exact, f"{what}, frame {first} and on")


def check_variances(variances: Tensor, keys: Tensor, count: int, frame_tokens: int, what: str) -> None:
    """variances (N, ..., D) are those of every `count` consecutive keys of a frame; all else as for `check_means`."""
    frames = keys.unflatten(0, (-1, frame_tokens)).double()
    exact = torch.stack([block.var(1, unbiased=False) for block in frames.split(count, 1)], 1)
    check_rounded(variances.unflatten(0, (len(frames), -1)), exact, what)


def check_selection(
    tile: Tensor,
    described: Tensor,
    chosen: Tensor,
    count: int,
    where: str,
    alike: float = 0,
    lengths: Tensor | None = None,
) -> None:
    """chosen (K,) are the `count` rows of described (N, D) whose products with the mean of tile (n, D) are highest.

    Rows whose products rounding cannot tell apart may stand for one another. alike: the difference of two such
    products, times sum(|q| |d|); the op's contract allows its own difference where that is larger. lengths: (N,) tokens
    of each block, where blocks are ranked by moments; described is (N, 2 D) then.
    """
    listed = chosen[chosen >= 0].long()
    mean, table = tile.double().mean(0), described.double()
    if lengths is not None:
        scale = tile.shape[1] ** -0.5
        squares = tile.double().square().mean(0)
        mean = torch.cat([scale * mean, scale**2 / 2 * squares, mean.new_ones(1)])
        table = torch.cat([table, lengths.double().log()[:, None]], 1)
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
    """Projected queries or keys (B, L, H, D) normalised over all heads and rotated, in float64.

    rotation: the cosines and sines (1, L, 1, D / 2) of each interleaved pair (RoPE). weight: of the RMSNorm; None where
    x is normalised already.
    """
    x = x.double()
    if weight is not None:
        flat = x.flatten(2)
        x = (flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()).view(x.shape)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(*(part.double() for part in rotation))).flatten(-2)


def block_lengths(size: Size, frames: int, device: torch.device) -> Tensor:
    """(N,) int64: tokens of each block in a bank of so many frames."""
    first = torch.arange(0, size.frame_tokens, size.block_size, device=device)
    return (size.frame_tokens - first).clamp(max=size.block_size).repeat(frames)


# ------------------------------------------------------------------------------------------------------------ attention


def check_attention(size: Size, q: Tensor, out: Tensor, keys_of: KeysOf) -> None:
    """out (1, Lq, H, D) is attention from q in every head, on a sample of query groups.

    In float32 to 1e-5; in half precisions to twice the error of torch's own attention in that dtype over the same keys,
    and two roundings of the largest output. The root of the mean square of the error is limited to 2.5 times theirs,
    because a block in another's place moves most outputs by less than the rounding of the largest.
    """
    assert out.shape == q.shape, f"shape {tuple(out.shape)}, expected {tuple(q.shape)}"
    heads, groups = q.shape[2], -(-q.shape[1] // size.query_group)
    together = -(-_LEAST_QUERIES // size.query_group)
    for head, group in sampled(heads, groups):
        first = max(0, min(group, groups - together))
        parts = [
            _errors_of_group(size, q, out, keys_of, head, number)
            for number in range(first, min(first + together, groups))
        ]
        off, theirs, exact = (torch.cat(part) for part in zip(*parts, strict=True))
        limit = mean_limit = 1e-5
        if q.dtype != torch.float32:
            limit = 2 * float(theirs.abs().max()) + 2 * torch.finfo(q.dtype).eps * float(exact.abs().max())
            mean_limit = 2.5 * _root_mean_square(theirs)
        error, mean = float(off.abs().max()), _root_mean_square(off)
        where = f"head {head}, group {group}"
        assert error <= limit, f"{where}: error {error:.2e}, at most {limit:.2e} is allowed"
        assert mean <= mean_limit, f"{where}: mean error {mean:.2e}, at most {mean_limit:.2e} is allowed"


def _errors_of_group(
    size: Size, q: Tensor, out: Tensor, keys_of: KeysOf, head: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The error of out, the error of torch's attention in the same dtype, and exact attention, of a query group."""
    rows = queries_of(size, group)
    if 0 < head < q.shape[2] - 1:
        count = len(range(q.shape[1])[rows])
        rows = slice(rows.start, rows.stop, max(1, count // _INNER_QUERIES))
    tile, (keys, values) = q[0, rows, head], keys_of(head, group)
    exact = attend_one_head(tile.double(), keys.double(), values.double())
    theirs = attend_one_head(tile, keys, values).double() - exact
    return out[0, rows, head].double() - exact, theirs, exact


def attend_one_head(q: Tensor, k: Tensor, v: Tensor, attended: Tensor | None = None) -> Tensor:
    """Torch's attention from q (n, D) to k, v (S, D). attended: (n, S), which keys each query attends to; None: all."""
    mask = None if attended is None else attended[None]
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]


def _root_mean_square(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def check_copy(call: Callable[[], object], targets: list[Tensor], sources: list[Tensor]) -> None:
    """The call copies `sources` to `targets`."""
    for x in targets:
        x.fill_(torch.nan)
    call()
    assert all(torch.equal(x, of) for x, of in zip(targets, sources, strict=True)), "not a copy"
