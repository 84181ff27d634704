"""A choice of blocks that later passes over the chunk reuse, and its copies beside the window."""

import pytest
import torch
from torch import Tensor

from memflow_ops import attend_selected, memory_attention, select_blocks
from memflow_ops.cache import BlockSelection, CacheLayout, ChosenBlocks, FrameCache, attend_to_memory
from memflow_ops.cache.chosen import frames_for_copies
from memflow_ops.rotary import apply_rotation, rope_rotation

TOKENS, HEADS, SIZE = 6, 2, 8
TOP_K = 3
groups = pytest.mark.parametrize("query_group", [5, None])
copies = pytest.mark.parametrize("copied", [False, True], ids=["gathered", "copied"])


def rotation_of(first_frame: int) -> tuple[Tensor, Tensor]:
    return rope_rotation(SIZE, torch.arange(first_frame, first_frame + 3), torch.arange(2), torch.arange(3))


def numbers(seed: int) -> Tensor:
    """Queries, keys and values of a chunk, large enough that the output depends on which keys are attended to."""
    return 2 * torch.randn(3, 2, 18, HEADS, SIZE, generator=torch.Generator().manual_seed(seed))


def opened(
    copied: bool, dtype: torch.dtype = torch.float32, score: str = "mean"
) -> tuple[FrameCache, tuple[Tensor, Tensor]]:
    """A cache in whose open chunk the stories have banks of different size, and the chunk's rotation.

    Blocks of 4 tokens: the second of a frame has 2, so that the heads' choices differ in length.
    """
    layout = CacheLayout(
        2, 2, TOKENS, HEADS, SIZE, window_frames=6, sink_frames=2, bank_frames=3, device_frames=6, block_size=4,
        dtype=dtype, copied_frames=2 if copied else 0, score=score,
    )  # fmt: skip
    cache = FrameCache(layout)
    for tensor in (cache._keys, cache._values, cache._descriptors):
        tensor.fill_(torch.nan)  # whatever is read before it was written shows
    for chunk in range(6):
        if chunk == 5:
            first, second = cache.candidate_frames()
            cache.set_bank([first[:1], second[:3]])
        rotation = rotation_of(cache.begin_chunk())
        if chunk < 5:
            attend = attend_to_memory(cache, rotation, None, remember=True)
            for layer in range(2):
                attend(layer, *numbers(10 * chunk + layer).to(dtype))
            cache.commit()
    return cache, rotation


def chosen_for(cache: FrameCache, selection: BlockSelection) -> ChosenBlocks:
    return ChosenBlocks(cache.layout, selection.top_k, selection.query_group)


def exact(cache: FrameCache, q: Tensor, indices: Tensor, query_group: int | None) -> Tensor:
    """Attention to the window and these blocks by the reference in float64."""
    memory, (keys, values) = cache.memory(1), cache.window(1)
    state = memory_attention(q.double(), keys.double(), values.double(), return_lse=True, impl="reference")
    return attend_selected(
        q.double(), memory.keys.double(), memory.values.double(), indices, block_size=4, frame_tokens=TOKENS,
        query_group=query_group, memory_slots=memory.slots, resume=state, impl="reference",
    )[0]  # fmt: skip


@groups
@copies
def test_later_passes_attend_to_what_the_first_has_chosen(copied, query_group):
    cache, rotation = opened(copied)
    selection = BlockSelection(TOP_K, query_group)
    chosen = chosen_for(cache, selection)
    assert chosen.copied_tokens == (12 if copied and query_group is None else 0)
    first, later = numbers(100), numbers(101)
    own = attend_to_memory(cache, rotation, selection)(1, *later)
    out = attend_to_memory(cache, rotation, selection, chosen=chosen)(1, *first)
    q, memory = apply_rotation(first[0], *rotation), cache.memory(1)
    indices = select_blocks(
        q, memory.descriptors, TOP_K, query_group=query_group, memory_frames=memory.frames,
        memory_slots=memory.slots, blocks_per_frame=2,
    )  # fmt: skip
    assert torch.equal(chosen.indices[1], indices)
    assert (out - exact(cache, q, indices, query_group)).abs().max() <= 1e-5
    again = attend_to_memory(cache, rotation, selection, chosen=chosen, reuse=True)(1, *later)
    want = exact(cache, apply_rotation(later[0], *rotation), indices, query_group)
    assert (again - want).abs().max() <= 1e-5
    assert (again - own).abs().max() > 1e-2, "the later queries would have chosen others"
    assert torch.equal(chosen.indices[1], indices)


@copies
def test_what_is_kept_is_chosen_by_the_score_of_the_cache(copied):
    cache, rotation = opened(copied, score="moments")
    selection = BlockSelection(TOP_K, None)
    chosen = chosen_for(cache, selection)
    out = attend_to_memory(cache, rotation, selection, chosen=chosen)(1, *numbers(100))
    assert (out - attend_to_memory(cache, rotation, selection)(1, *numbers(100))).abs().max() <= 1e-5
    q, memory = apply_rotation(numbers(100)[0], *rotation), cache.memory(1)
    indices = select_blocks(
        q, memory.descriptors, TOP_K, query_group=None, memory_frames=memory.frames, memory_slots=memory.slots,
        score="moments", block_size=4, frame_tokens=TOKENS,
    )  # fmt: skip
    assert torch.equal(chosen.indices[1], indices)


@groups
@copies
def test_every_pass_may_choose_and_a_layer_that_has_not_is_refused(copied, query_group):
    cache, rotation = opened(copied)
    selection = BlockSelection(TOP_K, query_group)
    chosen = chosen_for(cache, selection)
    for seed in (100, 101):  # what is kept is overwritten
        out = attend_to_memory(cache, rotation, selection, chosen=chosen)(1, *numbers(seed))
        own = attend_to_memory(cache, rotation, selection)(1, *numbers(seed))
        assert (out - own).abs().max() <= 1e-5
    reusing = attend_to_memory(cache, rotation, selection, chosen=chosen, reuse=True)
    with pytest.raises(RuntimeError, match="layer 0 has chosen no blocks for the open chunk"):
        reusing(0, *numbers(102))
    cache.abort()
    cache.begin_chunk()
    with pytest.raises(RuntimeError, match="layer 1 has chosen no blocks"):
        reusing(1, *numbers(102))
    with pytest.raises(ValueError, match="reuse=True needs the choices of an earlier pass"):
        attend_to_memory(cache, rotation, selection, reuse=True)
    for other in (BlockSelection(TOP_K - 1, query_group), BlockSelection(TOP_K, 7)):
        with pytest.raises(ValueError, match="chosen was made for another layout, top_k or query_group"):
            attend_to_memory(cache, rotation, other, chosen=chosen)


@groups
@copies
def test_gradients_find_the_choice_as_it_was(copied, query_group):
    cache, rotation = opened(copied)
    selection = BlockSelection(TOP_K, query_group)
    chosen = chosen_for(cache, selection)
    with torch.no_grad():
        attend_to_memory(cache, rotation, selection, chosen=chosen)(1, *numbers(100))
        want = attend_to_memory(cache, rotation, selection, chosen=chosen, reuse=True)(1, *numbers(101))
    q, k, v = (x.clone().requires_grad_() for x in numbers(101))
    out = attend_to_memory(cache, rotation, selection, chosen=chosen, reuse=True)(1, q, k, v)
    assert (out - want).abs().max() <= 1e-5
    attend_to_memory(cache, rotation, selection, chosen=chosen)(1, *numbers(102))  # chooses others before the backward
    out.square().sum().backward()
    state = memory_attention(apply_rotation(q, *rotation), *cache.window(1))
    assert state.shape == out.shape and all(x.grad.abs().max() > 0 for x in (q, k, v))
    # A pass that needs gradients leaves copies to one that does not.
    attend_to_memory(cache, rotation, selection, chosen=chosen)(1, *numbers(103).requires_grad_())
    with torch.no_grad():
        reused = attend_to_memory(cache, rotation, selection, chosen=chosen, reuse=True)(1, *numbers(104))
    rotated = apply_rotation(numbers(104)[0], *rotation)
    assert (reused - exact(cache, rotated, chosen.indices[1], query_group)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@copies
def test_in_every_dtype(copied, dtype):
    cache, rotation = opened(copied, dtype)
    selection = BlockSelection(TOP_K, None)
    chosen = chosen_for(cache, selection)
    with torch.no_grad():
        for reuse in (False, True):
            q, k, v = numbers(100 + reuse).to(dtype)
            out = attend_to_memory(cache, rotation, selection, chosen=chosen, reuse=reuse)(1, q, k, v)
            want = exact(cache, apply_rotation(q, *rotation), chosen.indices[1], None)
            assert out.dtype == dtype
            assert (out - want).abs().max() <= {torch.float64: 1e-6}.get(dtype, 3e-2)


def test_the_copies_lie_right_before_the_window_and_hide_what_is_short():
    cache, rotation = opened(True)
    selection = BlockSelection(TOP_K, None)
    chosen = chosen_for(cache, selection)
    with torch.no_grad():
        attend_to_memory(cache, rotation, selection, chosen=chosen)(1, *numbers(100))
    keys, values = cache.window_with_copies(1, 12)
    window, memory = cache.window(1), cache.memory(1)
    assert torch.equal(keys[:, 12:], window[0]) and torch.equal(values[:, 12:], window[1])
    assert keys.data_ptr() + 12 * SIZE * 4 == window[0].data_ptr(), "views of one run of keys"
    for story in range(2):
        for head in range(HEADS):
            for entry, block in enumerate(chosen.indices[1, story, head, 0].tolist()):
                place = int(memory.slots[story, block // 2])
                length = (4, 2)[block % 2]
                start = place * TOKENS + 4 * (block % 2)
                part = slice(4 * entry, 4 * entry + length)
                assert torch.equal(keys[story, part, head], memory.keys[story, start : start + length, head])
                assert torch.equal(values[story, part, head], memory.values[story, start : start + length, head])
                expected = [False] * length + [True] * (4 - length)
                assert chosen.hidden[1, story, head, 4 * entry : 4 * entry + 4].tolist() == expected
    assert chosen.hidden[1].any() and not chosen.hidden[1].all()


def test_places_for_copies_are_as_many_as_one_selection_needs():
    layout = CacheLayout(1, 1, 390, 3, 128, sink_frames=3, bank_frames=3, device_frames=8)
    assert frames_for_copies(layout, 6, None) == 1  # 384 tokens
    assert frames_for_copies(layout, 7, 3 * 390) == 2
    assert frames_for_copies(layout, 10_000, None) == 7  # all 42 blocks, ragged ones as if they were full
    assert frames_for_copies(layout, 6, 128) == 0
    few = ChosenBlocks(layout, 6, None)
    assert few.copied_tokens == 0 and few.indices.shape == (1, 1, 3, 1, 6)
    shared = CacheLayout(1, 1, 390, 1, 128, bank_frames=3, device_frames=8, copied_frames=1)
    assert ChosenBlocks(shared, 6, None, heads=3).copied_tokens == 0, "query heads share keys"


def test_a_state_fits_a_cache_with_places_for_copies_and_one_without():
    (plain, rotation), (with_copies, _) = opened(False), opened(True)
    for cache in (plain, with_copies):
        cache.abort()
    again, _ = opened(True)
    again.abort()
    for source, target in ((plain, with_copies), (with_copies, plain), (with_copies, again)):
        for tensor in (target._keys, target._values):
            tensor.fill_(torch.nan)
        target.load_state_dict(source.state_dict())
        outs = []
        for cache in (source, target):
            cache.set_bank([frames[:3] for frames in cache.candidate_frames()])
            cache.begin_chunk()
            with torch.no_grad():
                outs.append(attend_to_memory(cache, rotation, BlockSelection(TOP_K, None))(1, *numbers(100)))
                outs.append(attend_to_memory(cache, rotation, None)(0, *numbers(7)))
            cache.abort()
        assert torch.equal(outs[0], outs[2]) and (outs[1] - outs[3]).abs().max() <= 1e-5
