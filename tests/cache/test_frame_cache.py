"""The frame cache against a plain Python list of every frame ever written."""

import random

import pytest
import torch
from torch import Tensor

from memflow_ops import describe_blocks
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout

LAYERS, TOKENS, HEADS, HEAD_DIM, BLOCK = 2, 5, 2, 4, 2  # 5 tokens in blocks of 2: the last block of a frame is ragged


def layout_of(**sizes) -> CacheLayout:
    return CacheLayout(LAYERS, sizes.pop("batch", 1), TOKENS, HEADS, HEAD_DIM, **{"block_size": BLOCK, **sizes})


class Naive:
    """Keeps every frame as a tensor of its own and copies whatever is asked for.

    A frame is (keys, values, un-rotated keys), each (LAYERS, TOKENS, HEADS, HEAD_DIM), all of them random numbers, so
    that a frame is recognised by its content alone.
    """

    def __init__(self, layout: CacheLayout):
        self.layout = layout
        self.now = [{} for _ in range(layout.batch)]  # as the window holds them, re-cached ones included
        self.first = [{} for _ in range(layout.batch)]  # as of their own clean pass: what sink and history keep

    def numbers(self) -> list[Tensor]:
        """Fresh random keys, values and un-rotated keys of a chunk: (LAYERS, B, chunk tokens, HEADS, HEAD_DIM)."""
        shape = (LAYERS, self.layout.batch, self.layout.chunk_tokens, HEADS, HEAD_DIM)
        return [torch.randn(shape) for _ in range(3)]

    def put(self, first_frame: int, numbers: list[Tensor], stories: list[bool] | None = None) -> None:
        for story in range(self.layout.batch):
            for i in range(self.layout.chunk_frames):
                frame = [t[:, story, i * TOKENS : (i + 1) * TOKENS] for t in numbers]
                if stories is None or stories[story]:
                    self.now[story][first_frame + i] = frame
                self.first[story].setdefault(first_frame + i, frame)


def write(cache: FrameCache, numbers: list[Tensor], remember: bool) -> None:
    for layer in range(LAYERS):
        cache.write(layer, numbers[0][layer], numbers[1][layer])
        if remember:
            cache.remember(layer, numbers[2][layer])


def add_chunk(cache: FrameCache, naive: Naive) -> int:
    """A chunk of two passes; the first leaves nothing behind."""
    first_frame = cache.begin_chunk()
    write(cache, naive.numbers(), remember=False)
    numbers = naive.numbers()
    write(cache, numbers, remember=True)
    naive.put(first_frame, numbers)
    return first_frame


def expected_window(layout: CacheLayout, first_frame: int) -> list[int]:
    end = first_frame + layout.chunk_frames
    return list(range(max(0, end - layout.window_frames), end))


def check_window(cache: FrameCache, naive: Naive, expected: list[int]) -> None:
    frames = cache.window_frames()
    assert sorted(frames) == expected
    for layer in range(LAYERS):
        for view, part in zip(cache.window(layer), (0, 1), strict=True):
            for story, known in enumerate(naive.now):
                want = torch.cat([known[frame][part][layer] for frame in frames])
                torch.testing.assert_close(view[story], want, rtol=0, atol=0)


def check_memory(cache: FrameCache, naive: Naive, first_in_window: int) -> None:
    """What memory_attention will see, followed through the slot table, is what these frames were when made."""
    layout, bank = cache.layout, cache.bank()
    for layer in range(LAYERS):
        memory = cache.memory(layer)
        assert memory.frames.tolist() == [len(frames) for frames in bank]
        for story, frames in enumerate(bank):
            assert len(set(frames)) == len(frames) and all(frame < first_in_window for frame in frames)
            for j, frame in enumerate(frames):
                place = int(memory.slots[story, j])
                tokens = slice(place * TOKENS, (place + 1) * TOKENS)
                known = naive.first[story][frame]
                assert torch.equal(memory.keys[story, tokens], known[0][layer])
                assert torch.equal(memory.values[story, tokens], known[1][layer])
                blocks = layout.blocks_per_frame
                got = memory.descriptors[story, place * blocks : (place + 1) * blocks]
                want = [known[0][layer][start : start + BLOCK].mean(0) for start in range(0, TOKENS, BLOCK)]
                torch.testing.assert_close(got, torch.stack(want), rtol=0, atol=1e-6)


def check_candidates(cache: FrameCache, naive: Naive) -> None:
    """The means are those of the un-rotated keys, weighted lengths included, for every remembered frame."""
    candidates = cache.candidates()
    start = 0
    for n, length in enumerate(candidates.lengths):
        for story, frames in enumerate(candidates.frames):
            for row, frame in enumerate(frames):
                want = naive.first[story][frame][2][:, start : start + length].mean(1)
                torch.testing.assert_close(candidates.means[:, story, row, n], want, rtol=0, atol=1e-6)
        start += length
    assert start == TOKENS


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
        tensor.fill_(torch.nan)  # whatever is read before it was written shows
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


def run_chunks(cache: FrameCache, naive: Naive, chunks: int, banks=()) -> None:
    for chunk in range(chunks):
        if chunk < len(banks):
            cache.set_bank([banks[chunk]] * cache.layout.batch)
        add_chunk(cache, naive)
        cache.commit()


def on_device(cache: FrameCache) -> list[list[int]]:
    return [[p.frame for p in story.history.values() if p.slot is not None] for story in cache._stories]


def test_the_least_recently_retrieved_moves_to_host_first():
    layout = layout_of(device_frames=4, host_frames=10, sink_frames=0, window_frames=3)
    cache, naive = FrameCache(layout), Naive(layout)
    run_chunks(cache, naive, 4)
    assert on_device(cache) == [[0, 3, 6, 9]]
    cache.set_bank([[0, 3]])
    add_chunk(cache, naive)
    cache.commit()
    assert on_device(cache) == [[0, 3, 9, 12]], "6 was stored after 0 and 3, but they have been retrieved since"
    cache.set_bank([[6, 9, 12]])
    assert on_device(cache)[0][-3:] == [6, 9, 12] and len(on_device(cache)[0]) == 4
    assert cache.candidate_frames() == [[0, 3, 6, 9, 12]], "nothing is forgotten"


def test_beyond_the_host_share_the_oldest_is_forgotten():
    layout = layout_of(device_frames=4, host_frames=2, sink_frames=0, window_frames=3)
    cache, naive = FrameCache(layout), Naive(layout)
    run_chunks(cache, naive, 7, banks=[[], [0], [0], [0], [0], [0], [0]])
    assert cache.candidate_frames() == [[0, 6, 9, 12, 15, 18]], "0 is retrieved for every chunk, so 3 moved first"
    run_chunks(cache, naive, 3)
    assert cache.candidate_frames() == [[12, 15, 18, 21, 24, 27]]


def test_a_newcomer_is_not_the_first_to_go():
    """Though the same old frames are retrieved again and again, a new one stays long enough to be found."""
    layout = layout_of(device_frames=5, host_frames=0, sink_frames=0)
    cache, naive = FrameCache(layout), Naive(layout)
    for _ in range(30):
        candidates = cache.candidate_frames()[0]
        cache.set_bank([candidates[:3]])
        first_frame = add_chunk(cache, naive)
        assert {first_frame - 6, first_frame - 9} <= {*candidates, *range(-9, 0)}
        cache.commit()


def test_stories_of_a_batch_are_remembered_as_if_alone():
    """Same frames remembered, on the same side, with small caps and different retrievals."""
    sizes = {"device_frames": 4, "host_frames": 2, "sink_frames": 1}
    together, naive = FrameCache(layout_of(**sizes, batch=2)), Naive(layout_of(**sizes, batch=2))
    alone = [FrameCache(layout_of(**sizes)) for _ in range(2)]
    choice = random.Random(0)
    for _ in range(30):
        chosen = [choice.sample(frames, min(2, len(frames))) for frames in together.candidate_frames()]
        together.set_bank(chosen)
        for cache, frames in zip(alone, chosen, strict=True):
            cache.set_bank([frames])
        first_frame = together.begin_chunk()
        numbers = naive.numbers()
        write(together, numbers, remember=True)
        naive.put(first_frame, numbers)
        together.commit()
        for story, cache in enumerate(alone):
            cache.begin_chunk()
            write(cache, [t[:, story : story + 1] for t in numbers], remember=True)
            cache.commit()
        assert together.candidate_frames() == [cache.candidate_frames()[0] for cache in alone]
        assert on_device(together) == [on_device(cache)[0] for cache in alone]
    assert on_device(together)[0] != on_device(together)[1], "the stories did differ"


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


def test_descriptors_are_those_of_describe_blocks_bit_for_bit_after_a_trip_to_host():
    layout = layout_of(device_frames=4, host_frames=20, sink_frames=0)
    cache, naive = FrameCache(layout), Naive(layout)
    run_chunks(cache, naive, 12)
    assert 0 not in on_device(cache)[0]
    cache.set_bank([[0, 3]])
    cache.begin_chunk()
    memory = cache.memory(1)
    for j, frame in enumerate((0, 3)):
        place, blocks = int(memory.slots[0, j]), layout.blocks_per_frame
        want = describe_blocks(naive.first[0][frame][0][1][None], BLOCK, TOKENS)
        assert torch.equal(memory.descriptors[:, place * blocks : (place + 1) * blocks], want)


def test_views_and_tables_stay_where_they_are():
    """A captured graph could go on reading them; nothing is reallocated or copied per pass."""
    layout = layout_of(device_frames=5, host_frames=5)
    cache, naive = FrameCache(layout), Naive(layout)
    addresses = set()
    for _ in range(20):
        cache.set_bank([frames[-2:] for frames in cache.candidate_frames()])
        add_chunk(cache, naive)
        addresses.add(tuple(t.data_ptr() for t in (*cache.memory(1), *cache.window(1))))
        cache.commit()
    assert len(addresses) == 1


def test_attention_reads_the_tokens_of_a_head_one_after_the_other():
    cache = FrameCache(layout_of(batch=2, device_frames=4))
    cache.begin_chunk()
    memory = cache.memory(1)
    for x in (*cache.window(1), *cache.dense(0), memory.keys, memory.values):
        assert x.stride()[1:] == (HEAD_DIM, cache.layout.pool_frames * TOKENS * HEAD_DIM, 1)


def test_gradients_do_not_enter_the_cache():
    layout = layout_of()
    cache = FrameCache(layout)
    cache.begin_chunk()
    k = torch.randn(1, layout.chunk_tokens, HEADS, HEAD_DIM, requires_grad=True)
    cache.write(0, k * 2, k)
    cache.remember(0, k)
    assert not cache.window(0)[0].requires_grad
    assert torch.equal(cache.window(0)[0], 2 * k.detach())


# --------------------------------------------------------------------------------------------------------------- misuse


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
    with pytest.raises(RuntimeError, match="means of layers \\[0, 1\\] have not been taken"):
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
        ([[0]], r"frames \[0\] are not among"),  # a sink frame is in the bank anyway
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


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ({"window_frames": 7}, ValueError, "window_frames must be a multiple of chunk_frames=3, got 7"),
        ({"chunk_frames": 0}, ValueError, "chunk_frames must be positive, got 0"),
        ({"batch": 0}, ValueError, "batch must be positive, got 0"),
        ({"sink_frames": -1}, ValueError, "sink_frames must be at least 0, got -1"),
        ({"bank_frames": 2.0}, TypeError, "bank_frames must be an int, got 2.0"),
        ({"block_size": True}, TypeError, "block_size must be an int, got True"),
        ({"relevance_block_size": 0}, ValueError, "relevance_block_size must be positive, got 0"),
        ({"device_frames": 3}, ValueError, "= 4 frames .*, got 3"),
        ({"device_frames": 0, "host_frames": 1}, ValueError, "host_frames=1 needs device_frames > 0"),
        ({"dtype": torch.int8}, TypeError, "floating-point torch.dtype, got torch.int8"),
        ({"dtype": "float32"}, TypeError, "floating-point torch.dtype, got 'float32'"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(sizes, kind, message):
    with pytest.raises(kind, match=message):
        layout_of(**sizes)


def test_bytes_are_stated_before_and_match_what_is_allocated():
    # Wan 2.1 1.3B in bf16: a frame of 1560 tokens is 288 MB of keys and values over 30 layers.
    large = CacheLayout(30, 1, 1560, 12, 128, device_frames=64, host_frames=80, dtype=torch.bfloat16)
    keys_values = 30 * 2 * 1560 * 12 * 128 * 2
    assert keys_values == pytest.approx(288e6, rel=0.01)
    assert large.frame_bytes == keys_values + 30 * 25 * 12 * 128 * 2
    assert large.pool_bytes == (3 + 6 + 64) * large.frame_bytes
    assert large.means_bytes == 144 * 30 * 12 * 128 * 2
    assert large.host_bytes == 81 * large.frame_bytes

    layout = layout_of(batch=2, device_frames=6, host_frames=5, relevance_block_size=2)
    cache = FrameCache(layout)
    pool = cache._keys.nbytes + cache._values.nbytes + cache._descriptors.nbytes
    assert layout.pool_bytes == pool
    assert layout.device_bytes == pool + cache._means.nbytes
    naive = Naive(layout)
    choice = random.Random(0)
    for _ in range(30):
        cache.set_bank([choice.sample(frames, min(3, len(frames))) for frames in cache.candidate_frames()])
        add_chunk(cache, naive)
        cache.commit()
    places = [p for story in cache._stories for p in (*story.free_host, *(q.host for q in story.history.values()))]
    assert sum(t.nbytes for place in places for t in place) <= layout.host_bytes


def test_one_layer_of_one_story():
    """A cache per layer, as a model of somebody else's may want it; and a commit empties the bank."""
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
