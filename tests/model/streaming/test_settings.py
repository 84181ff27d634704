"""Settings that cannot work are refused when they are made."""

import pytest

from memflow_ops.model.streaming.settings import StreamSettings

SIZES = {"height": 8, "width": 8, "block_size": 4, "device_frames": 40}


def test_a_stream_has_no_size_of_its_own():
    with pytest.raises(TypeError, match="height"):
        StreamSettings(width=8)


@pytest.mark.parametrize("value", [24.0, "24", True], ids=str)
def test_what_is_no_integer_is_refused(value):
    with pytest.raises(TypeError, match="top_k must be an int, got"):
        StreamSettings(**SIZES, top_k=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": "all"}, "memory must be one of none, sink, memflow, full, released, got 'all'"),
        ({"relevance": "cosine"}, "relevance must be one of linear, softmax, coverage, random, got 'cosine'"),
        ({"window_frames": 7}, "window_frames must be a multiple of chunk_frames=3, got 7"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"steps": 1001}, "steps must be at most 1000"),
        ({"bank_frames": 10**30}, "bank_frames must be at most 2147483647, got 1000"),
        ({"shift": -1.0}, "shift must be positive, got -1.0"),
        ({"top_k": 0}, "top_k must be positive, got 0"),
        ({"query_group": 0}, "query_group must be positive or None"),
        ({"redundancy": 2.0}, "redundancy is a cosine"),
        ({"device_frames": 2}, "device_frames must hold the bank"),
        ({"positions": "slots"}, "positions must be one of absolute, bounded, got 'slots'"),
        ({"block_size": 0}, "block_size must be positive, got 0"),
        ({"top_frames": 0}, "top_frames must be positive or None"),
        ({"record_interval": 0}, "record_interval must be positive, got 0"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        StreamSettings(**{**SIZES, **changes})
