"""The sizes of the caches are checked, and their cost in bytes is known before anything is allocated."""

import random

import numpy as np
import pytest
import torch
from frame_lists import Naive, add_chunk, layout_of

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.released_layout import ReleasedLayout


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
        ({"score": "max"}, ValueError, "score must be one of mean, moments, normalised, got 'max'"),
        ({"dtype": "float32"}, TypeError, "floating-point torch.dtype, got 'float32'"),
    ],
    ids=str,
)
def test_impossible_sizes_are_refused(sizes, kind, message):
    with pytest.raises(kind, match=message):
        layout_of(**sizes)


def test_sizes_may_be_integers_of_numpy():
    """They become plain ints: products of small integers of numpy would overflow."""
    sizes = {"batch": np.uint8(2), "window_frames": np.int64(9), "block_size": np.int32(4)}
    layout = layout_of(**sizes)
    assert layout == layout_of(**{name: int(n) for name, n in sizes.items()})
    assert all(type(getattr(layout, name)) is int for name in sizes)
    assert type(ReleasedLayout(1, 1, np.uint8(200), 1, 4).block_size) is int


def test_bytes_are_stated_before_and_match_what_is_allocated():
    # Wan 2.1 1.3B in bf16: a frame of 1560 tokens is 288 MB of keys and values over 30 layers.
    large = CacheLayout(30, 1, 1560, 12, 128, device_frames=64, host_frames=80, dtype=torch.bfloat16)
    keys_values = 30 * 2 * 1560 * 12 * 128 * 2
    assert keys_values == pytest.approx(288e6, rel=0.01)
    assert large.frame_bytes == keys_values + 30 * 25 * 12 * 128 * 2
    assert large.pool_bytes == (3 + 6 + 64) * large.frame_bytes
    assert large.means_bytes == 144 * 30 * 12 * 128 * 2
    assert large.host_bytes == 81 * large.frame_bytes
    wider = CacheLayout(30, 1, 1560, 12, 128, device_frames=64, dtype=torch.bfloat16, score="moments")
    assert wider.frame_bytes - large.frame_bytes == 30 * 25 * 12 * 128 * 2
    assert wider.frame_bytes / large.frame_bytes == pytest.approx(1.008, abs=0.001)

    layout = layout_of(batch=2, device_frames=6, host_frames=5, relevance_block_size=2, score="moments")
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


def test_bytes_of_a_released_cache_are_stated_before():
    # Wan 2.1 1.3B in bf16, as released: 3 sink, 3 bank and 9 window frames of 288 MB each.
    large = ReleasedLayout(30, 1, 1560, 12, 128, dtype=torch.bfloat16)
    assert large.device_bytes == 15 * large.frame_bytes == pytest.approx(15 * 288e6, rel=0.01)
    assert large.host_bytes == 0 and large.blocks_per_frame == 1
    cache = ReleasedCache(ReleasedLayout(2, 2, 5, 2, 4))
    assert cache.layout.device_bytes == sum(t.nbytes for t in (cache._keys, cache._values, cache._descriptors))
