"""The checks before timing: each thing that they watch over is broken here on purpose, and they must see it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from memflow_ops.bench.cases import (
    alternatives,
    attention_inputs,
    cache_write,
    checked_cache,
    registry,
    retrieval,
    selection,
)
from memflow_ops.bench.cases.attention_inputs import AttentionInputs, attention_contender
from memflow_ops.bench.harness import ceilings, contest, correctness
from memflow_ops.bench.sizes import TINY
from memflow_ops.cache import attend as attend_module
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.geometry import Geometry
from memflow_ops.impl import torch as torch_impl
from memflow_ops.impl.torch import cache_write as torch_write
from memflow_ops.impl.torch import copies

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def checked(name: str, dtype: str = "float32") -> None:
    """Builds a case of the tiny size and runs every contender's check."""
    tiny = [*registry.chosen("cpu", ["tiny"]), *registry.of_size(TINY, "bfloat16", "tiny", ("cpu",), 5)]
    (case,) = (case for case in tiny if case.name.startswith(f"{name}/tiny/{dtype}"))
    contest.Contest(case, CPU)


@pytest.mark.parametrize("name", [case.name for case in registry.of_size(TINY, "bfloat16", "tiny", ("cpu",), 5)])
def test_what_is_right_in_bfloat16_is_let_through(name):
    """In float32 it is timed in test_cases.py."""
    checked(name.removesuffix("/tiny/bfloat16"), "bfloat16")


# --------------------------------------------------------------------------------------------------- broken on purpose

Break = Callable[[pytest.MonkeyPatch], None]


def changed(where: object, name: str, change: Callable) -> Break:
    """What `where.name` returns goes through `change`."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = getattr(where, name)
        patch.setattr(where, name, lambda *arguments, **options: change(right(*arguments, **options)))

    return apply


def other_blocks(patch: pytest.MonkeyPatch) -> None:
    """Selection passes over the best block and takes the next one instead."""
    select = torch_impl.select_blocks

    def worse(q, descriptors, top_k, *rest):
        more, fewer = (select(q, descriptors, count, *rest) for count in (top_k + 1, 1))
        left = more.masked_fill(more == fewer, torch.iinfo(torch.int32).max)
        return left.sort(-1).values[..., :-1].contiguous()

    patch.setattr(torch_impl, "select_blocks", worse)


def other_blocks_inside(patch: pytest.MonkeyPatch) -> None:
    """As `other_blocks`, only where attention selects for itself: `select_blocks` by itself is right."""
    select = torch_impl.select_blocks
    other_blocks(patch)

    def right(q, descriptors, top_k, *, query_group, memory_frames=None, memory_slots=None, **sizes):
        size, tokens = sizes.get("block_size", 1), sizes.get("frame_tokens") or sizes["blocks_per_frame"]
        options = {"score": sizes.get("score", "mean")}
        scale = q.shape[-1] ** -0.5
        geometry = Geometry(size, tokens, query_group or q.shape[1], scale, memory_slots, memory_frames, **options)
        return select(q, descriptors, top_k, geometry)

    for module in (attention_inputs, checked_cache):
        patch.setattr(module, "select_blocks", right)


def a_block_twice(patch: pytest.MonkeyPatch) -> None:
    changed(torch_impl, "select_blocks", lambda indices: indices[..., [0, *range(indices.shape[-1] - 1)]])(patch)


def wrong_copies(patch: pytest.MonkeyPatch) -> None:
    """A value beside the window is not that of the bank."""
    copy = copies.copy_selected

    def wrong(memory_k, memory_v, indices, geometry, target_k, target_v, hidden):
        copy(memory_k, memory_v, indices, geometry, target_k, target_v, hidden)
        target_v[:, ::8] *= 1.1

    patch.setattr(copies, "copy_selected", wrong)


def chosen_anew(patch: pytest.MonkeyPatch) -> None:
    """Every pass chooses, whatever it is told to reuse."""
    attend = attend_module._attend_to_chosen
    patch.setattr(attend_module, "_attend_to_chosen", lambda chosen, reuse, *rest: attend(chosen, False, *rest))


def zeroed(descriptors: torch.Tensor) -> torch.Tensor:
    """The second, or the only one."""
    descriptors[:, min(1, descriptors.shape[1] - 1)] = 0
    return descriptors


def scaled(number: int) -> Break:
    """One of the five gradients, by a part in a thousand."""
    scale = [1.001 if n == number else 1 for n in range(5)]
    return changed(torch_impl, "attend_backward", lambda found: [x * by for x, by in zip(found, scale, strict=True)])


def without_a_key(found: list) -> list:
    """The key of the bank that has the largest gradient has none."""
    found[3][:, found[3][0, :, -1].abs().sum(-1).argmax()] = 0
    return found


def another_prototype(patch: pytest.MonkeyPatch) -> None:
    """Another frame of the chunk is copied to the history."""
    copy = FrameCache._copy_from_ring

    def another(cache, frame, places, *rest):
        chunk = cache.layout.chunk_frames
        copy(cache, frame - frame % chunk + (frame + 1) % chunk, places, *rest)

    patch.setattr(FrameCache, "_copy_from_ring", another)


def shifted_prototype(patch: pytest.MonkeyPatch) -> None:
    """The frame's keys arrive a token further on, which the means of the whole frame do not show."""
    copy = FrameCache._copy_from_ring

    def shifted(cache, frame, places, *rest):
        copy(cache, frame, places, *rest)
        for place in places:
            cache._places[0][:, :, place] = cache._places[0][:, :, place].roll(1, 2)

    patch.setattr(FrameCache, "_copy_from_ring", shifted)


def without_descriptors(patch: pytest.MonkeyPatch) -> None:
    """A frame of the history keeps what its slot had."""
    copy = FrameCache._copy_from_ring

    def undescribed(cache, frame, places, *rest):
        before = cache._places[2].clone()
        copy(cache, frame, places, *rest)
        cache._places[2].copy_(before)

    patch.setattr(FrameCache, "_copy_from_ring", undescribed)


def means_of_another(patch: pytest.MonkeyPatch) -> None:
    remember = FrameCache.remember
    patch.setattr(FrameCache, "remember", lambda cache, layer, k: remember(cache, layer, k.flip(1)))


def one_write_for_all(patch: pytest.MonkeyPatch) -> None:
    """The ring's place never moves on."""
    write = FrameCache.write

    def same_place(cache, layer, k, v):
        cache._chunk_places.copy_(cache.layout.sink_frames + torch.arange(cache.layout.chunk_frames))
        write(cache, layer, k, v)

    patch.setattr(FrameCache, "write", same_place)


def written(change: Callable) -> Break:
    """`change(arguments)` of the fused write: q, k, v and so on."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        right = torch_impl.write_projections
        patch.setattr(torch_impl, "write_projections", lambda *of, **options: right(*change(list(of)), **options))

    return apply


def turned_values(arguments: list) -> list:
    arguments[2] = arguments[2].roll(1, 1)
    return arguments


def unnormalised(arguments: list) -> list:
    weight_q, _, eps = arguments[4]
    arguments[4] = weight_q, None, eps  # Without weights the keys are not normalised.
    return arguments


def beginning_of_pool(arguments: list) -> list:
    arguments[5] = replace(arguments[5], places=arguments[5].places - 1)
    return arguments


def lost_mean(arguments: list) -> list:
    arguments[5] = replace(arguments[5], means=arguments[5].means.clone())  # which nobody reads
    return arguments


SELECTION, DESCRIPTORS = (torch_impl, "select_blocks"), (torch_impl, "describe_blocks")
ZEROED = changed(*DESCRIPTORS, zeroed)
WITHOUT_A_KEY = changed(torch_impl, "attend_backward", without_a_key)
BROKEN = {
    "memory_attention-selection": ("op/memory_attention", other_blocks, "is left out, whose score is higher"),
    "memory_attention-selection-inside": ("op/memory_attention", other_blocks_inside, "ours: head 0, group 0: error"),
    "memory_attention-twice": ("op/memory_attention", a_block_twice, r"selection, head 0, group 0: \[\d+, .* selected"),
    "memory_attention-descriptor": ("op/memory_attention", ZEROED, "ours: descriptors of head 0.*values are off"),
    "select": ("op/select", other_blocks, "is left out, whose score is higher"),
    "select-fewer": ("op/select", changed(*SELECTION, lambda x: x[..., 1:].contiguous()), "3 are selected, expected 4"),
    "attend": ("op/attend", other_blocks, "is left out, whose score is higher"),
    "describe": ("op/describe", ZEROED, "descriptors, frame 0 and on: 64 of .* values are off"),
    "backward-selection": ("op/backward", other_blocks, "is left out, whose score is higher"),
    "backward-descriptor": ("op/backward", ZEROED, "descriptors of head 0"),
    "backward-dq": ("op/backward", scaled(0), "head 0: dq off"),
    "backward-dk": ("op/backward", scaled(1), "head 0: dk off"),
    "backward-dv": ("op/backward", scaled(2), "head 0: dv off"),
    "backward-bank-dk": ("op/backward", scaled(3), "head 0: the bank's dk off"),
    "backward-bank-dv": ("op/backward", scaled(4), "head 0: the bank's dv off"),
    "backward-one-key": ("op/backward", WITHOUT_A_KEY, "the bank's dk off"),
    "relevance": ("op/relevance", changed(retrieval, "frame_relevance", lambda x: x * 1.001), "ours: off by"),
    "frame_write-frame": ("op/frame_write", another_prototype, "the slot of frame 0 does not hold the keys"),
    "frame_write-token": ("op/frame_write", shifted_prototype, "the slot of frame 0 does not hold the keys"),
    "frame_write-descriptors": ("op/frame_write", without_descriptors, "descriptors of 0.* values are off"),
    "frame_write-means": ("op/frame_write", means_of_another, "mean of frame 3.* values are off"),
    "frame_write-window": ("op/frame_write", one_write_for_all, "does not hold the keys that were written"),
    "write-q": (
        "op/write_projections",
        changed(torch_impl, "write_projections", lambda q: q * 1.001),
        "ours: queries",
    ),
    "write-values": ("op/write_projections", written(turned_values), "the pool does not hold the chunk's values"),
    "write-keys": ("op/write_projections", written(unnormalised), "ours: keys in the pool: .* values are off"),
    "write-elsewhere": ("op/write_projections", written(beginning_of_pool), "ours: keys in the pool"),
    "write-clean": ("op/write_projections_clean", written(lost_mean), "ours: mean of the first frame"),
    "write-descriptors": (
        "op/write_projections_clean",
        changed(torch_write, "describe_blocks", zeroed),
        "ours: descriptors, frame 0",
    ),
    "layer-selection": ("layer/block", other_blocks, "layer 0, selection, head 0, group 0: .* is left out"),
    "layer-selection-inside": ("layer/block", other_blocks_inside, "ours: head 0, group 0: error"),
    "layer-descriptors": ("layer/block", without_descriptors, "layer 0, head 0, descriptors of the sink"),
    "layer-q": ("layer/block", changed(torch_impl, "write_projections", lambda q: q * 1.001), "group 0: error"),
    "layer-values": ("layer/block", written(turned_values), "layer 0: the window does not hold the chunk's values"),
    "layer-keys": ("layer/block", written(unnormalised), "layer 0, keys in the window: .* values are off"),
    "stream-selection": ("stream/chunk", other_blocks, "layer 0, selection, head 0, group 0: .* is left out"),
    "stream-selection-inside": ("stream/chunk", other_blocks_inside, "ours: head 0, group 0: error"),
    "stream-descriptor": (
        "stream/chunk",
        changed(torch_write, "describe_blocks", zeroed),
        "descriptors of prototypes",
    ),
    "stream-copies": ("stream/chunk", wrong_copies, "one selection per chunk: head 0, group 0: error"),
    "stream-kept": ("stream/chunk", chosen_anew, "chosen once: head .* group .*: error"),
    "stream-values": ("stream/chunk", written(turned_values), "layer 0: the window does not hold the chunk's values"),
}


@pytest.mark.parametrize("name, breakage, said", BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_seen(name, breakage, said, monkeypatch):
    breakage(monkeypatch)
    with pytest.raises(AssertionError, match=said):
        checked(name)


# ------------------------------------------------------------------------------------------- what others do is seen too


@pytest.mark.parametrize("window_in_place", [False, True], ids=["copied", "in place"])
def test_the_released_way_is_held_against_float64(window_in_place, monkeypatch):
    given = AttentionInputs.make(TINY, 8, torch.float32, CPU)
    released = alternatives.released(given, window_in_place)
    released.check()
    with monkeypatch.context() as patch:
        topk = torch.Tensor.topk
        patch.setattr(torch.Tensor, "topk", lambda x, count: topk(-x, count))
        with pytest.raises(AssertionError, match=r"frames of head 0: \d is left out, whose score is higher"):
            released.check()
    with monkeypatch.context() as patch:
        select = torch.index_select
        patch.setattr(torch, "index_select", lambda x, at, rows, out: select(x, at, (rows + 1) % len(x), out=out))
        with pytest.raises(AssertionError, match="head 0, group 0: error"):
            released.check()
    given.window[1][0, 5, 1, 3] += 1
    if window_in_place:
        with pytest.raises(AssertionError, match="the buffer does not hold the window"):
            released.check()
    else:
        released.check()
    given.bank[0].mul_(1.01)  # the means are kept
    with pytest.raises(AssertionError, match="frame means of head 0"):
        released.check()


@pytest.mark.parametrize("window_in_place", [False, True], ids=["copied", "in place"])
def test_the_released_way_copies_nothing_twice(window_in_place, monkeypatch):
    given = AttentionInputs.make(TINY, 8, torch.float32, CPU)
    call = alternatives.released(given, window_in_place).call
    monkeypatch.setattr(alternatives.F, "scaled_dot_product_attention", lambda q, k, v: q)
    a_frame = 4 * TINY.heads * TINY.frame_tokens * TINY.head_dim
    assert ceilings.peak_bytes(call, CPU) < a_frame, "keys or values went through other memory than the kept"


@pytest.mark.parametrize("make", [selection.describe, cache_write.chunk_write])
def test_copies_are_copies(make, monkeypatch):
    copy = make(TINY, torch.float32, CPU, 0).contenders["copy"]
    copy.check()
    monkeypatch.setattr(torch.Tensor, "copy_", lambda x, of: x)
    with pytest.raises(AssertionError, match="not a copy"):
        copy.check()


def test_half_precision_hides_no_small_error_of_all_values():
    given = AttentionInputs.make(TINY, 4, torch.bfloat16, CPU)
    ours = attention_inputs.ours(given)
    off = attention_contender(given, lambda: ours.call() + 6e-3, 1, given.window_and_selection())
    with pytest.raises(AssertionError, match="mean error"):
        off.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_head_is_left_out(dtype):
    given = AttentionInputs.make(replace(TINY, dim=160, heads=5), 4, dtype, CPU)
    ours = attention_inputs.ours(given)
    ours.check()
    for head in range(5):
        zeroed = torch.arange(5)[:, None] == head
        without = attention_contender(
            given, lambda zeroed=zeroed: ours.call().masked_fill(zeroed, 0), 1, given.window_and_selection()
        )
        with pytest.raises(AssertionError, match=f"head {head}, group"):
            without.check()


def test_inner_heads_are_checked_in_groups_that_move_on():
    checked = [[group for of, group in correctness.sampled(12, 37) if of == head] for head in range(12)]
    assert checked[0] == checked[11] == [0, 18, 36]
    assert checked[1:11] == [[3], [6], [9], [12], [15], [18], [21], [24], [27], [30]]
    assert list(correctness.sampled(1, 1)) == [(0, 0)]


# ----------------------------------------------------------------------------------------------------- the checks alone


def select(scores: list[float], chosen: list[int], count: int) -> None:
    """Blocks whose scores with the one query are these."""
    described = torch.tensor(scores)[:, None]
    correctness.check_selection(torch.ones(1, 1), described, torch.tensor(chosen, dtype=torch.int32), count, "here")


def test_a_selection_is_right_in_any_order_and_among_equals():
    select([1.0, 3.0, 2.0], [1, 2], 2)
    select([1.0, 3.0, 2.0], [2, 1], 2)
    select([1.0, 3.0], [0, 1, -1], 3)
    select([1.0, 3.0, 3.0 + 1e-6], [1], 1)  # which float32 may sum up either way


def test_moments_are_ranked_by_the_logarithm_of_a_mass():
    """One query 2 in one dimension, variances 0 and 3, blocks of 1 and 8 tokens: 2 m + 2 v + log n is 6, 6.1, 6.2."""
    described = torch.tensor(
        [[3.0, 0], [(0.1 - math.log(8)) / 2, 3], [(6.2 - math.log(8)) / 2, 0]], dtype=torch.float64
    )
    query, lengths = torch.tensor([[2.0]], dtype=torch.float64), torch.tensor([1, 8, 8])

    def select(chosen: list[int], count: int) -> None:
        indices = torch.tensor(chosen, dtype=torch.int32)
        correctness.check_selection(query, described, indices, count, "here", lengths=lengths)

    select([2], 1)
    select([2, 1], 2)
    with pytest.raises(AssertionError, match="here: 1 is left out"):
        select([2, 0], 2)


def test_variances_are_of_the_blocks_keys():
    keys = torch.randn(26, 2, 3, generator=torch.Generator().manual_seed(0))
    blocks = [frame[start : start + 5] for frame in keys.split(13) for start in (0, 5, 10)]
    variances = torch.stack([block.var(0, unbiased=False) for block in blocks])
    correctness.check_variances(variances, keys, 5, 13, "variances")
    for wrong in (variances * 1.001, variances.roll(1, 0), torch.full_like(variances, torch.nan)):
        with pytest.raises(AssertionError, match="variances"):
            correctness.check_variances(wrong, keys, 5, 13, "variances")


@pytest.mark.parametrize(
    "chosen, count, said",
    [
        ([0, 1], 2, "here: 2 is left out"),
        ([1, 1], 2, r"here: \[1, 1\] are selected"),
        ([1, 3], 2, r"here: \[1, 3\] are selected"),
        ([1, -1], 2, "here: 1 are selected, expected 2"),
        ([1, 2, 0], 2, "here: 3 are selected, expected 2"),
    ],
)
def test_a_wrong_selection_is_not(chosen, count, said):
    with pytest.raises(AssertionError, match=said):
        select([1.0, 3.0, 2.0], chosen, count)


def test_means_are_rounded_once():
    keys = torch.randn(26, 2, 4).to(torch.bfloat16)  # two frames of 13: blocks of 5, 5 and 3
    exact = torch.stack([keys[first:end].double().mean(0) for first, end in
                         ((0, 5), (5, 10), (10, 13), (13, 18), (18, 23), (23, 26))])  # fmt: skip
    means = exact.to(torch.bfloat16)
    correctness.check_means(means, keys, 5, 13, "means")
    for wrong in (means.flip(0), means * (1 + 2**-7), means.index_fill(0, torch.tensor([2]), torch.nan)):
        with pytest.raises(AssertionError, match=r"means, frame 0 and on: \d+ of 48 values are off"):
            correctness.check_means(wrong, keys, 5, 13, "means")
