"""The life of a chunk, which is the same in both caches: opened, written, committed, or given up."""

import copy

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from memflow_ops.cache import (
    BlockSelection,
    CacheLayout,
    FrameCache,
    ReleasedCache,
    ReleasedLayout,
    RingCache,
    attend_to_memory,
)
from memflow_ops.rotary import rope_rotation

SIZES = {"layers": 2, "batch": 2, "frame_tokens": 6, "kv_heads": 2, "head_dim": 4}
GRID = (2, 3)
TEXT_KEYS = [torch.ones(2, 1, 2, 4)] * 2


def frame_cache() -> FrameCache:
    return FrameCache(
        CacheLayout(**SIZES, window_frames=9, sink_frames=0, bank_frames=2, device_frames=8, block_size=4)
    )


def sink_cache() -> FrameCache:
    return FrameCache(
        CacheLayout(**SIZES, window_frames=9, sink_frames=4, bank_frames=0, device_frames=0, block_size=4)
    )


def released_cache() -> ReleasedCache:
    layout = ReleasedLayout(
        **SIZES, window_frames=9, sink_frames=0, bank_frames=2, record_interval=1, schedule="single-prompt"
    )
    return ReleasedCache(layout)


caches = pytest.mark.parametrize("make", [frame_cache, released_cache])


def one_pass(cache: RingCache, first_frame: int, seed: int, clean: bool = True) -> None:
    rotation = rope_rotation(4, torch.arange(first_frame, first_frame + 3), *map(torch.arange, GRID))
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        q, k, v = torch.randn(3, 2, 18, 2, 4, generator=generator)
        cache.write_projections(layer, q, k, v, rotation, remember=clean)


def stream(cache: RingCache, chunks: int) -> None:
    for _ in range(chunks):
        cache.update_bank(TEXT_KEYS)
        first_frame = cache.begin_chunk()
        one_pass(cache, first_frame, seed=1000, clean=False)
        one_pass(cache, first_frame, seed=cache.committed)
        cache.commit()


def assert_same_state(a: RingCache, b: RingCache) -> None:
    """Compares everything but places that were never written, which are NaN."""
    for x, y in zip(tree_leaves(a.state_dict()), tree_leaves(b.state_dict()), strict=True):
        if isinstance(x, torch.Tensor):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())
        else:
            assert x == y


BLOCKS = BlockSelection(2, query_group=5)


@pytest.mark.parametrize(
    ("make", "selection"),
    [(sink_cache, None), (sink_cache, BLOCKS), (frame_cache, BLOCKS), (released_cache, None), (released_cache, BLOCKS)],
)
def test_passes_over_a_ring_that_grows_again_have_one_shape_where_its_keys_are_counted(make, selection):
    """On CUDA a tensor says how full the ring is. What has not been passed again is NaN here and never read."""
    results, shapes, sparse = {}, {}, selection is not None
    for counts in (False, True):
        cache, results[counts], shapes[counts] = make(), [], set()
        cache.counts_keys = counts
        stream(cache, 5)
        cache.update_bank(TEXT_KEYS)
        generator = torch.Generator().manual_seed(7)
        for _ in cache.restart_window():
            frames = torch.arange(cache.begin_chunk(), cache.open_frames().stop)
            places = cache._ring_start + len(cache.window_frames()), cache._ring_start + cache.layout.window_frames
            for pool in cache._places[:2]:
                pool[:, :, slice(*places)] = torch.nan
            rotation = rope_rotation(4, frames, *map(torch.arange, GRID))
            attend = attend_to_memory(cache, rotation, selection)
            shapes[counts].add(cache.pass_shape(sparse))
            for layer in range(2):
                results[counts].append(attend(layer, *torch.randn(3, 2, 18, 2, 4, generator=generator)))
                *seen, valid = cache.attended(layer, sparse)
                assert (valid is not None) == counts
                for got, want in zip(seen, cache.window(layer) if sparse else cache.dense(layer), strict=True):
                    count = want.shape[1] if valid is None else int(valid[0])
                    assert torch.equal(got[:, :count], want) and torch.isfinite(want).all()
            cache.commit()
        assert len(results[counts]) == 4
    assert all(map(torch.equal, results[True], results[False]))
    assert len(shapes[False]) == 2 and len(shapes[True]) == 1


def test_where_the_history_lies_behind_the_ring_nothing_is_counted():
    """The valid keys of `dense` are then no leading part of a view."""
    cache = frame_cache()
    cache.counts_keys = True
    stream(cache, 5)
    cache.restart_window()
    cache.begin_chunk()
    keys, _, valid = cache.attended(0, sparse=False)
    assert valid is None and keys.shape[1] == (3 + len(cache.candidate_frames()[0])) * 6


@pytest.mark.parametrize("kind", [CacheLayout, ReleasedLayout])
def test_a_cache_for_which_there_is_no_memory_is_refused(kind):
    layout = kind(**SIZES, bank_frames=0, sink_frames=30 * 10**8)
    with pytest.raises(
        ValueError, match=r"a cache of 30000000\d\d frames takes .* GiB on cpu.* sink_frames=3000000000"
    ):
        (FrameCache if kind is CacheLayout else ReleasedCache)(layout)


@caches
def test_a_chunk_takes_the_places_of_the_one_that_leaves_the_window(make):
    cache = make()
    stream(cache, 3)
    assert cache.window_frames() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    stream(cache, 2)
    assert cache.window_frames() == [9, 10, 11, 12, 13, 14, 6, 7, 8]


@caches
def test_only_the_last_pass_over_a_chunk_is_left(make):
    cache, other = make(), make()
    stream(cache, 4)
    for chunk in range(4):
        other.update_bank(TEXT_KEYS)
        one_pass(other, other.begin_chunk(), seed=chunk)
        other.commit()
    assert_same_state(cache, other)


@caches
def test_an_aborted_chunk_leaves_no_trace(make):
    cache, untouched = make(), make()
    stream(cache, 5)
    stream(untouched, 5)
    cache.update_bank(TEXT_KEYS)
    untouched.update_bank(TEXT_KEYS)
    cache.begin_chunk()
    cache.abort()
    assert cache.window_frames() == untouched.window_frames() and cache.committed == 5
    assert_same_state(cache, untouched)
    stream(cache, 4)
    stream(untouched, 4)
    assert_same_state(cache, untouched)


@caches
@pytest.mark.parametrize("is_open", [False, True])
def test_a_deep_copy_goes_on_by_itself(make, is_open):
    cache, untouched = make(), make()
    stream(cache, 5)
    stream(untouched, 6)
    if is_open:
        cache.update_bank(TEXT_KEYS)
        cache.begin_chunk()
    other = copy.deepcopy(cache)
    for own in (other, cache):
        if not is_open:
            own.update_bank(TEXT_KEYS)
            own.begin_chunk()
        one_pass(own, 15, seed=5)
        own.commit()
        assert_same_state(own, untouched)
        stream(own, 3)
    stream(untouched, 3)
    assert_same_state(cache, untouched)
    assert_same_state(other, untouched)


@caches
def test_abort_completes_a_commit_that_was_interrupted(make, monkeypatch):
    """The chunk counts as finished before what it leaves behind is copied."""
    cache, untouched = make(), make()
    stream(cache, 5)
    stream(untouched, 6)
    cache.update_bank(TEXT_KEYS)
    first_frame = cache.begin_chunk()
    one_pass(cache, first_frame, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_leave_behind", lambda chunk: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.commit()
    assert cache.committed == 6
    cache.abort()
    assert_same_state(cache, untouched)


@caches
def test_restored_marks_stand_for_a_pass_that_the_cache_has_not_seen(make):
    cache, other = make(), make()
    stream(cache, 4)
    stream(other, 4)
    other.update_bank(TEXT_KEYS)
    one_pass(other, other.begin_chunk(), seed=4)
    marks = other.pass_marks()
    cache.update_bank(TEXT_KEYS)
    with pytest.raises(RuntimeError, match="restore_pass_marks: no chunk is open"):
        cache.restore_pass_marks(marks)
    cache.begin_chunk()
    assert cache.pass_marks() != marks
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] have not been written"):
        cache.commit()
    cache.restore_pass_marks(marks)
    assert cache.pass_marks() == marks
    cache.commit()
    assert cache.committed == 5


@caches
def test_a_switch_empties_the_ring_and_gives_the_chunks_out_again_in_order(make):
    cache = make()
    stream(cache, 5)
    cache.update_bank(TEXT_KEYS)
    assert cache.restart_window() == [9, 12]
    for first_frame, window in ((9, [9, 10, 11]), (12, [9, 10, 11, 12, 13, 14])):
        assert cache.begin_chunk() == first_frame
        assert cache.window_frames() == window and cache.window(0)[0].shape[1] == 6 * len(window)
        one_pass(cache, first_frame, seed=7, clean=False)
        cache.commit()
    assert cache.committed == 5 and cache.begin_chunk() == 15


@caches
def test_a_switch_of_one_story_leaves_the_keys_of_the_other(make):
    cache, untouched = make(), make()
    stream(cache, 4)
    stream(untouched, 4)
    kept = {frame: untouched.window_frames().index(frame) for frame in range(6, 12)}
    assert list(kept.values()) == [6, 7, 8, 0, 1, 2], "they do not lie in the order in which they are passed again"
    cache.update_bank(TEXT_KEYS)
    untouched.update_bank(TEXT_KEYS)
    for _ in cache.restart_window([False, True]):
        one_pass(cache, cache.begin_chunk(), seed=7, clean=False)
        cache.commit()
    cache.begin_chunk()
    untouched.begin_chunk()
    for now, before in zip(cache.window(1), untouched.window(1), strict=True):
        for frame, place in kept.items():
            here = cache.window_frames().index(frame)
            new, old = (x[:, at * 6 : at * 6 + 6] for x, at in ((now, here), (before, place)))
            assert torch.equal(new[0], old[0]) and not torch.equal(new[1], old[1])


@caches
def test_an_aborted_recaching_is_begun_again(make):
    cache = make()
    stream(cache, 5)
    cache.update_bank(TEXT_KEYS)
    cache.restart_window()
    one_pass(cache, cache.begin_chunk(), seed=7, clean=False)
    cache.commit()
    with pytest.raises(RuntimeError, match="commit or abort it first"):
        cache.state_dict()
    cache.abort()
    assert cache.window_frames() == [9, 10, 11, 12, 13, 14]
    assert cache.restart_window() == [9, 12]


@caches
def test_calls_out_of_order_and_bad_arguments_are_refused(make):
    cache = make()
    stream(cache, 4)
    k, v = torch.zeros(2, 2, 18, 2, 4)
    reads = [lambda f=f: f(0) for f in (cache.window, cache.dense, cache.memory)]
    for call in (lambda: cache.write(0, k, v), cache.commit, lambda: cache.pass_shape(True), *reads):
        with pytest.raises(RuntimeError, match="no chunk is open"):
            call()
    with pytest.raises(ValueError, match="stories must have 2 entries, got 1"):
        cache.restart_window([True])
    cache.update_bank(TEXT_KEYS)
    assert cache.restart_window() == [6, 9]
    with pytest.raises(RuntimeError, match="2 chunks are still to be re-cached"):
        cache.restart_window()
    cache.begin_chunk()
    for call in (cache.begin_chunk, cache.restart_window):
        with pytest.raises(RuntimeError, match="has not been committed"):
            call()
    with pytest.raises(ValueError, match=r"got \(2, 17, 2, 4\)"):
        cache.write(0, k[:, 1:], v)
    with pytest.raises(ValueError, match="layer must be 0 to 1, got 2"):
        cache.write(2, k, v)


@caches
@pytest.mark.parametrize("recache", ["no", "all stories", "the second story"])
def test_what_a_pass_with_gradients_wrote_is_read_as_part_of_its_graph(make, recache):
    """Window and dense hold the same frames as without gradients, and gradients end at what is not the pass's own."""
    cache, own_stories = make(), [True, True]
    stream(cache, 5)
    cache.update_bank(TEXT_KEYS)
    if recache != "no":
        own_stories = [recache == "all stories", True]
        cache.restart_window(own_stories)
    cache.begin_chunk()
    k, v = torch.randn(2, 2, 18, 2, 4, requires_grad=True).unbind()
    for read in (cache.window, cache.dense):
        cache.write(0, k, v)
        in_graph, bank = read(0), cache.memory(0)
        gradient = torch.autograd.grad(in_graph[0].sum() + 2 * in_graph[1].sum(), (k, v))
        for factor, of in zip((1.0, 2.0), gradient, strict=True):
            expected = torch.tensor(own_stories, dtype=torch.float32).view(2, 1, 1, 1) * factor
            assert torch.equal(of, expected.expand_as(of))
        cache.write(0, k.detach(), v.detach())
        for a, b in zip(in_graph, read(0), strict=True):
            assert a.requires_grad and not b.requires_grad
            assert torch.equal(a.detach().sort(1).values, b.sort(1).values)
        frames, memory = int(bank.frames[0]), cache.memory(0)
        stored = memory.keys.unflatten(1, (-1, 6))[:, memory.slots[0, :frames].long()].flatten(1, 2)
        assert torch.equal(bank.keys[:, : frames * 6].nan_to_num(), stored.nan_to_num())
    cache.write(0, k, v)
    cache.abort()
    assert not cache._in_graph  # the graph is not kept alive


@caches
def test_a_write_refuses_tangents(make):
    """What is written keeps no tangent, so that a derivative in forward mode would be zero."""
    cache = make()
    cache.update_bank(TEXT_KEYS)
    cache.begin_chunk()
    k, v = torch.zeros(2, 2, 18, 2, 4)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="write has no forward-mode derivative"):
        cache.write(0, forward_ad.make_dual(k, v), v)
    cache.write(0, k, v)
