"""Bounded positions: the bank stands in slots that do not move away, and attends as if its keys were re-rotated."""

import contextlib
import copy

import pytest
import torch
from bounded_cases import CHUNK, NORM, SIZE, TOKENS, make, numbers, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memflow_ops.cache import BlockSelection, CacheLayout, ChosenBlocks, FrameCache, ReleasedLayout, attend_to_memory
from memflow_ops.cache.attend import attend_to_past
from memflow_ops.cache.chosen import frames_for_copies
from memflow_ops.rotary import apply_rotation, frame_turn, move_frames

ALL = 1000
IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["torch", "reference"])


@IMPLEMENTATIONS
@pytest.mark.parametrize("query_group", [1, 5, None])
@pytest.mark.parametrize("sink", [0, 2, 4])
@pytest.mark.parametrize("norm", [True, False])
def test_it_attends_as_if_the_bank_were_rotated_again(impl, query_group, sink, norm):
    selection = BlockSelection(ALL, query_group)
    streamed = make(sink_frames=sink)
    rotation = opened(streamed, 9, selection, impl=impl, norm=norm)
    attend = attend_to_memory(streamed.cache, rotation, selection, impl=impl)
    x = numbers(77)
    with torch.no_grad():
        for layer in range(2):
            out = attend.projections(layer, *x, NORM if norm else None)
            assert (out - streamed.exact(layer, x, norm)).abs().max() <= 1e-5
    assert all(len(bank) == sink + 3 for bank in streamed.cache.bank())


def test_while_the_bank_is_no_further_than_its_slots_nothing_moves():
    """The chunk after the window's first: sink and queries stand where they are, and positions are absolute."""
    outs = []
    for positions in ("absolute", "bounded"):
        streamed = make(sink_frames=3, positions=positions)
        selection = BlockSelection(ALL, 5)
        rotation = opened(streamed, 2, selection)
        outs.append(attend_to_memory(streamed.cache, rotation, selection)(1, *numbers(77)))
        assert streamed.cache.bank() == [[0, 1, 2]] * 2
    assert (outs[0] - outs[1]).abs().max() <= 1e-6


@pytest.mark.parametrize("frame", [9_999, 99_999, 9_999_999])
def test_a_late_frame_attends_as_an_early_one(frame):
    """The first chunk, then one at frame 99 or much later: the same numbers give the same output."""

    def outs(first: int) -> list[Tensor]:
        streamed, selection, found = make(), BlockSelection(ALL, 5), []
        streamed.run(0, selection)
        streamed.cache._go_on_after(first // CHUNK, [])
        for chunk in range(4):
            streamed.run(chunk + 1, selection)
        rotation = opened(streamed, 0, selection)
        assert [len(bank) for bank in streamed.cache.bank()] == [5, 5]
        with torch.no_grad():
            for layer in range(2):
                attend = attend_to_memory(streamed.cache, rotation, selection)
                found.append(attend.projections(layer, *numbers(77), NORM))
        return found

    for early, late in zip(outs(99), outs(frame), strict=True):
        assert (early - late).abs().max() <= 1e-4


@given(st.integers(0, 7), st.integers(1, 4), st.integers(1, 4), st.integers(0, 400), st.booleans())
@settings(max_examples=150)
def test_no_distance_exceeds_the_stated_range(sink, chunk_frames, window_chunks, chunk, recache):
    size = 64  # large enough that the slowest pair tells by how many frames it was turned
    layout = CacheLayout(
        1, 1, 1, 1, size, chunk_frames=chunk_frames, window_frames=chunk_frames * window_chunks, sink_frames=sink,
        bank_frames=1, device_frames=8, positions="bounded",
    )  # fmt: skip
    cache = FrameCache(layout)
    ring = [
        f for c in range(max(0, chunk - window_chunks), chunk) for f in range(c * chunk_frames, (c + 1) * chunk_frames)
    ]
    cache._go_on_after(chunk, ring)
    if recache:
        cache.restart_window()
    first = cache.begin_chunk()
    slowest = 10_000 ** (-22 / 24)
    moved = -cache.bank_turn()[11].angle().item() / slowest
    assert abs(moved - round(moved)) < 0.05
    bank = [*range(cache.visible_sink()), 0]  # a retrieved frame stands at 0
    has_bank = cache._first_in_window() > 0
    for frame in range(first, first + chunk_frames):
        here = frame - round(moved)
        assert here <= frame, "nothing moves into the future"
        for there in bank if has_bank else ():
            assert 1 <= here - there <= max(sink, 1) + layout.window_frames - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("score", ["mean", "moments"])
@pytest.mark.parametrize("copied", [False, True], ids=["gathered", "copied"])
def test_a_kept_choice_is_attended_to_alike(copied, score, dtype):
    selection = BlockSelection(3, None)
    streamed = make(dtype, score=score, copied_frames=2 if copied else 0)
    cache = streamed.cache
    assert not copied or frames_for_copies(cache.layout, 3, None) == 2
    rotation = opened(streamed, 9, selection)
    chosen = ChosenBlocks(cache.layout, 3, None)
    assert bool(chosen.copied_tokens) is copied
    limit = {torch.float32: 1e-5}.get(dtype, 6e-2)
    with torch.no_grad():
        own = attend_to_memory(cache, rotation, selection).projections(1, *numbers(77, dtype), NORM)
        kept = attend_to_memory(cache, rotation, selection, chosen=chosen).projections(1, *numbers(77, dtype), NORM)
        again = attend_to_memory(cache, rotation, selection, chosen=chosen, reuse=True)
        reused = again.projections(1, *numbers(77, dtype), NORM)
    assert (own - kept).abs().max() <= limit
    assert torch.equal(kept, reused)


@pytest.mark.parametrize("copied", [False, True], ids=["gathered", "copied"])
def test_an_int8_bank_stands_in_the_same_slots(copied):
    selection, found = BlockSelection(ALL, None), []
    for bank_dtype in (None, "int8"):
        streamed = make(bank_dtype=bank_dtype, copied_frames=7 if copied else 0)
        rotation = opened(streamed, 9, selection)
        chosen = ChosenBlocks(streamed.cache.layout, ALL, None)
        assert bool(chosen.copied_tokens) is copied
        with torch.no_grad():
            attend = attend_to_memory(streamed.cache, rotation, selection, chosen=chosen)
            found.append(attend.projections(1, *numbers(77), NORM))
            exact = streamed.exact(1, numbers(77))
    assert (found[0] - exact).abs().max() <= 1e-5 < (found[1] - exact).abs().max() <= 0.03 * exact.abs().max()


def test_in_half_precision_it_errs_as_absolute_positions_do():
    """The largest error against float64 is at most twice that of the same numbers and distances, absolute."""
    errors = {}
    selection = BlockSelection(ALL, None)
    for positions, chunks in (("absolute", 2), ("bounded", 9)):
        streamed = make(torch.bfloat16, positions=positions, sink_frames=3)
        rotation = opened(streamed, chunks, selection)
        with torch.no_grad():
            out = attend_to_memory(streamed.cache, rotation, selection).projections(
                1, *numbers(7, torch.bfloat16), NORM
            )
        errors[positions] = (out - streamed.exact(1, numbers(7, torch.bfloat16))).abs().max()
    assert errors["bounded"] <= 2 * errors["absolute"]


def test_gradients_pass_through_both_queries_and_a_copied_past_gives_the_same():
    selection = BlockSelection(4, 5)
    streamed = make()
    cache = streamed.cache
    rotation = opened(streamed, 9, selection, norm=False)
    with torch.no_grad():
        expected = attend_to_memory(cache, rotation, selection)(1, *numbers(77))
    q, k, v = (x.clone().requires_grad_() for x in numbers(77))
    out = attend_to_memory(cache, rotation, selection)(1, q, k, v)
    assert (out - expected).abs().max() <= 1e-5
    past = cache.past(1, sparse=True)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((out * weight).sum(), (q, k, v))
    cache.abort()
    again = attend_to_past(past, q, k, v, rotation, selection, cache.layout)
    assert (again - expected).abs().max() <= 1e-5
    for one, two in zip(found, torch.autograd.grad((again * weight).sum(), (q, k, v)), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_keys_set_aside_are_the_same_however_a_chunk_is_written():
    staged, selection = [], BlockSelection(4, 5)
    for way in ("projections", "with a gradient", "by hand"):
        streamed = make()
        rotation = opened(streamed, 3, selection, norm=False)
        cache, (q, k, v) = streamed.cache, numbers(77)
        for layer in range(2):
            if way == "by hand":
                cache.write(layer, apply_rotation(k, *rotation), v)
                cache.remember(layer, k, rotation)
            else:
                own = q.clone().requires_grad_(way == "with a gradient")
                attend_to_memory(cache, rotation, selection, remember=True)(layer, own, k, v)
        cache.commit()
        staged.append(cache._staged_keys.clone())
    assert not staged[0].isnan().any()
    for other in staged[1:]:
        torch.testing.assert_close(other, staged[0], rtol=1e-6, atol=1e-6)


def test_what_a_recording_that_failed_has_left_is_not_read(monkeypatch):
    """A pass that could not be recorded is run again by the same `Attend`."""
    selection, streamed = BlockSelection(4, 5), make()
    rotation = opened(streamed, 9, selection)
    attend = attend_to_memory(streamed.cache, rotation, selection)

    def run(attend) -> list[Tensor]:
        with torch.no_grad():
            return [attend(layer, *numbers(77)) for layer in range(2)]

    with monkeypatch.context() as patch:
        garbage = lambda rotation, _: tuple(torch.full_like(part, torch.nan) for part in rotation)  # noqa: E731
        patch.setattr("memflow_ops.cache.attend.move_rotation", garbage)
        assert all(out.isnan().any() for out in run(attend))
    for again, fresh in zip(run(attend), run(attend_to_memory(streamed.cache, rotation, selection)), strict=True):
        assert torch.equal(again, fresh)


def test_an_observer_sees_the_queries_that_choose():
    selection, seen = BlockSelection(4, 5), []
    streamed = make()
    rotation = opened(streamed, 9, selection)
    x = numbers(77)
    observed = {"observe": lambda *given: seen.append(given)}
    attend_to_memory(streamed.cache, rotation, selection, **observed)(0, *x)
    last = attend_to_memory(streamed.cache, rotation, selection, keys_only=True, **observed)
    last(1, *x)
    last(1, *x.clone().requires_grad_())
    turned = move_frames(apply_rotation(x[0], *rotation), frame_turn(SIZE, 2 - 24, torch.device("cpu")))
    for _, q, _ in seen:
        torch.testing.assert_close(q, turned, rtol=1e-6, atol=1e-6)


def test_a_saved_state_goes_on_and_one_of_other_positions_is_refused():
    selection = BlockSelection(4, 5)
    streamed = make()
    for chunk in range(7):
        streamed.run(chunk, selection)
    state = copy.deepcopy(streamed.cache.state_dict())
    other = make()
    other.cache.load_state_dict(state)
    outs = []
    for one in (streamed, other):
        one.run(7, selection)
        rotation = opened(one, 0, selection)
        outs.append(attend_to_memory(one.cache, rotation, selection)(1, *numbers(77)))
    assert torch.equal(*outs)
    with pytest.raises(ValueError, match="positions='bounded', here 'absolute'"):
        make(positions="absolute").cache.load_state_dict(state)


def test_an_interrupted_commit_keeps_the_keys_that_were_set_aside():
    selection = BlockSelection(ALL, 5)
    streamed, whole = make(), make()
    for chunk in range(6):
        whole.run(chunk, selection)
        copied = streamed.cache._copy_from_ring

        def interrupted(*arguments, copied=copied):
            copied(*arguments)
            raise KeyboardInterrupt

        streamed.cache._copy_from_ring = interrupted
        with contextlib.suppress(KeyboardInterrupt):
            streamed.run(chunk, selection)
        del streamed.cache._copy_from_ring
        streamed.cache.abort()
    for one in (whole, streamed):
        assert one.cache.committed == 6
    outs = [
        attend_to_memory(one.cache, opened(one, 0, selection), selection)(1, *numbers(77)) for one in (whole, streamed)
    ]
    assert torch.equal(*outs)


def test_what_cannot_be_bounded_is_refused():
    selection = BlockSelection(4, 5)
    streamed = make()
    rotation = opened(streamed, 9, selection)
    with pytest.raises(ValueError, match="attended to block by block: give a selection"):
        attend_to_memory(streamed.cache, rotation, None)
    with pytest.raises(RuntimeError, match="with positions='bounded' the past is attended to block by block"):
        streamed.cache.dense(0)
    with pytest.raises(ValueError, match="bounded positions need the rotation of the chunk's tokens"):
        streamed.cache.remember(0, numbers(1)[1])
    with pytest.raises(ValueError, match="positions must be one of absolute, bounded, got 'slots'"):
        CacheLayout(1, 1, TOKENS, 2, SIZE, positions="slots")
    with pytest.raises(ValueError, match="needs a head_dim of pairs, an even number, got 9"):
        CacheLayout(1, 1, TOKENS, 2, 9, positions="bounded")
    assert ReleasedLayout(1, 1, TOKENS, 2, SIZE).positions == "absolute"


def test_the_layout_counts_what_is_set_aside():
    layouts = [make(positions=positions).cache.layout for positions in ("absolute", "bounded")]
    frame = 2 * 2 * TOKENS * 2 * SIZE * 4  # of keys, in bytes
    assert layouts[1].device_bytes - layouts[0].device_bytes == frame
    assert make(device_frames=0, bank_frames=0).cache.layout.staged_bytes == 0
