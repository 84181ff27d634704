"""A cache that is written from projections holds the same as one that is written part by part."""

import pytest
import torch

from memflow_ops import QKNorm
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.model.wan.transformer import RMSNorm
from memflow_ops.rotary import apply_rotation, rope_rotation

LAYERS, GRID, HEADS, HEAD_DIM = 2, (2, 5), 2, 8
LAYOUT = CacheLayout(
    LAYERS, 2, 10, HEADS, HEAD_DIM, sink_frames=4, bank_frames=2, device_frames=3, host_frames=2, block_size=4,
    relevance_block_size=6,
)  # fmt: skip


def rotation_of(first_frame: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rope_rotation(HEAD_DIM, torch.arange(first_frame, first_frame + 3), *map(torch.arange, GRID))


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = RMSNorm(len(weight), 1e-6)
    norm.weight.data = weight
    return norm(x.flatten(2)).detach().view(x.shape)


def write_by_parts(cache, layer, q, k, v, rotation, norm, remember):
    q, k = normed(q, norm.weight_q), normed(k, norm.weight_k)
    cache.write(layer, apply_rotation(k, *rotation), v)
    if remember:
        cache.remember(layer, k)
    return apply_rotation(q, *rotation)


def write_at_once(cache, layer, q, k, v, rotation, norm, remember):
    return cache.write_projections(layer, q, k, v, rotation, norm, remember=remember)


def told(write, chunks: int = 8) -> tuple[FrameCache, list[torch.Tensor]]:
    """Streams chunks of two passes each, with a prompt switch of the second story; returns all rotated queries too."""
    torch.manual_seed(0)
    cache, queries = FrameCache(LAYOUT), []
    norm = QKNorm(torch.randn(HEADS * HEAD_DIM), torch.randn(HEADS * HEAD_DIM), 1e-6)

    def one_pass(first_frame: int, clean: bool) -> None:
        for layer in range(LAYERS):
            q, k, v = torch.randn(3, 2, 30, HEADS, HEAD_DIM)
            queries.append(write(cache, layer, q, k, v, rotation_of(first_frame), norm, clean))

    for chunk in range(chunks):
        candidates = cache.candidate_frames()
        cache.set_bank([frames[: chunk % 3] for frames in candidates])
        if chunk == 5:
            for _ in cache.restart_window([False, True]):
                one_pass(cache.begin_chunk(), clean=False)
                cache.commit()
        first_frame = cache.begin_chunk()
        one_pass(first_frame, clean=False)
        one_pass(first_frame, clean=True)
        cache.commit()
    return cache, queries


def test_the_same_cache_to_the_bit():
    (parts, parts_q), (once, once_q) = told(write_by_parts), told(write_at_once)
    assert all(torch.equal(a, b) for a, b in zip(parts_q, once_q, strict=True))
    a, b = parts.state_dict(), once.state_dict()
    ring = [a["places"].index(place) for place in range(4, 10)]
    for name, x, y in zip(("keys", "values", "descriptors"), a["pools"], b["pools"], strict=True):
        if name == "descriptors":  # those of the ring are not used
            x[:, :, ring] = y[:, :, ring] = 0.0
        assert torch.equal(x, y), name
    assert torch.equal(a["means"][0], b["means"][0])
    assert a["history"] == b["history"]


def test_descriptors_are_not_taken_from_an_earlier_pass():
    """The descriptors of a clean pass are stale once a pass by parts has written other keys over its own."""
    torch.manual_seed(1)
    cache, norm = FrameCache(LAYOUT), QKNorm(torch.ones(16), torch.ones(16), 1e-6)
    cache.begin_chunk()
    for write in (write_at_once, write_by_parts):
        for layer in range(LAYERS):
            write(cache, layer, *torch.randn(3, 2, 30, HEADS, HEAD_DIM), rotation_of(0), norm, True)
    cache.commit()
    keys = cache._keys[:, :, 3 * 10 : 4 * 10]  # sink frame 0 lies in place 3
    expected = torch.stack([keys[:, :, :4].mean(2), keys[:, :, 4:8].mean(2), keys[:, :, 8:].mean(2)], 2)
    torch.testing.assert_close(cache._descriptors[:, :, 9:12], expected)


def test_out_of_order_is_refused():
    cache = FrameCache(LAYOUT)
    q, k, v = torch.randn(3, 2, 30, HEADS, HEAD_DIM)
    with pytest.raises(RuntimeError, match="write_projections: no chunk is open"):
        cache.write_projections(0, q, k, v, rotation_of(0))
    cache.begin_chunk()
    for layer in range(LAYERS):
        cache.write_projections(layer, q, k, v, rotation_of(0), remember=True)
    cache.commit()
    cache.restart_window()
    cache.begin_chunk()
    with pytest.raises(RuntimeError, match="keeps the prototype of its first prompt"):
        cache.write_projections(0, q, k, v, rotation_of(0), remember=True)
