"""`attend_to_memory` writes a pass to the cache and attends as the operator does when it is called by hand."""

import pytest
import torch
from torch import Tensor

from memflow_ops import QKNorm, memory_attention
from memflow_ops.cache import (
    AttendProjections,
    BlockSelection,
    CacheLayout,
    FrameCache,
    ReleasedCache,
    ReleasedLayout,
    RingCache,
    attend_to_memory,
)
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig
from memflow_ops.rotary import apply_rotation, rope_rotation

SIZES = {"layers": 2, "batch": 2, "frame_tokens": 6, "kv_heads": 2, "head_dim": 8}
GRID = (2, 3)
TEXT_KEYS = [torch.ones(2, 1, 2, 8)] * 2
ALL_BLOCKS = BlockSelection(1000, query_group=5)


def frame_cache() -> FrameCache:
    return FrameCache(
        CacheLayout(**SIZES, window_frames=6, sink_frames=2, bank_frames=3, device_frames=6, block_size=4)
    )


def released_cache() -> ReleasedCache:
    return ReleasedCache(ReleasedLayout(**SIZES, window_frames=6, sink_frames=2, bank_frames=3, record_interval=1))


caches = pytest.mark.parametrize("make", [frame_cache, released_cache])


def rotation_of(first_frame: int) -> tuple[Tensor, Tensor]:
    return rope_rotation(8, torch.arange(first_frame, first_frame + 3), *map(torch.arange, GRID))


def numbers() -> Tensor:
    """Queries, keys and values of a chunk, large enough that the output depends on which keys are attended to."""
    return 2 * torch.randn(3, 2, 18, 2, 8)


def open_chunk(cache: RingCache, chunks: int = 5) -> tuple[Tensor, Tensor]:
    """Streams chunks, retrieves all candidates, and opens the next one; returns its rotation."""
    for chunk in range(chunks + 1):
        cache.update_bank(TEXT_KEYS)
        if isinstance(cache, FrameCache):
            cache.set_bank([frames[:3] for frames in cache.candidate_frames()])
        rotation = rotation_of(cache.begin_chunk())
        if chunk < chunks:
            attend = attend_to_memory(cache, rotation, ALL_BLOCKS, remember=True)
            for layer in range(2):
                attend(layer, *numbers())
            cache.commit()
    return rotation


@caches
def test_all_blocks_of_the_bank_and_the_window_are_all_that_is_kept(make):
    cache, qkv = make(), numbers()
    rotation = open_chunk(cache)
    for layer in range(2):
        everything = attend_to_memory(cache, rotation, None)(layer, *qkv)
        selected = attend_to_memory(cache, rotation, ALL_BLOCKS)(layer, *qkv)
        window = memory_attention(apply_rotation(qkv[0], *rotation), *cache.window(layer))
        assert (everything - selected).abs().max() <= 1e-5
        assert (everything - window).abs().max() > 1e-2


@caches
@pytest.mark.parametrize("query_group", [5, None])
def test_a_selection_is_that_of_the_operator_over_the_banks_frames(make, query_group):
    cache, qkv = make(), numbers()
    rotation = open_chunk(cache)
    out = attend_to_memory(cache, rotation, BlockSelection(2, query_group))(1, *qkv)
    memory = cache.memory(1)
    count = int(memory.frames[0])
    assert memory.frames.tolist() == [count, count]
    keys, values = (
        torch.stack([x[story].unflatten(0, (-1, 6))[memory.slots[story, :count].long()] for story in range(2)])
        for x in (memory.keys, memory.values)
    )
    expected = memory_attention(
        apply_rotation(qkv[0], *rotation), *cache.window(1), keys.flatten(1, 2), values.flatten(1, 2),
        top_k=2, block_size=cache.layout.block_size, frame_tokens=6, query_group=query_group, impl="reference",
    )  # fmt: skip
    assert (out - expected).abs().max() <= 1e-5


def test_before_anything_has_left_the_window_it_is_all_there_is():
    cache, qkv, seen = frame_cache(), numbers(), []
    rotation = open_chunk(cache, chunks=1)
    attend = attend_to_memory(cache, rotation, BlockSelection(1), observe=lambda *given: seen.append(given))
    assert torch.equal(attend(0, *qkv), memory_attention(apply_rotation(qkv[0], *rotation), *cache.window(0)))
    assert not seen, "there is nothing to choose from"


@caches
def test_keys_and_values_are_written_and_an_observer_sees_the_rotated_queries(make):
    cache, qkv, seen = make(), numbers(), []
    rotation = open_chunk(cache)
    attend = attend_to_memory(cache, rotation, ALL_BLOCKS, observe=lambda *given: seen.append(given))
    first, last = attend(0, *qkv), attend(1, *qkv)
    places = [cache.window_frames().index(frame) for frame in (15, 16, 17)]
    for layer in range(2):
        keys, values = (x.unflatten(1, (-1, 6))[:, places].flatten(1, 2) for x in cache.window(layer))
        assert torch.equal(keys, apply_rotation(qkv[1], *rotation)) and torch.equal(values, qkv[2])
    assert [layer for layer, _, _ in seen] == [0, 1]
    assert torch.equal(seen[0][1], apply_rotation(qkv[0], *rotation))
    assert seen[0][2].slots.data_ptr() == cache.memory(0).slots.data_ptr()
    only_keys = attend_to_memory(cache, rotation, ALL_BLOCKS, keys_only=True)
    assert torch.equal(only_keys(0, *qkv), first) and not torch.equal(only_keys(1, *qkv), last)
    assert torch.equal(only_keys(1, *qkv), apply_rotation(qkv[0], *rotation))


def test_random_blocks_are_those_of_the_seed_and_not_the_best():
    cache, qkv = frame_cache(), numbers()
    rotation = open_chunk(cache)

    def attended(seed: int | None) -> Tensor:
        chance = None if seed is None else torch.Generator().manual_seed(seed)
        return attend_to_memory(cache, rotation, BlockSelection(1, None, chance))(0, *qkv)

    assert torch.equal(attended(3), attended(3))
    assert not torch.equal(attended(3), attended(4)) and not torch.equal(attended(3), attended(None))


def test_only_a_clean_pass_takes_the_means_for_retrieval():
    cache = frame_cache()
    rotation = open_chunk(cache, chunks=1)
    for clean in (False, True):
        q, k, v = numbers()
        attend = attend_to_memory(cache, rotation, None, remember=clean)
        for layer in range(2):
            attend(layer, q, k, v)
        if not clean:
            with pytest.raises(RuntimeError, match=r"last pass over layers \[0, 1\] was not the clean one"):
                cache.commit()
    cache.commit()
    open_chunk(cache, chunks=1)
    candidates = cache.candidates()
    assert candidates.frames == [[3]] * 2
    assert torch.allclose(candidates.means[:, :, 0, 0], k[:, :6].mean(1), atol=1e-6)


def test_a_frame_cache_is_written_from_projections_and_a_released_one_is_not():
    norm = QKNorm(torch.ones(16), torch.ones(16), 1e-6)
    cache = frame_cache()
    attend = attend_to_memory(cache, open_chunk(cache), ALL_BLOCKS)
    assert isinstance(attend, AttendProjections)
    assert attend.projections(0, *numbers(), norm).shape == (2, 18, 2, 8)
    cache = released_cache()
    rotation = open_chunk(cache)
    assert not isinstance(attend_to_memory(cache, rotation, ALL_BLOCKS), AttendProjections)
    with pytest.raises(NotImplementedError, match="queries and keys that are normalised"):
        cache.write_projections(0, *numbers(), rotation, norm)


def test_the_model_hands_over_projections_unless_a_gradient_is_needed(monkeypatch):
    """The numbers are the same either way, and with gradients those of the queries reach the model."""
    torch.manual_seed(2)
    config = ModelConfig(
        dim=16, ffn_dim=32, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_dim=8, text_len=5, freq_dim=8
    )
    model, layout = CausalVideoModel(config), CacheLayout(1, 1, 10, 2, 8, block_size=4)
    text = model.encode_text(torch.randn(1, 5, 8))
    x, t = torch.randn(1, 4, 3, 4, 10), torch.zeros(1, 3)
    norms = []
    original = FrameCache.write_projections
    monkeypatch.setattr(
        FrameCache, "write_projections", lambda *a, **b: norms.append(a[6] is not None) or original(*a, **b)
    )

    rotation = rope_rotation(8, torch.arange(3), torch.arange(2), torch.arange(5))

    def run() -> torch.Tensor:
        cache = FrameCache(layout)
        cache.begin_chunk()
        attend = attend_to_memory(cache, rotation, BlockSelection(2, query_group=5), remember=True)
        return model(x, t, text, attend)

    with torch.no_grad():
        expected = run()
    assert norms == [True]
    out = run()
    assert norms == [True, False], "where gradients are needed, the model normalises"
    assert torch.equal(out, expected)
    out.sum().backward()
    assert model.blocks[0].self_attn.q.weight.grad.abs().max() > 0
    assert model.blocks[0].self_attn.norm_q.weight.grad.abs().max() > 0
