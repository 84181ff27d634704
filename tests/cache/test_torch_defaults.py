"""A cache does not depend on torch's defaults for the dtype and the device of new tensors."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
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
from memflow_ops.cache.policies import Coverage, Policy, Random, Relevance
from memflow_ops.rotary import rope_rotation

SIZES = {"layers": 2, "batch": 2, "frame_tokens": 6, "kv_heads": 2, "head_dim": 8, "window_frames": 6}
CHUNKS = 7


def frame_cache() -> FrameCache:
    """Its device has room for few frames, so that some move to host memory and back."""
    return FrameCache(CacheLayout(**SIZES, sink_frames=2, bank_frames=2, device_frames=4, host_frames=3, block_size=4))


def released_cache() -> ReleasedCache:
    return ReleasedCache(ReleasedLayout(**SIZES, sink_frames=2, bank_frames=2, record_interval=1))


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def stream(make, policies: list[Policy], dtype: torch.dtype, device: str | None) -> list[torch.Tensor]:
    """All that attention gives while chunks are streamed, and what is left in the cache.

    The inputs are made under torch's own defaults; some blocks are chosen at random.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(CHUNKS, 2, 3, 2, 18, 2, 8, generator=generator)
    positions = [[torch.arange(3 * chunk, 3 * chunk + 3), torch.arange(2), torch.arange(3)] for chunk in range(CHUNKS)]
    text_keys, lengths = list(torch.randn(2, 2, 4, 2, 8, generator=generator)), torch.tensor([4, 2]).int()
    with defaults(dtype, device):
        cache: RingCache = make()
        results = []
        for chunk in range(CHUNKS):
            cache.update_bank(text_keys)
            cache.choose_bank(policies[chunk % len(policies)], text_keys, lengths)
            cache.begin_chunk()
            random = generator if chunk % 2 else None
            for selection in (BlockSelection(2, query_group=5, random=random), None):
                rotation = rope_rotation(8, *positions[chunk])
                attends = selection is not None or isinstance(cache, ReleasedCache)
                attend = attend_to_memory(cache, rotation, selection, remember=attends)
                if attends:
                    results += [attend(layer, *inputs[chunk, layer]) for layer in range(2)]
            cache.commit()
        other = make()
        other.load_state_dict(cache.state_dict())
        results += [x for x in tree_leaves(other.state_dict()) if isinstance(x, torch.Tensor)]
    return results


@pytest.mark.parametrize("wanted", [(torch.float64, "meta"), (torch.bfloat16, None)], ids=str)
@pytest.mark.parametrize("make", [frame_cache, released_cache])
def test_a_stream_is_the_same_under_any_defaults(make, wanted):
    policies = [Relevance(2), Coverage(2), Random(2, [1, 2])]
    expected, got = stream(make, policies, torch.float32, None), stream(make, policies, *wanted)
    assert len(got) == len(expected) > CHUNKS
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.device == theirs.device
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
