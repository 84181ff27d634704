"""The choice of the bank from all frames of the history, for all layers, in a handful of launches.

The choice is greedy, so one program makes it for each story, with one number per frame in its registers. Grids depend
on shapes alone, and the host reads nothing back.
"""

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.integers import cdiv, next_power_of_2
from memflow_ops.kernels.launch import Launch, run_all
from memflow_ops.kernels.retrieval.relevance import (
    Allocate,
    clamped_length,
    plan_products,
    plan_softmax,
    plan_text_means,
    sum_scores_kernel,
    summed,
    word_shares_kernel,
)

MOST_FRAMES = 16384
"""The most candidates: more do not fit in the registers of a program."""


@triton.jit
def best_of(score, eligible, frames):
    """The highest score among the eligible [FRAMES], and its index, the lowest of those with equal scores."""
    best = tl.max(tl.where(eligible, score, float("-inf")), 0)
    return best, tl.min(tl.where(eligible & (score == best), frames, frames.shape[0]), 0)


# Bytes: where redundancy is limited, the products of K rows and of the diagonal, of every split (from L2).
@triton.jit(do_not_specialize=["count", "frames", "splits"])
def take_best_kernel(
    scores,  # (B, F) float32, contiguous
    products,  # (splits, B, F, F) float32, contiguous, between mean keys; or None: redundancy has no limit
    indices,  # (B, K) int32, contiguous
    taken,  # (B, K) float32, contiguous
    redundancy,  # the largest cosine between frames that are not alike
    count,  # K
    frames,
    splits,
    FRAMES: tl.constexpr,
):
    """Take the best frame again and again. Frames like one that was taken wait while there are others."""
    batch = tl.program_id(0).to(tl.int64)
    frame = tl.arange(0, FRAMES)
    left = frame < frames
    score = tl.load(scores + batch * frames + frame, mask=left, other=0.0)
    alike = frame < 0
    length = tl.zeros([FRAMES], tl.float32)
    split_stride = tl.num_programs(0).to(tl.int64) * frames * frames
    if products is not None:
        products += batch * frames * frames
        length = tl.maximum(
            tl.sqrt(summed(products, frame.to(tl.int64) * (frames + 1), left, split_stride, splits)), 1e-12
        )
    inside = frame < frames
    for place in range(count):
        unlike = left & (alike == 0)
        some = tl.max(unlike.to(tl.int32), 0) > 0
        best, index = best_of(score, tl.where(some, unlike, left), frame)
        tl.store(indices + batch * count + place, index)
        tl.store(taken + batch * count + place, best)
        left = left & (frame != index)
        if products is not None:
            own = tl.sum(tl.where(frame == index, length, 0.0), 0)
            product = summed(products, index.to(tl.int64) * frames + frame, inside, split_stride, splits)
            alike = alike | (product / (length * own) > redundancy)


# FLOPs: a square root for every word, frame and taken frame. Bytes: the shares once per taken frame (from L2).
@triton.jit(do_not_specialize=["count", "frames"])
def take_coverage_kernel(
    shares,  # (B, Lt, F) float32, contiguous
    lengths,  # (B,) int32 or None
    indices,  # (B, K) int32, contiguous
    taken,  # (B, K) float32, contiguous
    words,
    count,  # K
    frames,
    FRAMES: tl.constexpr,
    WORDS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Take the frame that adds most to the sum over words of sqrt(share gathered so far), again and again."""
    batch = tl.program_id(0).to(tl.int64)
    length = clamped_length(lengths, batch, 0, words)
    shares += batch * words * frames
    frame = tl.arange(0, FRAMES)
    inside = frame < frames
    left = inside
    chosen = tl.full([COUNT], -1, tl.int32)
    relevance = tl.zeros([FRAMES], tl.float32)
    for place in range(count):
        gain = tl.zeros([FRAMES], tl.float32)
        for start in range(0, length, WORDS):
            word = start + tl.arange(0, WORDS)
            rows = shares + word.to(tl.int64)[:, None] * frames
            share = tl.load(rows + frame[None, :], mask=(word < length)[:, None] & inside[None, :], other=0.0)
            mask = (word < length)[:, None] & (chosen >= 0)[None, :]
            gathered = tl.sum(tl.load(rows + chosen[None, :], mask=mask, other=0.0), 1)
            gain += tl.sum(tl.sqrt(gathered[:, None] + share) - tl.sqrt(gathered)[:, None], 0)
            relevance += tl.where(place == 0, tl.sum(share, 0), 0.0)
        _, index = best_of(gain, left, frame)
        own = tl.sum(tl.where(frame == index, relevance, 0.0), 0)
        tl.store(indices + batch * count + place, index)
        tl.store(taken + batch * count + place, own / tl.maximum(length, 1))
        left = left & (frame != index)
        chosen = tl.where(tl.arange(0, COUNT) == place, index, chosen)


def plan_retrieve_frames(
    text_keys: torch.Tensor,
    means: torch.Tensor,
    rows: torch.Tensor | None,
    text_lengths: torch.Tensor | None,
    weights: torch.Tensor,
    *,
    count: int,
    score: str,
    redundancy: float | None,
    softmax_scale: float,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches of `retrieve_frames`, in order, and the indices and scores (B, K) that they fill; K is `count`."""
    layers, batch, words, heads, head_dim = text_keys.shape
    stored, kv_heads = means.shape[2], means.shape[4]
    frames = stored if rows is None else rows.shape[1]
    known = (torch.float16, torch.bfloat16, torch.float32)
    if text_keys.dtype not in known or means.dtype not in known or head_dim > 256 or frames > MOST_FRAMES:
        raise ValueError(
            f"the kernels take float16, bfloat16 and float32, head sizes up to 256 and {MOST_FRAMES} candidates, got "
            f"{text_keys.dtype}, {means.dtype}, {head_dim} and {frames}: use impl='torch'"
        )
    rows = None if rows is None else rows.contiguous()
    text_lengths = None if text_lengths is None else text_lengths.contiguous()
    new = Allocate(means.device)
    indices, taken = new(batch, count, dtype=torch.int32), new(batch, count)
    common = dict(FRAMES=max(256, next_power_of_2(frames)))
    right = dict(right=means, right_rows=rows, right_count=frames, right_weights=weights)
    # (layers, B, Lt, heads that share a key head, Hkv, D)
    grouped = text_keys.unflatten(3, (kv_heads, -1)).transpose(3, 4)
    warps = 4 if frames <= 1024 else 16
    if score == "coverage":
        launch, products = plan_products(new, left=grouped, left_count=words, left_lengths=text_lengths, **right)
        shares = new(batch, words, frames)
        arguments = dict(
            products=products, lengths=text_lengths, shares=shares, factor=softmax_scale / kv_heads, words=words,
            frames=frames, splits=products.shape[0], COLUMNS=256,
        )  # fmt: skip
        shared = Launch(word_shares_kernel, (words, batch, 1), arguments, dict(num_warps=4, num_stages=2))
        arguments = dict(
            shares=shares, lengths=text_lengths, indices=indices, taken=taken, words=words, count=count, frames=frames,
            WORDS=max(1, 8192 // common["FRAMES"]), COUNT=max(16, next_power_of_2(count)), **common,
        )  # fmt: skip
        take = Launch(take_coverage_kernel, (batch, 1, 1), arguments, dict(num_warps=max(8, warps), num_stages=2))
        return [launch, shared, take], indices, taken

    if score == "linear":
        text_means = new(layers, batch, kv_heads, head_dim)
        launches = [plan_text_means(text_keys, text_lengths, text_means)]
        as_rows = text_means.view(layers, batch, 1, 1, kv_heads, head_dim)
        launch, partials = plan_products(new, left=as_rows, left_count=1, **right)
        launches.append(launch)
        factor = softmax_scale / (layers * kv_heads)
    else:
        launches, partials = plan_softmax(new, text_keys, means, rows, text_lengths, weights, softmax_scale)
        factor = 1 / (layers * heads)
    scores = new(batch, frames)
    arguments = dict(
        partials=partials, scores=scores, factor=factor, frames=frames, splits=partials.shape[0], COLUMNS=64
    )
    grid = (cdiv(frames, 64), batch, 1)
    launches.append(Launch(sum_scores_kernel, grid, arguments, dict(num_warps=2, num_stages=2)))
    products = None
    if redundancy is not None:
        left = dict(left=means, left_rows=rows, left_count=frames, left_means=True)
        launch, products = plan_products(new, **left, **right)
        launches.append(launch)
    arguments = dict(
        scores=scores, products=products, indices=indices, taken=taken,
        redundancy=1.0 if redundancy is None else float(redundancy), count=count, frames=frames,
        splits=0 if products is None else products.shape[0], **common,
    )  # fmt: skip
    launches.append(Launch(take_best_kernel, (batch, 1, 1), arguments, dict(num_warps=warps, num_stages=2)))
    return launches, indices, taken


def retrieve_frames(
    text_keys: torch.Tensor,
    means: torch.Tensor,
    candidates: torch.Tensor | None,
    text_lengths: torch.Tensor | None,
    weights: torch.Tensor,
    *,
    count: int,
    score: str,
    redundancy: float | None,
    softmax_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice of the bank, see `memflow_ops.retrieve_frames`: indices (B, K) int32 and scores (B, K) float32."""
    tensors = (text_keys, means, candidates, text_lengths, weights.float())
    launches, indices, taken = plan_retrieve_frames(
        *tensors, count=count, score=score, redundancy=redundancy, softmax_scale=softmax_scale
    )
    run_all(launches)
    return indices, taken
