"""A `FrameCache` whose sink and history are int8."""

import copy
import io
import random
from pathlib import Path

import pytest
import torch
from frame_lists import (
    BLOCK,
    HEAD_DIM,
    HEADS,
    LAYERS,
    TOKENS,
    Naive,
    add_chunk,
    check_candidates,
    check_window,
    layout_of,
)
from int8_cases import numbers

from memflow_ops import Int8Memory, memory_attention, select_blocks
from memflow_ops.cache import BlockSelection, CacheLayout, ChosenBlocks, FrameCache, attend_to_memory
from memflow_ops.cache.store import HistoryFolder
from memflow_ops.rotary import apply_rotation, rope_rotation

SETTINGS = {
    "default": {},
    "batch-2": {"batch": 2, "window_frames": 9, "sink_frames": 4},
    "no-sink": {"sink_frames": 0},
    "host": {"device_frames": 4, "host_frames": 40},
    "host-full": {"device_frames": 4, "host_frames": 3, "batch": 2},
    "disk": {"device_frames": 4, "host_frames": 1, "disk_frames": 40},
    "moments": {"score": "moments"},
    "copies": {"copied_frames": 2, "batch": 2},
}


def int8_layout(**sizes) -> CacheLayout:
    return layout_of(**{"device_frames": 40, "bank_dtype": "int8", **sizes})


def made(layout: CacheLayout, folder: Path | None = None) -> FrameCache:
    """A cache in which a value that is read before it was written shows."""
    cache = FrameCache(layout, history=HistoryFolder(folder) if layout.disk_frames and folder else None)
    for tensor in (cache._keys, cache._values, cache._descriptors, cache._means, *cache._bank[2:]):
        tensor.fill_(torch.nan)
    return cache


def check_memory(cache: FrameCache, naive: Naive) -> None:
    """Through the slot table every frame of the bank is found, within half a step, and its exact descriptors."""
    layout, bank = cache.layout, cache.bank()
    blocks = layout.blocks_per_frame
    for layer in range(LAYERS):
        memory = cache.memory(layer)
        assert memory.keys.dtype == memory.values.dtype == torch.int8
        for story, frames in enumerate(bank):
            for j, frame in enumerate(frames):
                place = int(memory.slots[story, j])
                of_tokens = slice(place * TOKENS, (place + 1) * TOKENS)
                of_blocks = slice(place * blocks, (place + 1) * blocks)
                parts = [x[story, of_tokens] for x in (memory.keys, memory.values)]
                parts += [memory.k_scale[story, of_blocks], memory.v_scale[story, of_tokens]]
                stored = Int8Memory(*(x.unsqueeze(0) for x in parts))
                descriptors = memory.descriptors[None, story, of_blocks]
                k, v = numbers(stored, descriptors, BLOCK, TOKENS)
                known_k, known_v = (part[layer].double() for part in naive.first[story][frame][:2])
                token_block = torch.arange(TOKENS) // BLOCK
                assert ((k[0] - known_k).abs() <= 0.50001 * parts[2].double()[token_block] + 1e-7).all()
                assert ((v[0] - known_v).abs() <= 0.50001 * parts[3].double()[..., None] + 1e-7).all()
                want = torch.stack([known_k[i : i + BLOCK].mean(0) for i in range(0, TOKENS, BLOCK)])
                torch.testing.assert_close(descriptors[0, ..., :HEAD_DIM].double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", SETTINGS.values(), ids=SETTINGS)
def test_against_a_list_of_all_frames(sizes, tmp_path):
    torch.manual_seed(0)
    choice = random.Random(0)
    layout = int8_layout(**sizes)
    cache, naive = made(layout, tmp_path), Naive(layout)
    for chunk in range(30):
        coming = chunk * layout.chunk_frames
        check_candidates(cache, naive)
        cache.set_bank(
            [choice.sample(frames, min(len(frames), choice.randint(0, 3))) for frames in cache.candidate_frames()]
        )
        if choice.random() < 0.3:
            stories = [choice.random() < 0.6 for _ in range(layout.batch)]
            for first_frame in cache.restart_window(stories):
                cache.begin_chunk()
                again = naive.numbers()
                for layer in range(LAYERS):
                    cache.write(layer, again[0][layer], again[1][layer])
                naive.put(first_frame, again, stories)
                cache.commit()
        add_chunk(cache, naive)
        first = max(0, coming + layout.chunk_frames - layout.window_frames)
        check_window(cache, naive, list(range(first, coming + layout.chunk_frames)))
        check_memory(cache, naive)
        cache.commit()
    if layout.disk_frames:
        assert any(prototype.only_on_disk for prototype in cache._stories[0].history.values())
        other = FrameCache(layout, history=cache._stores[0].folder)
        other.load_state_dict(cache.state_dict())
        for one in (cache, other):
            one.set_bank([frames[:3] for frames in one.candidate_frames()])
            one.begin_chunk()
        check_memory(cache, naive)
        check_memory(other, naive)
    elif layout.host_frames:
        assert any(prototype.host for story in cache._stories for prototype in story.history.values())


def filled(layout: CacheLayout, chunks: int, seed: int = 0) -> FrameCache:
    """A cache after so many chunks of seeded numbers, whose coming chunk has retrieved three frames."""
    torch.manual_seed(seed)
    cache, naive = made(layout), Naive(layout)
    for _ in range(chunks):
        add_chunk(cache, naive)
        cache.commit()
    cache.set_bank([frames[:3] for frames in cache.candidate_frames()])
    return cache


@pytest.mark.parametrize("sizes", [{}, {"device_frames": 4, "host_frames": 9, "batch": 2}], ids=["device", "host"])
def test_a_saved_state_gives_the_same_bits_back(sizes):
    layouts = [int8_layout(**sizes, **more) for more in ({}, {"bank_dtype": None})]
    caches = [filled(layout, 12) for layout in layouts]
    states = [cache.state_dict() for cache in caches]
    other = made(layouts[0])
    other.load_state_dict(states[0])
    for cache in (caches[0], other):
        cache.set_bank([frames[:3] for frames in cache.candidate_frames()])
        cache.begin_chunk()
    for layer in range(LAYERS):
        ours, theirs = caches[0].memory(layer), other.memory(layer)
        for pool, loaded in zip(ours[:3] + ours[5:], theirs[:3] + theirs[5:], strict=True):
            size = pool.shape[1] // layouts[0].int8_frames
            for story in range(layouts[0].batch):
                for slot in ours.slots[story, : int(ours.frames[story])].tolist():
                    part = slice(slot * size, (slot + 1) * size)
                    assert torch.equal(pool[story, part], loaded[story, part])
        for view, loaded in zip(caches[0].window(layer), other.window(layer), strict=True):
            kept = view.shape[1] - layouts[0].chunk_tokens  # but for the open chunk
            order = [i for i, frame in enumerate(caches[0].window_frames()) if frame < 36]
            assert kept == len(order) * TOKENS
            for i in order:
                part = slice(i * TOKENS, (i + 1) * TOKENS)
                assert torch.equal(view[:, part], loaded[:, part])
    with pytest.raises(ValueError, match="bank_dtype=None, here 'int8'"):
        made(layouts[0]).load_state_dict(states[1])
    states[0]["window"][0] = states[0]["window"][0][:, :, 1:]
    with pytest.raises(ValueError, match="the state's window must have the shapes"):
        made(layouts[0]).load_state_dict(states[0])


def test_what_a_frame_takes():
    # Wan 2.1 1.3B in bf16.
    sizes = dict(device_frames=64, host_frames=80, dtype=torch.bfloat16)
    exact, int8 = (CacheLayout(30, 1, 1560, 12, 128, **sizes, bank_dtype=kind) for kind in (None, "int8"))
    assert exact.bank_frame_bytes == exact.frame_bytes == int8.frame_bytes
    integers, scales = 30 * 12 * 2 * 1560 * 128, 30 * 12 * 2 * (25 * 128 + 1560)
    assert int8.bank_frame_bytes == integers + scales + 30 * 12 * 25 * 128 * 2
    assert exact.frame_bytes / int8.bank_frame_bytes >= 1.9
    assert int8.device_bytes == 6 * int8.frame_bytes + 67 * int8.bank_frame_bytes + int8.means_bytes
    assert int8.host_bytes == 81 * int8.bank_frame_bytes

    layout = int8_layout(batch=2, device_frames=6, host_frames=5, score="moments", copied_frames=2)
    cache = filled(layout, 25)
    held = [cache._keys, cache._values, cache._descriptors, *cache._bank]
    assert layout.pool_bytes == sum(t.nbytes for t in held)
    frames = [f for story in cache._stories for f in (*story.free_host, *(p.host for p in story.history.values()))]
    assert max(sum(t.nbytes for t in frame) for frame in frames) * layout.batch == layout.bank_frame_bytes
    assert sum(t.nbytes for frame in frames for t in frame) <= layout.host_bytes


def test_a_saved_state_is_about_half_as_large():
    sizes = {}
    for kind in (None, "int8"):
        layout = CacheLayout(1, 1, 128, 2, 64, device_frames=40, host_frames=20, dtype=torch.bfloat16, bank_dtype=kind)
        cache = FrameCache(layout)
        for _ in range(50):
            cache.begin_chunk()
            k, v = torch.randn(2, 1, 3 * 128, 2, 64).bfloat16()
            cache.write(0, k, v)
            cache.remember(0, k)
            cache.commit()
        file = io.BytesIO()
        torch.save(cache.state_dict(), file)
        sizes[kind] = file.getbuffer().nbytes
    assert 0.5 < sizes["int8"] / sizes[None] < 0.62, sizes


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="bank_dtype must be int8, or None, got 'int4'"):
        int8_layout(bank_dtype="int4")
    cache = filled(int8_layout(), 8)
    cache.begin_chunk()
    with pytest.raises(RuntimeError, match="cannot be attended to in full where bank_dtype='int8'"):
        cache.dense(0)
    with pytest.raises(RuntimeError, match="cannot be attended to in full"):
        cache.attended(0, sparse=False)
    drawn = BlockSelection(4, None, torch.Generator())
    with pytest.raises(ValueError, match="random descriptors cannot stand in for those that an int8 bank is read with"):
        attend_to_memory(cache, rotation(0), drawn)
    q, k, v = torch.randn(3, 1, 3 * TOKENS, HEADS, HEAD_DIM).requires_grad_()
    with pytest.raises(NotImplementedError, match="int8 bank has no backward"):
        attend_to_memory(cache, rotation(0), BlockSelection(4, 5))(0, q, k, v)


def test_a_copy_goes_on_by_itself():
    cache = filled(int8_layout(), 8)
    other = copy.deepcopy(cache)
    before = [pool.clone() for pool in other._bank]
    add_chunk(cache, Naive(cache.layout))
    cache.commit()
    assert all(
        torch.equal(
            a,
            b,
        )
        for a, b in zip(before[:2], other._bank[:2], strict=True)
    )
    other.begin_chunk()
    memory = other.memory(0)
    other._bank[0].fill_(7)
    assert (memory.keys == 7).all() and (other._stories[0]._pools[0] == 7).all(), "views of one memory"


def rotation(first_frame: int):
    return rope_rotation(HEAD_DIM, torch.arange(first_frame, first_frame + 3), torch.arange(1), torch.arange(TOKENS))


@pytest.mark.parametrize("query_group", [4, None])
@pytest.mark.parametrize("copied", [0, 2], ids=["gathered", "copied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pass_attends_to_the_numbers_and_selects_as_from_an_exact_bank(query_group, copied, dtype):
    sizes = dict(batch=2, dtype=dtype, device_frames=12, copied_frames=copied)
    caches, outs, kept = [], [], []
    for kind in ("int8", None):
        layout = int8_layout(**sizes, bank_dtype=kind)
        torch.manual_seed(3)
        cache = made(layout)
        for chunk in range(9):
            if chunk == 8:
                cache.set_bank([frames[1:3] for frames in cache.candidate_frames()])
            first = cache.begin_chunk()
            chosen = ChosenBlocks(layout, 3, query_group)
            with torch.no_grad():
                # Without a bank before the last chunk, so that both caches hold the same keys.
                selection = BlockSelection(3, query_group) if chunk == 8 else None
                for layer in range(LAYERS):
                    q, k, v = (2 * torch.randn(2, 3 * TOKENS, HEADS, HEAD_DIM).to(dtype) for _ in range(3))
                    if chunk < 8:
                        cache.write(layer, apply_rotation(k, *rotation(first)), v)
                        cache.remember(layer, k)
                        continue
                    attend = attend_to_memory(cache, rotation(first), selection, chosen=chosen, remember=True)
                    again = attend_to_memory(
                        cache, rotation(first), selection, chosen=chosen, reuse=True, remember=True
                    )
                    outs.append((attend(layer, q, k, v), again(layer, q, k, v), apply_rotation(q, *rotation(first))))
            if chunk < 8:
                cache.commit()
        caches.append(cache)
        kept.append(chosen)
    assert torch.equal(kept[0].indices, kept[1].indices), "the same choice to the bit"
    assert bool(kept[0].copied_tokens) == bool(copied and query_group is None)
    for layer in range(LAYERS):
        out, again, q = outs[layer]
        exact = outs[LAYERS + layer][0]
        memory, (keys, values) = caches[0].memory(layer), caches[0].window(layer)
        wide = lambda x: x.double() if x.is_floating_point() else x  # noqa: E731
        want = memory_attention(
            *(x.double() for x in (q, keys, values)), memory.keys, memory.values, top_k=3, block_size=BLOCK,
            frame_tokens=TOKENS, query_group=query_group, memory_frames=memory.frames, memory_slots=memory.slots,
            memory_descriptors=wide(memory.descriptors), memory_k_scale=wide(memory.k_scale),
            memory_v_scale=wide(memory.v_scale), impl="reference",
        )  # fmt: skip
        limit = 1e-5 if dtype == torch.float32 else 0.05
        assert (out.double() - want).abs().max() <= limit and (again.double() - want).abs().max() <= limit
        error = float((out - exact).double().norm() / exact.double().norm())
        assert 0 < error < 0.01, "off by less than a percent, and not exact by chance"
        assert torch.equal(memory.descriptors[:, 0], caches[1].memory(layer).descriptors[:, 0])
        chosen = select_blocks(
            q, memory.descriptors, 3, query_group=query_group, memory_frames=memory.frames, memory_slots=memory.slots,
            block_size=BLOCK, frame_tokens=TOKENS,
        )  # fmt: skip
        assert torch.equal(chosen, kept[0].indices[layer])
