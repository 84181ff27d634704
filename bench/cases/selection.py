"""Selection: the blocks of every query group, and the descriptors that they are chosen by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops import describe_blocks, select_blocks
from memflow_ops.bench import inputs
from memflow_ops.bench.cases.attention_inputs import AttentionInputs, ours, selection_of
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.bench.harness.correctness import (
    block_lengths,
    check_copy,
    check_means,
    check_selection,
    check_variances,
    queries_of,
    sampled,
)
from memflow_ops.bench.sizes import Size


def select(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Built:
    """The blocks of every query group, by means; against mean, product and torch.topk, which leaves ties to chance, and
    beside the same by moments."""
    given = AttentionInputs.make(size, size.bank_frames, dtype, device, seed)
    groups, blocks = size.groups, given.descriptors.shape[1]
    missing = groups * size.query_group - size.queries

    def plain() -> Tensor:
        padded = F.pad(given.q, (0, 0, 0, 0, 0, missing)).unflatten(1, (groups, size.query_group)).float().sum(2)
        scores = torch.einsum("bghd,bnhd->bhgn", padded, given.descriptors.float())
        return scores.topk(min(size.top_k, blocks), -1, sorted=False).indices

    own = selection_contender(given)
    topk = Contender(plain, lambda: check_all(given, plain()), flops=own.flops, bytes=own.bytes)
    return Built({OURS: own, "topk": topk, "by moments": by_moments(given)})


def selection_contender(given: AttentionInputs) -> Contender:
    """select_blocks over stored descriptors."""
    size, blocks = given.size, given.descriptors.shape[1]

    def call() -> Tensor:
        return selection_of(size, given.q, given.descriptors, given.impl)

    return Contender(
        call,
        lambda: check_all(given, call()),
        flops=(size.queries + 2 * size.groups * blocks) * size.dim,
        bytes=(size.queries + blocks) * size.dim * given.q.element_size(),
    )


def by_moments(given: AttentionInputs) -> Contender:
    """select_blocks over stored descriptors of two moments."""
    size = given.size
    keys, _ = given.bank
    described = describe_blocks(keys, size.block_size, size.frame_tokens, moments=2, impl=given.impl)
    lengths = block_lengths(size, given.bank_frames, given.q.device)

    def call() -> Tensor:
        return select_blocks(
            given.q,
            described,
            size.top_k,
            query_group=size.query_group,
            block_size=size.block_size,
            frame_tokens=size.frame_tokens,
            score="moments",
            impl=given.impl,
        )

    def check() -> None:
        indices = call()
        for head, group in sampled(size.heads, size.groups):
            tile, where = given.q[0, queries_of(size, group), head], f"by moments, head {head}, group {group}"
            chosen = indices[0, head, group]
            check_selection(tile, described[0, :, head], chosen, size.top_k, where, lengths=lengths)

    plain = selection_contender(given)
    return Contender(call, check, flops=2 * plain.flops, bytes=plain.bytes + described.numel() // 2 * keys.itemsize)


def check_all(given: AttentionInputs, indices: Tensor) -> None:
    """Check a selection in a sample of query groups."""
    size = given.size
    for head, group in sampled(size.heads, size.groups):
        tile, table = given.q[0, queries_of(size, group), head], given.descriptors[0, :, head]
        check_selection(tile, table, indices[0, head, group], size.top_k, f"head {head}, group {group}")


def describe(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Built:
    """The descriptors of one frame, of one moment and of two; against a copy of its keys."""
    k = inputs.correlated_tokens(1, size.frame_tokens, size.heads, size.head_dim, dtype, seed, str(device))
    target = torch.empty_like(k)

    def described() -> Tensor:
        return describe_blocks(k, size.block_size, size.frame_tokens)

    def two_moments() -> Tensor:
        return describe_blocks(k, size.block_size, size.frame_tokens, moments=2)

    def check_two() -> None:
        means, variances = two_moments()[0].split(size.head_dim, -1)
        check_means(means, k[0], size.block_size, size.frame_tokens, "means")
        check_variances(variances, k[0], size.block_size, size.frame_tokens, "variances")

    def copy() -> Tensor:
        return target.copy_(k)

    def check() -> None:
        check_means(described()[0], k[0], size.block_size, size.frame_tokens, "descriptors")

    moved = k.numel() * dtype.itemsize
    contenders = {
        OURS: Contender(described, check, flops=k.numel(), bytes=moved + moved // size.block_size),
        "copy": Contender(copy, lambda: check_copy(copy, [target], [k]), bytes=2 * moved),
        "two moments": Contender(
            two_moments, check_two, flops=4 * k.numel(), bytes=moved + 2 * moved // size.block_size
        ),
    }
    return Built(contenders)


def share_of_attention(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    bank_frames: int,
    query_group: int,
) -> Built:
    """The selection kernels alone, against the whole of memory_attention that selects for as many queries at a time."""
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed, impl="triton").with_query_group(query_group)
    return Built({OURS: selection_contender(given), "memory_attention": ours(given)})
