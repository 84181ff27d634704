"""The score "normalised": parts of a query group, each with one vote, whatever the size of its scores.

A part of up to PART_QUERIES queries has a score by moments for every block, which estimates the logarithm of the mass
that its queries give to the block. Less the logarithm of the sum over all blocks it is the logarithm of a share, and a
group's score is the logarithm of its parts' shares, added up. A first launch finds the sums; the launch that ranks the
blocks computes the scores again, part by part, so that no score reaches memory.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import PART_QUERIES, Geometry
from memflow_ops.kernels.configs import span_config
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import row_pointers, strided
from memflow_ops.kernels.selection.describe import plan_block_means
from memflow_ops.kernels.selection.scores import (
    DescribedBank,
    add_length,
    choosable,
    descriptor_pointers,
    descriptors_of_head,
    differs_by_group,
    score_tile,
    valid_blocks_of_rows,
)

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


class Parts(NamedTuple):
    """Arguments of a kernel that ranks blocks for groups of several parts."""

    totals: Any
    """(B, H, parts of all groups) float32, contiguous: what is taken from the scores of each part."""
    of_group: Any
    """P, the parts of a whole group; the last group may have fewer."""
    count: Any
    """The parts of all groups."""


@triton.jit
def finite(x):
    """x, with the largest float32 numbers in the place of infinities."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


# FLOPs: 2 * G * P * N * 2 D, IEEE float32. Bytes: the features, the descriptors once per ROWS parts (from L2).
@triton.jit
def part_totals_kernel(
    features,  # Strided (B, parts of all groups, H, 2 D) float32
    bank,  # DescribedBank
    totals,  # written: (B, H, parts of all groups) float32, contiguous
    parts,  # P, of a whole group
    part_count,  # of all groups
    queries,
    query_group,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART: tl.constexpr,  # queries of a whole part
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM_TILE: tl.constexpr,
    BY_GROUP: tl.constexpr,  # groups differ in how many frames are valid
):
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < part_count
    feature_rows = row_pointers(features, batch, rows.to(tl.int64), head)
    descriptors = descriptors_of_head(bank, batch, head // HEADS_PER_KV_HEAD)
    valid_blocks, each = valid_blocks_of_rows(bank, batch, rows // parts, row_mask, BY_GROUP)
    top = tl.full([ROWS], -LARGEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, valid_blocks, COLUMNS):
        blocks = first + tl.arange(0, COLUMNS)
        valid = blocks < valid_blocks
        pointers = descriptor_pointers(descriptors, blocks, valid)
        scores = score_tile(None, feature_rows, row_mask, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
        scores = add_length(scores, descriptors, blocks[None, :])
        counted = choosable(blocks, each, BY_GROUP) & (scores == scores)
        scores = tl.where(counted, scores, float("-inf"))
        higher = finite(tl.maximum(top, tl.max(scores, 1)))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        top = higher
    # With the logarithm of the part's queries: that many votes it has.
    start = rows % parts * PART
    count = tl.minimum(tl.minimum(query_group - start, queries - rows // parts * query_group - start), PART)
    votes = tl.log(tl.where(row_mask, count, 1).to(tl.float32))
    offsets = (batch * tl.num_programs(1) + head) * part_count + rows
    tl.store(totals + offsets, finite(top + tl.log(total)) - votes, mask=row_mask)


@triton.jit
def normalised_scores(
    features,  # Strided (B, parts of all groups, H, 2 D) float32
    parts,  # Parts
    descriptors,  # HeadDescriptors
    batch,
    head,
    heads,
    groups,  # [ROWS]
    row_mask,  # [ROWS]
    blocks,  # [COLUMNS]
    valid,  # [COLUMNS]
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr,
):
    """Scores [ROWS, COLUMNS] of groups in float32, NaN for blocks that are not valid."""
    pointers = descriptor_pointers(descriptors, blocks, valid)
    top = tl.full([ROWS, COLUMNS], -LARGEST, tl.float32)
    mass = tl.zeros([ROWS, COLUMNS], tl.float32)
    for part in range(parts.of_group):
        rows = groups * parts.of_group + part
        exists = row_mask & (rows < parts.count)
        feature_rows = row_pointers(features, batch, rows.to(tl.int64), head)
        scores = score_tile(None, feature_rows, exists, pointers, valid, ROWS, COLUMNS, HEAD_DIM, DIM_TILE)
        scores = add_length(scores, descriptors, blocks[None, :])
        offsets = (batch * heads + head) * parts.count + rows
        total = tl.load(parts.totals + offsets, mask=exists, other=0.0)
        scores = tl.where(exists[:, None], scores - total[:, None], float("-inf"))
        # A maximum may drop NaN, but the exponential of the difference keeps it.
        higher = finite(tl.maximum(top, scores))
        mass = mass * tl.exp(top - higher) + tl.exp(scores - higher)
        top = higher
    return tl.where(valid[None, :], top + tl.log(mass), float("nan"))


def plan_parts(
    q: torch.Tensor, bank: DescribedBank, kv_heads: int, geometry: Geometry
) -> tuple[list[Launch], torch.Tensor, Parts]:
    """The launches that fill the features (B, parts of all groups, H, 2 D) and the totals of all parts, and these."""
    batch, queries, heads, head_dim = q.shape
    group, parts, scale = geometry.query_group, geometry.parts, geometry.softmax_scale
    whole = queries // group * group
    count = queries // group * parts + cdiv(queries - whole, PART_QUERIES)
    features = torch.empty((batch, count, heads, 2 * head_dim), dtype=torch.float32, device=q.device)
    launches = []
    # Parts do not cross groups, and the last group may be shorter than the others.
    last = queries // group * parts
    for some, length, of_some in (
        (q[:, :whole], group, features[:, :last]),
        (q[:, whole:], queries - whole, features[:, last:]),
    ):
        if some.shape[1]:
            factors = (scale, scale**2 / 2)
            launch, _ = plan_block_means(some, PART_QUERIES, length, torch.float32, "square", factors, of_some)
            launches.append(launch)
    totals = torch.empty((batch, heads, count), dtype=torch.float32, device=q.device)
    tiles, options = span_config()
    arguments = dict(
        features=strided(features),
        bank=bank,
        totals=totals,
        parts=parts,
        part_count=count,
        queries=queries,
        query_group=group,
        HEADS_PER_KV_HEAD=heads // kv_heads,
        HEAD_DIM=2 * head_dim,
        PART=PART_QUERIES,
        BY_GROUP=differs_by_group(geometry.memory_frames),
        **tiles,
    )
    launches.append(Launch(part_totals_kernel, (cdiv(count, tiles["ROWS"]), heads, batch), arguments, options))
    return launches, features, Parts(totals, parts, count)
