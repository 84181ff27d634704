"""Every frame that was ever written to a `FrameCache`, in plain Python lists, and checks of the cache against them."""

import torch
from torch import Tensor

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout

LAYERS, TOKENS, HEADS, HEAD_DIM, BLOCK = 2, 5, 2, 4, 2  # 5 tokens in blocks of 2: the last block of a frame is ragged


def layout_of(**sizes) -> CacheLayout:
    return CacheLayout(LAYERS, sizes.pop("batch", 1), TOKENS, HEADS, HEAD_DIM, **{"block_size": BLOCK, **sizes})


class Naive:
    """Keeps every frame as a tensor of its own and copies whatever is asked for.

    A frame is (keys, values, un-rotated keys), each (LAYERS, TOKENS, HEADS, HEAD_DIM), all of them random numbers, so
    that a frame is recognised by its content alone.
    """

    def __init__(self, layout: CacheLayout):
        self.layout = layout
        self.now = [{} for _ in range(layout.batch)]  # what the window holds, with re-cached frames replaced
        self.first = [{} for _ in range(layout.batch)]  # what sink and history keep: frames of their own clean pass

    def numbers(self) -> list[Tensor]:
        """Fresh random keys, values and un-rotated keys of a chunk: (LAYERS, B, chunk tokens, HEADS, HEAD_DIM)."""
        shape = (LAYERS, self.layout.batch, self.layout.chunk_tokens, HEADS, HEAD_DIM)
        return [torch.randn(shape) for _ in range(3)]

    def put(self, first_frame: int, numbers: list[Tensor], stories: list[bool] | None = None) -> None:
        for story in range(self.layout.batch):
            for i in range(self.layout.chunk_frames):
                frame = [t[:, story, i * TOKENS : (i + 1) * TOKENS] for t in numbers]
                if stories is None or stories[story]:
                    self.now[story][first_frame + i] = frame
                self.first[story].setdefault(first_frame + i, frame)


def write(cache: FrameCache, numbers: list[Tensor], remember: bool) -> None:
    for layer in range(LAYERS):
        cache.write(layer, numbers[0][layer], numbers[1][layer])
        if remember:
            cache.remember(layer, numbers[2][layer])


def add_chunk(cache: FrameCache, naive: Naive) -> int:
    """Adds a chunk of two passes, of which the first leaves nothing behind; returns its first frame."""
    first_frame = cache.begin_chunk()
    write(cache, naive.numbers(), remember=False)
    numbers = naive.numbers()
    write(cache, numbers, remember=True)
    naive.put(first_frame, numbers)
    return first_frame


def expected_window(layout: CacheLayout, first_frame: int) -> list[int]:
    end = first_frame + layout.chunk_frames
    return list(range(max(0, end - layout.window_frames), end))


def check_window(cache: FrameCache, naive: Naive, expected: list[int]) -> None:
    frames = cache.window_frames()
    assert sorted(frames) == expected
    for layer in range(LAYERS):
        for view, part in zip(cache.window(layer), (0, 1), strict=True):
            for story, known in enumerate(naive.now):
                want = torch.cat([known[frame][part][layer] for frame in frames])
                torch.testing.assert_close(view[story], want, rtol=0, atol=0)


def check_memory(cache: FrameCache, naive: Naive, first_in_window: int) -> None:
    """Through the slot table, `memory_attention` finds every frame of the bank as its clean pass wrote it."""
    layout, bank = cache.layout, cache.bank()
    for layer in range(LAYERS):
        memory = cache.memory(layer)
        assert memory.frames.tolist() == [len(frames) for frames in bank]
        for story, frames in enumerate(bank):
            assert len(set(frames)) == len(frames) and all(frame < first_in_window for frame in frames)
            for j, frame in enumerate(frames):
                place = int(memory.slots[story, j])
                tokens = slice(place * TOKENS, (place + 1) * TOKENS)
                known = naive.first[story][frame]
                assert torch.equal(memory.keys[story, tokens], known[0][layer])
                assert torch.equal(memory.values[story, tokens], known[1][layer])
                blocks = layout.blocks_per_frame
                got = memory.descriptors[story, place * blocks : (place + 1) * blocks]
                keys = [known[0][layer][start : start + BLOCK] for start in range(0, TOKENS, BLOCK)]
                want = torch.stack([of_block.mean(0) for of_block in keys])
                if layout.score == "moments":
                    variances = torch.stack([of_block.var(0, correction=0) for of_block in keys])
                    want = torch.cat([want, variances], -1)
                torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def check_candidates(cache: FrameCache, naive: Naive) -> None:
    """Every remembered frame has the means of its un-rotated keys, each over as many tokens as `lengths` says."""
    candidates = cache.candidates()
    start = 0
    for n, length in enumerate(candidates.lengths):
        for story, frames in enumerate(candidates.frames):
            for row, frame in enumerate(frames):
                want = naive.first[story][frame][2][:, start : start + length].mean(1)
                torch.testing.assert_close(candidates.means[:, story, row, n], want, rtol=0, atol=1e-6)
        start += length
    assert start == TOKENS


def run_chunks(cache: FrameCache, naive: Naive, chunks: int, banks=()) -> None:
    for chunk in range(chunks):
        if chunk < len(banks):
            cache.set_bank([banks[chunk]] * cache.layout.batch)
        add_chunk(cache, naive)
        cache.commit()


def on_device(cache: FrameCache) -> list[list[int]]:
    return [[p.frame for p in story.history.values() if p.slot is not None] for story in cache._stories]
