"""A `FrameCache` holds what a plain Python list of every frame ever written holds."""

import random

import pytest
import torch
from frame_lists import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    TOKENS,
    Naive,
    add_chunk,
    check_candidates,
    check_memory,
    check_window,
    expected_window,
    layout_of,
    run_chunks,
    write,
)

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout

SETTINGS = {
    "default": {},
    "batch-2": {"batch": 2},
    "window-is-chunk": {"window_frames": 3},
    "window-9-sink-4": {"window_frames": 9, "sink_frames": 4, "batch": 2},
    "no-sink": {"sink_frames": 0},
    "sink-beyond-window": {"sink_frames": 8, "window_frames": 6},
    "chunk-1": {"chunk_frames": 1, "window_frames": 3, "sink_frames": 2, "batch": 2},
    "host": {"device_frames": 4, "host_frames": 40},
    "host-batch-2": {"device_frames": 5, "host_frames": 6, "batch": 2, "window_frames": 9},
    "host-full": {"device_frames": 4, "host_frames": 3, "batch": 2},
    "forgetting": {"device_frames": 7, "host_frames": 0, "batch": 2},
    "block-means": {"relevance_block_size": 2, "device_frames": 4, "host_frames": 9},
    "one-mean-too-large-a-block": {"relevance_block_size": 64, "block_size": 2},
}


@pytest.mark.parametrize("sizes", SETTINGS.values(), ids=SETTINGS)
def test_against_a_list_of_all_frames(sizes):
    """Dozens of chunks with random retrieval and, now and then, re-caching for some of the stories."""
    torch.manual_seed(0)
    choice = random.Random(0)
    layout = layout_of(**{"device_frames": 40, **sizes})
    cache, naive = FrameCache(layout), Naive(layout)
    for tensor in (cache._keys, cache._values, cache._descriptors, cache._means):
        tensor.fill_(torch.nan)  # so that a value that is read before it was written shows
    for chunk in range(40):
        coming = chunk * layout.chunk_frames
        first_in_window = max(0, coming + layout.chunk_frames - layout.window_frames)
        candidates = cache.candidate_frames()
        prototypes = range(0, first_in_window, layout.chunk_frames)
        past = [frame for frame in prototypes if frame >= layout.sink_frames]
        for frames in candidates:
            assert frames == sorted(set(frames)) and set(frames) <= set(past)
            if len(past) <= layout.device_frames - layout.window_chunks:
                assert frames == past
        assert len({len(frames) for frames in candidates}) == 1
        check_candidates(cache, naive)

        cache.set_bank([choice.sample(frames, min(len(frames), choice.randint(0, 3))) for frames in candidates])
        if choice.random() < 0.3:
            stories = [choice.random() < 0.6 for _ in range(layout.batch)]
            passed_again = cache.restart_window(stories)
            assert passed_again == list(range(first_in_window, coming, layout.chunk_frames))
            for number, first_frame in enumerate(passed_again):
                assert cache.begin_chunk() == first_frame
                numbers = naive.numbers()
                write(cache, numbers, remember=False)
                naive.put(first_frame, numbers, stories)
                check_window(cache, naive, list(range(first_in_window, first_frame + layout.chunk_frames)))
                check_memory(cache, naive, first_in_window)
                assert len(cache.window_frames()) == (number + 1) * layout.chunk_frames
                cache.commit()
        assert add_chunk(cache, naive) == coming
        check_window(cache, naive, expected_window(layout, coming))
        check_memory(cache, naive, first_in_window)
        assert cache.visible_sink() == min(layout.sink_frames, first_in_window)
        cache.commit()


@pytest.mark.parametrize("sizes", [{}, {"sink_frames": 0}, {"sink_frames": 4, "window_frames": 9, "batch": 2}], ids=str)
@pytest.mark.parametrize("history", [True, False], ids=["history", "sink-only"])
def test_dense_view_holds_every_remembered_frame_once(sizes, history):
    torch.manual_seed(0)
    layout = layout_of(**sizes, device_frames=20 if history else 0, bank_frames=0)
    cache, naive = FrameCache(layout), Naive(layout)

    def check(window: list[int], first_in_window: int) -> None:
        sink = list(range(min(layout.sink_frames, first_in_window)))
        prototypes = range(0, first_in_window, layout.chunk_frames)
        past = [frame for frame in prototypes if frame >= layout.sink_frames] if history else []
        for layer in range(LAYERS):
            keys, values = cache.dense(layer)
            for story in range(layout.batch):
                first, now = naive.first[story], naive.now[story]
                frames = [first[frame] for frame in sink + past] + [now[frame] for frame in window]
                for part, got in ((0, keys[story]), (1, values[story])):
                    want = torch.cat([frame[part][layer] for frame in frames])
                    # Keys have no order: compare as sets of rows.
                    torch.testing.assert_close(
                        got.flatten(1)[got.flatten(1)[:, 0].argsort()],
                        want.flatten(1)[want.flatten(1)[:, 0].argsort()],
                        rtol=0,
                        atol=0,
                    )

    for chunk in range(20):
        coming = chunk * layout.chunk_frames
        first_in_window = max(0, coming + layout.chunk_frames - layout.window_frames)
        if chunk % 4 == 3:
            for first_frame in cache.restart_window():
                cache.begin_chunk()
                numbers = naive.numbers()
                write(cache, numbers, remember=False)
                naive.put(first_frame, numbers)
                check(list(range(first_in_window, first_frame + layout.chunk_frames)), first_in_window)
                cache.commit()
        add_chunk(cache, naive)
        check(expected_window(layout, coming), first_in_window)
        pool = cache.memory(0).keys
        keys, _ = cache.dense(0)
        assert keys.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr(), "a view, not a copy"
        cache.commit()


def test_no_frame_is_attended_to_twice_over_a_long_run():
    torch.manual_seed(0)
    choice = random.Random(1)
    layout = layout_of(device_frames=6, host_frames=30, batch=2, sink_frames=4)
    cache, naive = FrameCache(layout), Naive(layout)
    for chunk in range(400):  # frames up to 1200
        cache.set_bank([choice.sample(frames, min(3, len(frames))) for frames in cache.candidate_frames()])
        if chunk % 7 == 6:
            for _ in cache.restart_window():
                cache.begin_chunk()
                write(cache, naive.numbers(), remember=False)
                for bank in cache.bank():
                    assert not set(bank) & set(cache.window_frames())
                cache.commit()
        assert add_chunk(cache, naive) == 3 * chunk
        for bank in cache.bank():
            attended = bank + cache.window_frames()
            assert len(attended) == len(set(attended))
            assert len(bank) == min(4, max(0, 3 * chunk - 3)) + min(3, len(cache.candidate_frames()[0]))
        cache.commit()
        for known in (*naive.now, *naive.first):  # the list itself must not grow with the story
            known.clear()


def test_a_switch_of_one_story_leaves_the_other_as_it_was():
    layout = layout_of(batch=2, window_frames=9)
    cache, naive = FrameCache(layout), Naive(layout)
    run_chunks(cache, naive, 5)
    kept = [[t.clone() for t in naive.now[0][frame]] for frame in range(9, 15)]
    cache.restart_window([False, True])
    for _ in range(2):
        cache.begin_chunk()
        write(cache, naive.numbers(), remember=False)
        cache.commit()
    add_chunk(cache, naive)
    keys, values = cache.window(1)
    assert cache.window_frames() == list(range(9, 18))
    for i, frame in enumerate(kept):
        assert torch.equal(keys[0, i * TOKENS : (i + 1) * TOKENS], frame[0][1])
        assert torch.equal(values[0, i * TOKENS : (i + 1) * TOKENS], frame[1][1])
        assert not torch.equal(keys[1, i * TOKENS : (i + 1) * TOKENS], naive.now[1][9 + i][0][1])


def test_views_and_tables_stay_where_they_are():
    """Nothing is reallocated or copied per pass, so a CUDA graph can go on reading the same memory."""
    layout = layout_of(device_frames=5, host_frames=5)
    cache, naive = FrameCache(layout), Naive(layout)
    addresses = set()
    for _ in range(20):
        cache.set_bank([frames[-2:] for frames in cache.candidate_frames()])
        add_chunk(cache, naive)
        addresses.add(tuple(t.data_ptr() for t in (*cache.memory(1)[:5], *cache.window(1))))
        cache.commit()
    assert len(addresses) == 1


def test_attention_reads_the_tokens_of_a_head_one_after_the_other():
    cache = FrameCache(layout_of(batch=2, device_frames=4))
    cache.begin_chunk()
    memory = cache.memory(1)
    for x in (*cache.window(1), *cache.dense(0), memory.keys, memory.values):
        assert x.stride()[1:] == (HEAD_DIM, cache.layout.pool_frames * TOKENS * HEAD_DIM, 1)


def test_gradients_reach_what_was_written_last_and_do_not_enter_the_pools():
    layout = layout_of()
    cache = FrameCache(layout)
    cache.begin_chunk()
    k = torch.randn(1, layout.chunk_tokens, HEADS, HEAD_DIM, requires_grad=True)
    cache.write(0, k * 2, k)
    cache.remember(0, k)
    keys, values = cache.window(0)
    (gradient,) = torch.autograd.grad(keys.sum() + values.sum(), k)
    assert torch.equal(gradient, torch.full_like(k, 3.0))
    cache.write(0, k.detach() * 2, k.detach())
    assert not cache.window(0)[0].requires_grad
    assert torch.equal(cache.window(0)[0], 2 * k.detach())


def ready_cache() -> tuple[FrameCache, Naive]:
    cache, naive = FrameCache(layout_of()), Naive(layout_of())
    run_chunks(cache, naive, 5)
    return cache, naive


def test_calls_out_of_order_are_errors_and_lose_nothing():
    cache, naive = ready_cache()
    numbers = naive.numbers()
    for call in (
        lambda: cache.write(0, numbers[0][0], numbers[1][0]),
        lambda: cache.remember(0, numbers[2][0]),
        cache.commit,
        lambda: cache.window(0),
        lambda: cache.dense(0),
        lambda: cache.memory(0),
    ):
        with pytest.raises(RuntimeError, match="no chunk is open"):
            call()
    cache.begin_chunk()
    with pytest.raises(RuntimeError, match="layers \\[0, 1\\] have not been written"):
        cache.commit()
    for layer in range(LAYERS):
        cache.write(layer, numbers[0][layer], numbers[1][layer])
    with pytest.raises(RuntimeError, match="last pass over layers \\[0, 1\\] was not the clean one"):
        cache.commit()
    for call in (cache.begin_chunk, cache.restart_window):
        with pytest.raises(RuntimeError, match="has not been committed"):
            call()
    with pytest.raises(RuntimeError, match="before begin_chunk"):
        cache.set_bank([[]])
    for layer in range(LAYERS):
        cache.remember(layer, numbers[2][layer])
    naive.put(15, numbers)
    cache.commit()
    with pytest.raises(RuntimeError, match="no chunk is open"):
        cache.commit()
    cache.restart_window()
    with pytest.raises(RuntimeError, match="1 chunks are still to be re-cached"):
        cache.restart_window()
    assert cache.begin_chunk() == 15
    with pytest.raises(RuntimeError, match="keeps the prototype of its first prompt"):
        cache.remember(0, numbers[2][0])
    write(cache, numbers, remember=False)
    cache.commit()
    cache.set_bank([[3, 9, 12]])
    add_chunk(cache, naive)
    check_window(cache, naive, expected_window(cache.layout, 18))
    check_memory(cache, naive, 15)


@pytest.mark.parametrize(
    "sizes", [{"device_frames": 0, "bank_frames": 0}, {}, {"sink_frames": 0, "device_frames": 0, "bank_frames": 0}]
)
@pytest.mark.parametrize("last", ["never", "not last"])
def test_a_chunk_without_a_clean_pass_at_its_end_is_refused(sizes, last):
    """Of the first chunk too, which becomes the sink: all later chunks would see its noisy keys."""
    cache, naive = FrameCache(layout_of(**sizes)), Naive(layout_of(**sizes))
    for _ in range(2):
        cache.begin_chunk()
        if last == "not last":
            write(cache, naive.numbers(), remember=True)
        write(cache, naive.numbers(), remember=False)
        with pytest.raises(RuntimeError, match="noisy keys: pass the finished frames once more, at timestep 0"):
            cache.commit()
        write(cache, naive.numbers(), remember=True)
        cache.commit()
    assert cache.committed == 2


def test_bad_tensors_are_refused_before_anything_is_written():
    cache, naive = ready_cache()
    cache.begin_chunk()
    numbers = naive.numbers()
    write(cache, numbers, remember=True)
    good = torch.zeros_like(numbers[0][0])
    for bad, kind, message in (
        (good[:, 1:], ValueError, r"must be \(batch, chunk tokens, kv_heads, head_dim\) \(1, 15, 2, 4\), got \(1, 14"),
        (good.double(), TypeError, "must be torch.float32, got torch.float64"),
        (good.to("meta"), ValueError, "must be on cpu, got meta"),
    ):
        for call in (
            lambda bad=bad: cache.write(0, bad, good),
            lambda bad=bad: cache.write(0, good, bad),
            lambda bad=bad: cache.remember(0, bad),
        ):
            with pytest.raises(kind, match=message):
                call()
    with pytest.raises(ValueError, match="layer must be 0 to 1, got 2"):
        cache.write(2, good, good)
    naive.put(15, numbers)
    check_window(cache, naive, expected_window(cache.layout, 15))


def test_a_bad_bank_is_refused_and_the_old_one_stays():
    cache, naive = ready_cache()
    run_chunks(cache, naive, 3)
    cache.set_bank([[3, 6]])
    for chosen, message in (
        ([[3, 6, 9, 12]], "up to 3 different frames"),
        ([[3, 3]], "up to 3 different frames"),
        ([[4]], r"frames \[4\] are not among the 6 candidates"),
        ([[21]], r"frames \[21\] are not among"),
        ([[0]], r"frames \[0\] are not among"),  # a sink frame, which is in the bank without being retrieved
        ([[3], [3]], "one list of frames per story, 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.set_bank(chosen)
    assert cache.bank() == [[0, 1, 2, 3, 6]]
    with pytest.raises(ValueError, match="must have 1 entries, got 2"):
        cache.restart_window([True, False])


def test_dense_says_when_the_history_has_outgrown_the_device():
    layout = layout_of(device_frames=3, bank_frames=0)
    cache, naive = FrameCache(layout), Naive(layout)
    run_chunks(cache, naive, 5)
    cache.begin_chunk()
    with pytest.raises(RuntimeError, match="outgrown device_frames=3"):
        cache.dense(0)


def test_one_layer_of_one_story():
    """Another project's model may want a cache per layer. Also, a commit empties the bank."""
    torch.manual_seed(0)
    layout = CacheLayout(
        1, 1, 4, 1, 4, chunk_frames=1, window_frames=2, sink_frames=1, bank_frames=1, device_frames=3, block_size=2
    )
    cache, written = FrameCache(layout), []
    for chunk in range(4):
        if chunk == 3:
            cache.set_bank([[1]])
            assert cache.bank() == [[0, 1]]
        cache.begin_chunk()
        written.append(torch.randn(1, 4, 1, 4))
        cache.write(0, written[-1], -written[-1])
        cache.remember(0, written[-1])
        if chunk == 3:
            memory = cache.memory(0)
            assert memory.frames.tolist() == [2]
            for slot, frame in zip(memory.slots[0].tolist(), (0, 1), strict=True):
                tokens = slice(slot * 4, slot * 4 + 4)
                assert torch.equal(memory.keys[:, tokens], written[frame])
                assert torch.equal(memory.values[:, tokens], -written[frame])
        cache.commit()
    assert cache.bank() == [[0]]
    cache.begin_chunk()
    assert cache.memory(0).frames.tolist() == [1], "only the sink until something is retrieved"
