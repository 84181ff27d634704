"""Which prototypes a story keeps on the device, moves to host memory, and forgets."""

import random

import pytest
import torch
from frame_lists import BLOCK, TOKENS, Naive, add_chunk, layout_of, on_device, run_chunks, write

from memflow_ops import describe_blocks
from memflow_ops.cache.frame_cache import FrameCache


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
    """The same frames are remembered, and on the same side, with little room and different retrievals."""
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


@pytest.mark.parametrize("score", ["mean", "moments"])
def test_descriptors_are_those_of_describe_blocks_bit_for_bit_after_a_trip_to_host(score):
    layout = layout_of(device_frames=4, host_frames=20, sink_frames=0, score=score)
    cache, naive = FrameCache(layout), Naive(layout)
    run_chunks(cache, naive, 12)
    assert 0 not in on_device(cache)[0]
    cache.set_bank([[0, 3]])
    cache.begin_chunk()
    memory = cache.memory(1)
    for j, frame in enumerate((0, 3)):
        place, blocks = int(memory.slots[0, j]), layout.blocks_per_frame
        want = describe_blocks(naive.first[0][frame][0][1][None], BLOCK, TOKENS, moments=layout.moments)
        assert torch.equal(memory.descriptors[:, place * blocks : (place + 1) * blocks], want)
