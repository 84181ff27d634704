"""Latency: the figures of a stream whose times are known, and the deadlines that it misses."""

import pytest

from memflow_ops.model.streaming.latency import Latency, percentile


def test_nothing_is_said_before_the_first_chunk():
    latency = Latency(5.0)
    assert latency.record() is None and latency.ahead(7.0) == 0.0


def test_a_stream_that_keeps_up_misses_nothing():
    latency = Latency()
    for _ in range(5):
        latency.add(0.5, 0.75)
    said = latency.record()
    assert (said["missed_deadlines"], said["stalled_seconds"], said["chunks"]) == (0, 0.0, 5)
    assert said["time_to_first_frame"] == 0.5 and said["chunk_p50"] == said["chunk_p95"] == 0.5
    assert said["real_time_factor"] == pytest.approx(1.5)
    assert latency.ahead(2.5) == pytest.approx(0.5 + 5 * 0.75 - 2.5)


def test_a_late_chunk_moves_the_deadlines_after_it():
    """Chunks of 1 s of video. The first is there at 2 s, so the next are due at 3, 4 and, after a stall of half a
    second, at 5.5 s."""
    latency = Latency(started=1.0)
    latency.add(1.0, 1.0, at=3.0)  # due from 4.0 on
    latency.add(0.8, 1.0, at=3.8)
    latency.add(1.7, 1.0, at=5.5)  # 0.5 late
    latency.add(1.0, 1.0, at=6.5)  # due at 6.5
    latency.add(1.2, 1.0, at=7.7)  # 0.2 late
    said = latency.record()
    assert said["time_to_first_frame"] == 2.0
    assert said["missed_deadlines"] == 2 and said["stalled_seconds"] == pytest.approx(0.7)
    assert said["chunk_p50"] == 1.0 and said["chunk_p95"] == 1.7
    assert said["real_time_factor"] == pytest.approx(4 / 4.7)


def test_a_pause_is_no_missed_deadline_and_a_cut_plays_at_once():
    latency = Latency()
    latency.add(1.0, 1.0, at=1.0)
    latency.hold(10.0)
    latency.add(1.0, 1.0, at=11.5)
    assert latency.missed == 0 and latency.ahead(11.5) == pytest.approx(1.5)
    latency.add(0.2, 1.0, at=11.7, cut=True)  # what was not shown yet is left out
    assert latency.missed == 0 and latency.ahead(11.7) == pytest.approx(1.0)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1), (0.5, 5), (0.51, 6), (0.95, 10), (1.0, 10)])
def test_percentiles_are_of_the_nearest_rank(share, expected):
    assert percentile(range(1, 11), share) == expected
