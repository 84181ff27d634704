"""What a selection keeps: of one call of attention, the bank's true mass in the chosen blocks, and the output's error.

The truth is dense attention over the local window and the whole memory bank, in float32 or wider. A block's mass is the
sum of its keys' probabilities there. Each way to choose ranks all blocks for every query, so that its choices for all
budgets are found at once: the first k of the ranking are exactly what `select_blocks` takes.

The oracle ranks by the true mass that a query group gives to a block. No choice of as many blocks, the same for the
group, captures more. (The oracle's output error is not the least possible one; to find that would take a search.)
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops import describe_blocks
from memflow_ops.geometry import PART_QUERIES, Score

Ranking = Literal["top", "moments", "normalised", "oracle", "random"]
SCORE_OF: dict[Ranking, Score] = {"top": "mean", "moments": "moments", "normalised": "normalised"}
"""The rankings that `select_blocks` makes, and the scores that they go by."""
ELEMENTS = 1 << 25
"""Numbers in the largest intermediate result: 128 MiB in float32. A few of that size are held at a time."""


class Choice(NamedTuple):
    """A way to choose blocks of the bank, for any budget."""

    blocks: Ranking
    """those of the highest score by means, by moments or normalised, as `select_blocks`; those of the most true mass;
    or random ones for every query"""
    block_size: int
    query_group: int | None
    """consecutive queries that share a selection; None: the whole chunk"""


@dataclass(frozen=True)
class SampledCall:
    """One call of attention, of one story and H heads, with the queries that are measured."""

    q: Tensor
    """(H, Lq, D), all queries of the chunk: their means make the groups' descriptors"""
    measured: Tensor
    """(n,) int64, ascending: indices of the queries that are measured"""
    k: Tensor
    """(H, Lk, D), keys of the local window, always attended to; Lk may be 0"""
    v: Tensor
    """(H, Lk, D)"""
    bank_k: Tensor
    """(H, F, T, D), F frames of T tokens"""
    bank_v: Tensor
    """(H, F, T, D)"""

    @property
    def frame_tokens(self) -> int:
        return self.bank_k.shape[2]

    @property
    def bank_tokens(self) -> int:
        return self.bank_k.shape[1] * self.frame_tokens


@dataclass
class ChoiceSums:
    """Sums over the measured queries, per budget (K,) and head (H,), float64, on the CPU.

    Budget 0 is the window alone, and the last budget takes all blocks.
    """

    budgets: list[int]
    captured: Tensor  # (K, H) mass in the chosen blocks
    bank: Tensor  # (H,) mass in all blocks
    error: Tensor  # (K, H) squared distance to the dense output
    dense: Tensor  # (H,) squared length of the dense output
    keys: Tensor  # (K, H) keys of the chosen blocks
    queries: int


def budgets(blocks: int) -> list[int]:
    """The budgets for a bank of so many blocks: 0, 1, 2, 3, 4, 6, 8, 12, ... and all."""
    steps = {0, 1, blocks}
    for power in range(1, blocks.bit_length()):
        steps |= {1 << power, 3 << power - 1}
    return sorted(step for step in steps if step <= blocks)


def choices_to_compare(
    block_sizes: Sequence[int], query_groups: Sequence[int | None], frame_tokens: int
) -> list[Choice]:
    """All choices that `measure_call` compares.

    These are the groups' own choices and the oracle's, random ones, and whole frames chosen once for the chunk by their
    means, as the released MemFlow activates them. Impossible sizes raise a ValueError.
    """
    for name, sizes in (("block_size", block_sizes), ("query_group", query_groups)):
        if not sizes:
            raise ValueError(f"at least one {name} is needed")
        for size in sizes:
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be a positive number, got {size!r}")
    too_large = [size for size in block_sizes if size > frame_tokens]
    if too_large:
        raise ValueError(f"a block lies inside a frame of {frame_tokens} tokens, got block_size={max(too_large)}")
    shared = [(size, group) for size in block_sizes for group in query_groups] + [(frame_tokens, None)]
    found = {Choice("random", size, 1) for size, _ in shared}
    for size, group in shared:
        several = group is None or group > PART_QUERIES  # of one part, normalising keeps the order
        found |= {
            Choice(blocks, size, group)
            for blocks in get_args(Ranking)
            if blocks != "random" and (several or blocks != "normalised")
        }
    order = get_args(Ranking)
    return sorted(found, key=lambda c: (c.block_size, c.query_group or math.inf, order.index(c.blocks)))


def measure_call(
    call: SampledCall, compared: Sequence[Choice], generator: torch.Generator | None = None
) -> dict[Choice, ChoiceSums]:
    """What each choice captures and misses at every budget. generator (on the CPU): of the random choices."""
    measured: dict[Choice, ChoiceSums] = {}
    for size in dict.fromkeys(choice.block_size for choice in compared):
        of_size = [choice for choice in compared if choice.block_size == size]
        measured.update(_measure(call, of_size, size, generator))
    return {choice: measured[choice] for choice in compared}


def _measure(
    call: SampledCall, compared: Sequence[Choice], block: int, generator: torch.Generator | None
) -> Iterator[tuple[Choice, ChoiceSums]]:
    """Measures all choices of one block size, in parts of the queries that fit into ELEMENTS numbers."""
    heads, size = call.q.shape[0], call.q.shape[-1]
    bank_v = _blocks(_wide(call.bank_v).permute(0, 3, 1, 2), block).permute(0, 2, 3, 1)  # [H, N, block, D]
    lengths = _blocks(call.bank_k.new_ones(1, *call.bank_k.shape[1:3]), block).sum(-1)  # [1, N]
    count = lengths.shape[-1]
    steps = torch.tensor(budgets(count), device=call.q.device, dtype=torch.long)
    ranks = torch.arange(count, device=steps.device, dtype=torch.long)
    first_budget = torch.bucketize(ranks, steps, right=True)  # by rank
    per_query = heads * (call.k.shape[1] + 2 * call.bank_tokens + (count + len(steps)) * (size + 2))
    parts = call.measured.split(max(1, ELEMENTS // per_query))

    masses = torch.cat([_blocks(_attention(call, queries)[2], block).sum(-1) for queries in parts], 1)  # [H, n, N]
    ranked = [_ranked(call, choice, masses, generator) for choice in compared]
    sums = [torch.zeros(len(steps), 4, heads, dtype=torch.float64, device=call.q.device) for _ in compared]
    places = torch.arange(len(call.measured), device=steps.device, dtype=torch.long).split(len(parts[0]))
    for part, queries in zip(places, parts, strict=True):
        window_out, window_mass, p = _attention(call, queries)
        weights = _blocks(p, block)  # [H, n, N, block]
        outs = torch.einsum("hnjt,hjtd->hnjd", weights, bank_v)
        extra = torch.stack([masses[:, part], lengths.expand(heads, len(queries), -1)], -1).to(outs)
        table = torch.cat([outs, extra], -1)  # [H, n, N, D + 2]
        for (ranks, member), total in zip(ranked, sums, strict=True):
            # Rankings nest: a budget's sum is that of the budget before and what it adds to it.
            added = first_budget[ranks[:, member[part]]][..., None].expand_as(table)  # [H, n, N, D + 2]
            found = table.new_zeros(*table.shape[:2], len(steps), size + 2).scatter_add_(2, added, table).cumsum(2)
            mass, keys = found[..., size], found[..., size + 1]
            out = (window_out[:, :, None] + found[..., :size]) / (window_mass[:, :, None] + mass)[..., None]
            out = out.nan_to_num(nan=0.0)  # without window and block there is nothing to attend to
            dense = out[:, :, -1:]
            squares = [(out - dense).square().sum(-1), dense.square().sum(-1).expand_as(mass)]
            total += torch.stack([mass, keys, *squares]).double().sum(2).permute(2, 0, 1)
    for choice, total in zip(compared, sums, strict=True):
        captured, keys, error, dense = total.cpu().unbind(1)
        yield choice, ChoiceSums(steps.tolist(), captured, captured[-1], error, dense[-1], keys, len(call.measured))


def _attention(call: SampledCall, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention of some queries, given by their indices (n,).

    Gives the sum of the window's weighted values [H, n, D], the window's mass [H, n], and the probability of every key
    of the bank [H, n, F, T].
    """
    q = _wide(call.q[:, queries]) * call.q.shape[-1] ** -0.5
    near, far = q @ _wide(call.k).mT, q @ _wide(call.bank_k).flatten(1, 2).mT
    total = torch.logaddexp(near.logsumexp(-1), far.logsumexp(-1))[..., None]
    near, far = near.sub_(total).exp_(), far.sub_(total).exp_()
    return near @ _wide(call.v), near.sum(-1), far.unflatten(-1, call.bank_k.shape[1:3])


def _ranked(
    call: SampledCall, choice: Choice, masses: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """How a choice ranks the blocks. masses [H, n, N]: the true mass of every block for every measured query.

    Gives the rank of every block for each group that has measured queries [H, G, N], and each query's group (n,).
    """
    if choice.blocks == "random":
        drawn = torch.rand(masses.shape, generator=generator, dtype=torch.float32, device="cpu")
        each = torch.arange(len(call.measured), device=masses.device, dtype=torch.long)
        return drawn.argsort(-1).to(masses.device), each
    group = choice.query_group or call.q.shape[1]
    present, member = torch.unique(call.measured // group, return_inverse=True)
    if choice.blocks == "oracle":
        scores = masses.new_zeros(masses.shape[0], len(present), masses.shape[2]).index_add_(1, member, masses)
    else:
        scores = _scores(call, choice, [_wide(call.q[:, group * g : group * (g + 1)]) for g in present.tolist()])
    order = scores.nan_to_num(nan=-torch.inf).sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device, dtype=torch.long).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places), member


def _scores(call: SampledCall, choice: Choice, groups: list[Tensor]) -> Tensor:
    """The scores [H, G, N] by which groups of queries [H, n, D] rank the blocks, as in `select_blocks`."""
    if choice.blocks == "normalised":
        return torch.stack([_normalised(call, choice, group) for group in groups], 1)
    means = torch.stack([group.mean(1) for group in groups], 1)
    if choice.blocks == "top":
        return means @ _descriptors(call, choice, moments=1)
    return _log_masses(call, choice, means, torch.stack([group.square().mean(1) for group in groups], 1))


def _normalised(call: SampledCall, choice: Choice, group: Tensor) -> Tensor:
    """The normalised score [H, N] of the blocks for a group's queries [H, n, D]."""
    masses = []
    for part in group.split(PART_QUERIES, 1):
        x = _log_masses(call, choice, part.mean(1, keepdim=True), part.square().mean(1, keepdim=True))[:, 0]
        masses.append(x - x.logsumexp(-1, keepdim=True) + math.log(part.shape[1]))
    return torch.stack(masses).logsumexp(0)


def _log_masses(call: SampledCall, choice: Choice, means: Tensor, squares: Tensor) -> Tensor:
    """The score by moments [H, G, N] of groups whose queries and their squares have these means [H, G, D]."""
    scale = call.q.shape[-1] ** -0.5
    lengths = _blocks(torch.ones_like(call.bank_k[:1, :, :, 0]), choice.block_size).sum(-1)
    table = _descriptors(call, choice, moments=2)
    return torch.cat([scale * means, scale**2 / 2 * squares], -1) @ table + _wide(lengths).log()


def _descriptors(call: SampledCall, choice: Choice, moments: int) -> Tensor:
    """Those of the bank's blocks, [H, D or 2 D, N]."""
    keys = call.bank_k.flatten(1, 2).transpose(0, 1)[None]
    described = describe_blocks(keys, choice.block_size, call.frame_tokens, moments=moments)
    return _wide(described[0]).permute(1, 2, 0)


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., F, T], a number per token -> [..., N, block], those of every block. A short last block ends in zeros."""
    padded = F.pad(x, (0, -x.shape[-1] % block))
    return padded.unflatten(-1, (-1, block)).flatten(-3, -2)


def _wide(x: Tensor) -> Tensor:
    """In float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
