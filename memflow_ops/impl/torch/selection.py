"""Block descriptors and the selection of blocks, vectorised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.geometry import PART_QUERIES, Geometry
from memflow_ops.impl.precision import wide_dtype
from memflow_ops.impl.torch.gather import SCORE_ELEMENTS, on_host


def describe_blocks(k: Tensor, block_size: int, frame_tokens: int, moments: int = 1) -> Tensor:
    batch, tokens, heads, size = k.shape
    frames = k.unflatten(1, (-1, frame_tokens)) if tokens else k.view(batch, 0, frame_tokens, heads, size)
    whole = frame_tokens // block_size * block_size
    parts = []
    if whole:
        parts.append(_described(frames[:, :, :whole].unflatten(2, (-1, block_size)), moments))
    if whole < frame_tokens:
        parts.append(_described(frames[:, :, None, whole:], moments))
    return torch.cat(parts, 2).flatten(1, 2).to(k.dtype)


def _described(blocks: Tensor, moments: int) -> Tensor:
    """The descriptors [B, F, n, Hkv, D or 2 D], not yet rounded, of blocks [B, F, n, tokens, Hkv, D]."""
    mean = blocks.mean(3, dtype=wide_dtype(blocks.dtype))
    if moments == 1:
        return mean
    # Two passes, because the mean of squares less the square of the mean cancels where keys lie far from 0.
    variance = (blocks - mean.unsqueeze(3)).square_().mean(3)
    return torch.cat([mean, variance.clamp_(max=torch.finfo(blocks.dtype).max)], -1)


def describe_blocks_backward(grad: Tensor, k: Tensor | None, block_size: int, frame_tokens: int) -> Tensor:
    """The gradient (B, Lm, Hkv, D) of the keys, given grad (B, N, Hkv, D or 2 D) of the descriptors.

    k: the keys, where descriptors have variances; a variance that was limited is taken for one that was not.
    """
    blocks = -(-frame_tokens // block_size)
    lengths = torch.full((blocks,), block_size, dtype=torch.int64, device=grad.device)
    lengths[-1] = frame_tokens - (blocks - 1) * block_size

    def of_tokens(x: Tensor) -> Tensor:
        """The number of its block [B, N, Hkv, D] for every token (B, Lm, Hkv, D)."""
        return x.unflatten(1, (-1, blocks)).repeat_interleave(block_size, 2)[:, :, :frame_tokens].flatten(1, 2)

    shares = (grad.unflatten(1, (-1, blocks)) / lengths.view(-1, 1, 1)).flatten(1, 2)
    if k is None:
        return of_tokens(shares).to(grad.dtype)
    of_mean, of_variance = shares.to(wide_dtype(k.dtype)).chunk(2, -1)
    means = describe_blocks(k.to(wide_dtype(k.dtype)), block_size, frame_tokens)
    return (of_tokens(of_mean) + 2 * (k - of_tokens(means)) * of_tokens(of_variance)).to(grad.dtype)


def select_blocks(q: Tensor, descriptors: Tensor, top_k: int, geometry: Geometry) -> Tensor:
    batch, _, heads, _ = q.shape
    blocks_per_frame, memory_slots = geometry.blocks_per_frame, geometry.memory_slots
    if memory_slots is not None:
        frames = descriptors.unflatten(1, (-1, blocks_per_frame))
        slots = memory_slots.clamp(0, frames.shape[1] - 1)
        descriptors = frames[torch.arange(batch, dtype=torch.int64, device=q.device).unsqueeze(1), slots].flatten(1, 2)
    blocks = descriptors.shape[1]
    entries = min(top_k, blocks)
    wide = wide_dtype(q.dtype)
    # Selections must agree, whatever precision torch allows for float32 products (TF32, bfloat16). Asking for another
    # precision would change it for the whole process; float64 has no such setting, and is the more exact.
    table = descriptors.permute(0, 2, 3, 1).double()  # [B, Hkv, D, N]
    parts = geometry.parts
    features = _features(q, geometry).transpose(1, 2).unflatten(1, (table.shape[1], -1))  # [B, Hkv, rep, G * P, 2 D]
    repeats, groups = features.shape[2], features.shape[3] // parts
    if not entries:
        return q.new_empty((batch, heads, groups, 0), dtype=torch.int32)
    valid = _valid_blocks(geometry, blocks)
    last_block = geometry.last_block_score
    found = []
    step = max(1, SCORE_ELEMENTS // (batch * heads * blocks * parts))
    for first in range(0, groups, step):
        some = features[:, :, :, first * parts : (first + step) * parts]
        counts = valid if valid is None or valid.shape[3] == 1 else valid[:, :, :, first : first + step]
        scores = some.flatten(2, 3).double() @ table
        if last_block:
            scores[..., blocks_per_frame - 1 :: blocks_per_frame] += last_block
        scores = scores.unflatten(2, (repeats, -1))  # [B, Hkv, rep, g * P, N]
        if parts > 1:
            scores = _normalised(scores, _part_lengths(q, geometry)[first : first + step], counts)
        scores = scores.to(wide)  # [B, Hkv, rep, g, N]
        order = _highest(scores, entries, counts).sort(-1).values
        if counts is not None:
            order.masked_fill_(order >= counts, -1)
        found.append(order.to(torch.int32).flatten(1, 2))
    return found[0] if len(found) == 1 else torch.cat(found, 2)


def _valid_blocks(geometry: Geometry, blocks: int) -> Tensor | None:
    """How many leading blocks of the bank are valid, [B, 1, 1, 1 or G, 1]; None: all of them."""
    memory_frames, frames = geometry.memory_frames, blocks // geometry.blocks_per_frame
    if memory_frames is None or (on_host(memory_frames) and int(memory_frames.min()) >= frames):
        return None
    return (memory_frames.clamp(0, frames) * geometry.blocks_per_frame).reshape(len(memory_frames), 1, 1, -1, 1)


def _normalised(scores: Tensor, lengths: Tensor, valid: Tensor | None) -> Tensor:
    """The scores [B, Hkv, rep, G, N] of groups, as for the reference, of those of their parts [B, Hkv, rep, G * P, N].

    lengths: (G, P) queries of each part. valid: [B, 1, 1, 1 or G, 1], only so many blocks count; None: all.
    """
    scores = scores.unflatten(3, lengths.shape)  # [B, Hkv, rep, G, P, N]
    counted = scores.isnan().logical_not_()
    if valid is not None:
        each = torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device)
        counted &= each < valid.unsqueeze(4)
    largest = torch.finfo(scores.dtype).max
    totals = scores.masked_fill(~counted, -torch.inf).logsumexp(-1, keepdim=True).clamp_(-largest, largest)
    masses = scores - totals + lengths.to(scores.dtype).log().unsqueeze(-1)
    return masses.masked_fill((lengths == 0).unsqueeze(-1), -torch.inf).logsumexp(4)


def _part_lengths(q: Tensor, geometry: Geometry) -> Tensor:
    """The queries of each part of each group, (G, P) int64; the last group may lack parts."""
    groups, group = geometry.query_groups(q.shape[1]), geometry.query_group
    number = torch.arange(groups, dtype=torch.int64, device=q.device).unsqueeze(1)
    first = torch.arange(geometry.parts, dtype=torch.int64, device=q.device) * PART_QUERIES
    ends = (q.shape[1] - number * group).clamp(max=group)
    return (ends - first).clamp(0, PART_QUERIES)


def _features(q: Tensor, geometry: Geometry) -> Tensor:
    """What descriptors are multiplied with: (B, G, H, D) means of queries, or [mean, square] as for the reference.

    With several parts in a group those of the parts, (B, G * P, H, 2 D).
    """
    if geometry.parts > 1:
        return _part_features(q, geometry)
    means = _group_means(q, geometry.query_group)
    if geometry.score == "mean":
        return means
    scale = geometry.softmax_scale
    squares = _group_means(q.to(wide_dtype(q.dtype)).square(), geometry.query_group)
    return torch.cat([scale * means, scale**2 / 2 * squares], -1)


def _part_features(q: Tensor, geometry: Geometry) -> Tensor:
    """The features (B, G * P, H, 2 D) of the parts of all groups; 0 for parts that the last group lacks."""
    scale, group, parts = geometry.softmax_scale, geometry.query_group, geometry.parts
    groups = geometry.query_groups(q.shape[1])
    padded = F.pad(q.to(wide_dtype(q.dtype)), (0, 0, 0, 0, 0, groups * group - q.shape[1])).unflatten(1, (-1, group))
    padded = F.pad(padded, (0, 0, 0, 0, 0, parts * PART_QUERIES - group)).unflatten(2, (parts, PART_QUERIES))
    lengths = _part_lengths(q, geometry).clamp_(min=1).view(1, groups, parts, 1, 1)
    means, squares = padded.sum(3) / lengths, padded.square().sum(3) / lengths
    return torch.cat([scale * means, scale**2 / 2 * squares], -1).flatten(1, 2)


def _group_means(q: Tensor, group: int) -> Tensor:
    """The means (B, G, H, D) of the groups of q (B, Lq, H, D), float32 or wider. The last group may be short."""
    wide = wide_dtype(q.dtype)
    if group == 1:
        return q.to(wide)
    whole = q.shape[1] // group * group
    parts = [q[:, :whole].unflatten(1, (-1, group)).mean(2, dtype=wide)] if whole else []
    if whole < q.shape[1]:
        parts.append(q[:, whole:].mean(1, keepdim=True, dtype=wide))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _highest(scores: Tensor, count: int, valid: Tensor | None) -> Tensor:
    """Indices [..., count], in no order, of the highest scores [..., N]; equal scores go to the lower index.

    Only the first `valid` scores count (None: all): the others come last.
    """
    # Ranks are integers in the order of the scores: -0 equals +0, NaN has the lowest rank but one, and what is not
    # valid has the lowest.
    integer = {torch.float32: torch.int32, torch.float64: torch.int64}[scores.dtype]
    largest, lowest = torch.iinfo(integer).max, torch.iinfo(integer).min
    bits = (scores + 0.0).view(integer)  # Adding +0 turns -0 into +0.
    ranks = (bits >> torch.iinfo(integer).bits - 1).bitwise_and_(largest).bitwise_xor_(bits)
    ranks.masked_fill_(scores.isnan(), lowest + 1)
    if valid is not None:
        each = torch.arange(scores.shape[-1], dtype=torch.int64, device=scores.device)
        ranks.masked_fill_(each >= valid, lowest)
    if integer is torch.int64:
        return torch.sort(ranks, dim=-1, descending=True, stable=True).indices[..., :count]
    # With rank and index in one integer there are no ties, and topk is six times faster than a stable sort.
    backwards = torch.arange(scores.shape[-1] - 1, -1, -1, dtype=torch.int64, device=scores.device)
    return torch.add(backwards, ranks, alpha=2**32).topk(count, -1, sorted=False).indices
