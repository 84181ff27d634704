"""A choice of the bank that stays on the device is the choice that the host would have made."""

import pytest
import torch

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout

LAYOUT = CacheLayout(
    1, 2, 4, 1, 4, sink_frames=3, bank_frames=3, device_frames=8, host_frames=3, block_size=2, dtype=torch.float32
)


def chosen_of(chunk: int, candidates: int) -> torch.Tensor:
    """Indices of chosen candidates (B, K), best first."""
    generator = torch.Generator().manual_seed(chunk)
    return torch.stack([torch.randperm(candidates, generator=generator)[:3] for _ in range(2)]).int()


def make_chunk(cache: FrameCache, on_device: bool) -> tuple[list, list]:
    """Streams a chunk; returns the bank as kernels read it and as the cache reports it."""
    candidates = cache.candidate_frames()
    if candidates[0]:
        indices = chosen_of(cache.committed, len(candidates[0]))
        if on_device and cache.moves_nothing():
            cache.set_bank_on_device(indices)
        else:
            cache.set_bank([[of[i] for i in row] for of, row in zip(candidates, indices.tolist(), strict=True)])
    first = cache.begin_chunk()
    memory = cache.memory(0)
    seen = [memory.slots.tolist(), memory.frames.tolist(), cache.bank_sizes()]
    torch.manual_seed(first)
    k, v = torch.randn(2, 2, 12, 1, 4)
    cache.write(0, k, v)
    cache.remember(0, k)
    # Not for every chunk, so that some choices are read much later.
    told = cache.bank() if cache.committed % 3 == 2 else []
    cache.commit()
    return seen, told


def test_the_same_banks_and_the_same_frames_leave_the_device():
    by_host, by_device = FrameCache(LAYOUT), FrameCache(LAYOUT)
    moved = []
    for _ in range(16):
        moved.append(not by_device.moves_nothing())
        assert make_chunk(by_host, False) == make_chunk(by_device, True)
    assert moved == sorted(moved) and 3 < sum(moved) < 12, "both ways were taken"
    a, b = by_host.state_dict(), by_device.state_dict()
    assert a["history"] == b["history"]
    # Frames of the ring have no descriptors.
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a["pools"], b["pools"], strict=True))


def test_the_choice_is_read_for_a_saved_state_and_dropped_by_an_interruption():
    by_host, by_device = FrameCache(LAYOUT), FrameCache(LAYOUT)
    for _ in range(6):
        make_chunk(by_host, False)
        make_chunk(by_device, True)
    candidates = by_device.candidate_frames()
    by_device.set_bank_on_device(chosen_of(99, len(candidates[0])))
    by_device.begin_chunk()
    by_device.abort()
    assert by_device.bank() == [[0, 1, 2]] * 2
    assert by_device.bank_sizes() == by_device._table.lengths.tolist() == [3, 3]
    indices = chosen_of(99, len(candidates[0])).tolist()
    by_host.set_bank([[of[i] for i in row] for of, row in zip(candidates, indices, strict=True)])
    assert by_host.state_dict()["history"] == by_device.state_dict()["history"]


def test_what_cannot_be_is_refused():
    cache = FrameCache(LAYOUT)
    for _ in range(6):
        make_chunk(cache, True)
    count = len(cache.candidate_frames()[0])
    with pytest.raises(ValueError, match=r"\(batch, K\) int32, got \(2, 3\) torch.int64"):
        cache.set_bank_on_device(chosen_of(0, count).long())
    with pytest.raises(ValueError, match="up to 3 frames, on cpu; got 4 on cpu"):
        cache.set_bank_on_device(torch.zeros(2, 4, dtype=torch.int32))
    for _ in range(4):
        make_chunk(cache, True)
    with pytest.raises(RuntimeError, match="no room for all of the history, use set_bank"):
        cache.set_bank_on_device(chosen_of(0, count))
    cache.begin_chunk()
    with pytest.raises(RuntimeError, match="before begin_chunk"):
        cache.set_bank_on_device(chosen_of(0, count))
