"""A `ReleasedCache` holds what plain lists of frames hold."""

import io
import random

import pytest
import torch
from torch import Tensor

from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.released_layout import ReleasedLayout

LAYERS, TOKENS, HEADS, HEAD_DIM = 2, 5, 2, 4


def layout_of(**sizes) -> ReleasedLayout:
    sizes = {"schedule": "single-prompt", **sizes}
    return ReleasedLayout(LAYERS, sizes.pop("batch", 2), TOKENS, HEADS, HEAD_DIM, **sizes)


class Naive:
    """Keeps the keys and values (LAYERS, TOKENS, HEADS, HEAD_DIM) of every frame, and a bank per layer and story.

    Re-cached frames replace what the window holds of them, and nothing else.
    """

    def __init__(self, layout: ReleasedLayout):
        self.layout, self.chunk = layout, 0
        self.now = [{} for _ in range(layout.batch)]
        self.sink = [{} for _ in range(layout.batch)]
        self.banks = [[[] for _ in range(LAYERS)] for _ in range(layout.batch)]  # of (frame, (k, v) of that layer)
        self.staged = [None] * layout.batch  # per story the frame that is to enter the bank: (frame, (k, v))
        self.kept = None

    def update_bank(self, text: list[Tensor], recached: list[bool]) -> None:
        """The released program for several prompts empties its text keys at a switch, and scores of 0 keep the earlier
        places."""
        layout, frame = self.layout, (self.chunk - 1) * self.layout.chunk_frames
        self.kept = None
        if not self.chunk or not layout.bank_frames:
            return
        interactive = layout.schedule == "interactive"
        n = (self.chunk - 1) // layout.record_interval + 1
        for story, banks in enumerate(self.banks):
            if not interactive or (self.chunk - 1) % layout.record_interval == 0:
                source = self.sink[story] if frame < layout.sink_frames else self.now[story]
                self.staged[story] = frame, source[frame]
            for layer, bank in enumerate(banks):
                staged = self.staged[story][0], tuple(t[layer] for t in self.staged[story][1])
                if n <= layout.bank_frames:
                    bank[n - 1 :] = [staged]
                    continue
                scores = []
                for _, (k, _) in bank:
                    products = torch.einsum("thd,shd->hts", text[layer][story].double(), k.double())
                    scores.append(products.mean().item() / HEAD_DIM**0.5 * (not interactive or not recached[story]))
                order = sorted(range(len(bank)), key=lambda i: -scores[i])[:-1]
                banks[layer] = [*(bank[i] for i in order), staged]
                self.kept = self.kept or {}
                self.kept[layer, story] = [bank[i][0] for i in order], [scores[i] for i in order]

    def put(
        self, first_frame: int, k: Tensor, v: Tensor, stories: list[bool] | None = None, with_sink: bool = False
    ) -> None:
        """k, v (LAYERS, B, tokens, HEADS, HEAD_DIM). stories: which are re-cached; None: the chunk is new. with_sink:
        what is re-cached replaces the frames of the sink too."""
        for story in range(self.layout.batch):
            for i in range(k.shape[2] // TOKENS):
                frame = tuple(t[:, story, i * TOKENS : (i + 1) * TOKENS] for t in (k, v))
                if stories is None or (with_sink and stories[story]):
                    self.sink[story][first_frame + i] = frame
                if stories is None or stories[story]:
                    self.now[story][first_frame + i] = frame

    def sink_frames(self, end: int) -> list[int]:
        return list(range(min(self.layout.sink_frames, end)))

    def local(self, end: int) -> list[int]:
        return list(range(self.layout.sink_frames, end))[-self.layout.window_frames :]


def numbers(layout: ReleasedLayout, frames: int | None = None) -> Tensor:
    tokens = (frames or layout.chunk_frames) * TOKENS
    return torch.randn(2, LAYERS, layout.batch, tokens, HEADS, HEAD_DIM)


def write(cache: ReleasedCache, kv: Tensor) -> None:
    for layer in range(LAYERS):
        cache.write(layer, kv[0, layer], kv[1, layer])
        if len(cache.open_frames()) == cache.layout.chunk_frames:
            cache.remember(layer, kv[0, layer])


def multiset(keys: Tensor) -> Tensor:
    """Sorts (tokens, HEADS, HEAD_DIM), because keys have no order."""
    flat = keys.flatten(1)
    return flat[flat[:, 0].argsort(stable=True)]


def check(cache: ReleasedCache, naive: Naive, end: int, local: list[int]) -> None:
    """What a pass attends to, densely and by frames, is what the lists say, and nothing of it is a copy."""
    layout = cache.layout
    assert sorted(cache.window_frames()) == local
    for layer in range(LAYERS):
        dense, window, memory = cache.dense(layer), cache.window(layer), cache.memory(layer)
        assert {t.untyped_storage().data_ptr() for t in (dense[0], window[0])} == {
            cache._keys.untyped_storage().data_ptr()
        }
        for story in range(layout.batch):
            bank = naive.banks[story][layer]
            sink = [(f, tuple(t[layer] for t in naive.sink[story][f])) for f in naive.sink_frames(end)]
            near = [tuple(t[layer] for t in naive.now[story][f]) for f in local]
            for part in range(2):
                want = torch.cat([kv[part] for _, kv in [*sink, *bank]] + [kv[part] for kv in near])
                assert torch.equal(multiset(dense[part][story]), multiset(want))
                assert window[part].shape[1] == len(local) * TOKENS
                if near:
                    want = torch.cat([kv[part] for kv in near])
                    assert torch.equal(multiset(window[part][story]), multiset(want))
            frames = cache.bank_by_layer()[layer][story]
            assert frames[: len(sink)] == [f for f, _ in sink] and int(memory.frames[story]) == len(frames)
            assert sorted(frames[len(sink) :]) == sorted(f for f, _ in bank)
            # A frame of the sink that was re-cached differs from its copy in the bank.
            known = [*sink, *((frame, dict(bank)[frame]) for frame in frames[len(sink) :])]
            for (_, (k, v)), slot in zip(known, memory.slots[story].tolist(), strict=False):
                assert torch.equal(memory.keys[story, slot * TOKENS : (slot + 1) * TOKENS], k)
                assert torch.equal(memory.values[story, slot * TOKENS : (slot + 1) * TOKENS], v)
                torch.testing.assert_close(memory.descriptors[story, slot], k.mean(0), rtol=0, atol=1e-6)


SETTINGS = {
    "as-released": {},
    "one-story": {"batch": 1},
    "bank-1": {"bank_frames": 1, "record_interval": 2},
    "no-bank": {"bank_frames": 0},
    "no-sink": {"sink_frames": 0, "window_frames": 6},
    "window-is-chunk": {"window_frames": 3, "record_interval": 1},
    "large-sink": {"sink_frames": 7, "bank_frames": 2},
    "chunk-2-sink-1": {"chunk_frames": 2, "sink_frames": 1, "window_frames": 4, "bank_frames": 4, "record_interval": 1},
    "window-of-no-whole-chunks": {"window_frames": 7},
    "interactive": {"schedule": "interactive"},
    "interactive-one-story": {"batch": 1, "schedule": "interactive", "record_interval": 2},
    "interactive-bank-1": {"bank_frames": 1, "schedule": "interactive"},
    "interactive-long-interval": {"bank_frames": 2, "schedule": "interactive", "record_interval": 7},
    "interactive-window-7": {"window_frames": 7, "sink_frames": 4, "schedule": "interactive"},
    "interactive-chunk-2": {"chunk_frames": 2, "sink_frames": 1, "window_frames": 4, "schedule": "interactive"},
}


@pytest.mark.parametrize("sizes", SETTINGS.values(), ids=SETTINGS)
def test_against_lists_of_frames(sizes):
    torch.manual_seed(0)
    choice = random.Random(0)
    layout = layout_of(**sizes)
    cache, naive = ReleasedCache(layout), Naive(layout)
    compressed = 0
    for chunk in range(22):
        text = [torch.randn(layout.batch, 6, HEADS, HEAD_DIM) for _ in range(LAYERS)]
        interactive = layout.schedule == "interactive"
        switch = chunk % 5 == 4 and (interactive or layout.window_frames % layout.chunk_frames == 0)
        stories = None if chunk == 9 else [choice.random() < 0.5 for _ in range(layout.batch)]
        recached = [switch and (stories is None or stories[b]) for b in range(layout.batch)]
        naive.update_bank(text, recached)
        cache.update_bank(text, recached)
        cache.update_bank([torch.randn(layout.batch, 6, HEADS, HEAD_DIM)] * LAYERS)  # the second call changes nothing
        if naive.kept is not None:
            compressed += 1
            for (layer, story), (frames, scores) in naive.kept.items():
                if interactive and recached[story]:
                    assert sorted(cache.kept.frames[layer, story].tolist()) == sorted(frames)
                    continue
                assert cache.kept.frames[layer, story].tolist() == frames
                torch.testing.assert_close(cache.kept.scores[layer, story].double(), torch.tensor(scores).double())
        else:
            assert cache.kept is None
        first = chunk * layout.chunk_frames
        if switch and interactive:
            frames = range(max(0, first - layout.sink_frames - layout.window_frames), first)
            assert cache.restart_window(stories) == [frames.start] == [cache.begin_chunk()]
            assert cache.open_frames() == frames
            kv = numbers(layout, len(frames))
            write(cache, kv)
            naive.put(frames.start, *kv, stories or [True] * layout.batch, with_sink=frames.start == 0)
            check(cache, naive, first, naive.local(first))
            cache.commit()
        elif switch:
            again = cache.restart_window(stories)
            local = [f for f in naive.local(first) if f >= first + layout.chunk_frames - layout.window_frames]
            assert again == sorted({f // layout.chunk_frames * layout.chunk_frames for f in local})
            for first_frame in again:
                assert cache.begin_chunk() == first_frame
                kv = numbers(layout)
                write(cache, kv)
                naive.put(first_frame, *kv, stories or [True] * layout.batch)
                check(cache, naive, first, [f for f in local if f < first_frame + layout.chunk_frames])
                cache.commit()
        first_frame = cache.begin_chunk()
        assert first_frame == chunk * layout.chunk_frames
        end = first_frame + layout.chunk_frames
        for _ in range(2):  # the first pass leaves nothing behind
            kv = numbers(layout)
            write(cache, kv)
            naive.put(first_frame, *kv)
            check(cache, naive, end, naive.local(end))
        cache.commit()
        naive.chunk += 1
        assert cache.committed == chunk + 1
    assert compressed == max(0, 21 - layout.bank_frames * layout.record_interval) * bool(layout.bank_frames)


def test_a_frame_is_twice_in_the_bank_between_two_that_enter():
    """A full bank is weighed again before every chunk; then the frame that came last may take another's place too."""
    cache = ReleasedCache(layout_of(batch=1, bank_frames=2, record_interval=3, schedule="interactive"))
    held = []
    for chunk in range(9):
        cache.update_bank([torch.ones(1, 2, HEADS, HEAD_DIM)] * LAYERS)
        cache.begin_chunk()
        write(cache, torch.full((2, LAYERS, 1, cache.layout.chunk_tokens, HEADS, HEAD_DIM), float(chunk)))
        cache.commit()
        held.append(sorted(cache.recorded()[0, 0].tolist()))
    assert held[2:] == [[0], [0], [0, 9], [0, 9], [0, 9], [9, 18], [18, 18]]


def test_both_schedules_are_offered_by_name():
    assert layout_of(schedule="interactive").recached_frames == 12
    with pytest.raises(ValueError, match="schedule must be one of interactive, single-prompt, got 'often'"):
        layout_of(schedule="often")


def reproducible(cache: ReleasedCache) -> Tensor:
    """Keys, values and text keys of the coming chunk, (3, LAYERS, B, chunk tokens, HEADS, HEAD_DIM)."""
    shape = (3, LAYERS, cache.layout.batch, cache.layout.chunk_tokens, HEADS, HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(cache.committed))


def run(cache: ReleasedCache, chunks: int) -> list[Tensor]:
    """Streams chunks of reproducible numbers; returns what each could attend to."""
    seen = []
    for _ in range(chunks):
        k, v, text = reproducible(cache)
        cache.update_bank(list(text))
        cache.begin_chunk()
        write(cache, torch.stack([k, v]))
        seen.append(torch.cat([part for layer in range(LAYERS) for part in cache.dense(layer)], dim=1).clone())
        cache.commit()
    return seen


def test_saved_and_loaded_it_goes_on_to_the_same_bits():
    whole = run(ReleasedCache(layout_of()), 16)
    for stop in (0, 1, 5, 13):
        first, second = ReleasedCache(layout_of()), ReleasedCache(layout_of())
        run(first, stop)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        run(first, 2)  # going on does not change what was saved
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for got, want in zip(run(second, 16 - stop), whole[stop:], strict=True):
            assert torch.equal(got, want)


def test_a_state_of_other_sizes_is_refused():
    state = ReleasedCache(layout_of()).state_dict()
    with pytest.raises(ValueError, match="window_frames=9, here 6"):
        ReleasedCache(layout_of(window_frames=6)).load_state_dict(state)
    with pytest.raises(ValueError, match="no layout of a cache, got None"):
        ReleasedCache(layout_of()).load_state_dict({})


@pytest.mark.parametrize("done", [1, 3, 12])
def test_after_an_aborted_chunk_the_stream_goes_on_to_the_same_bits(done):
    whole = run(ReleasedCache(layout_of()), done + 3)
    cache = ReleasedCache(layout_of())
    run(cache, done)
    cache.abort()  # does nothing, because no chunk is open
    cache.update_bank(list(reproducible(cache)[2]))
    cache.begin_chunk()
    cache.write(0, *torch.randn(2, 2, cache.layout.chunk_tokens, HEADS, HEAD_DIM))
    cache.abort()
    for got, want in zip(run(cache, 3), whole[done:], strict=True):
        assert torch.equal(got, want)


def test_an_interrupted_recaching_is_begun_again():
    cache = ReleasedCache(layout_of())
    run(cache, 6)
    cache.update_bank([torch.zeros(2, 1, HEADS, HEAD_DIM)] * LAYERS)
    first = cache.restart_window([True, False])
    cache.begin_chunk()
    write(cache, numbers(cache.layout))
    with pytest.raises(RuntimeError, match="commit or abort it first"):
        cache.state_dict()
    cache.abort()
    assert cache.restart_window([True, False]) == first == [12, 15]


def test_calls_out_of_order_and_bad_tensors_are_refused():
    cache = ReleasedCache(layout_of())
    k, v = torch.randn(2, 2, cache.layout.chunk_tokens, HEADS, HEAD_DIM)
    text = [torch.randn(2, 3, HEADS, HEAD_DIM)] * LAYERS
    for call in (lambda: cache.write(0, k, v), cache.commit, *(lambda f=f: f(0) for f in (cache.dense, cache.window))):
        with pytest.raises(RuntimeError, match="no chunk is open"):
            call()
    cache.begin_chunk()
    with pytest.raises(RuntimeError, match="before begin_chunk"):
        cache.update_bank(text)
    with pytest.raises(ValueError, match=r"got \(2, 14, 2, 4\)"):
        cache.write(0, k[:, 1:], v)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] have not been written"):
        cache.commit()
    for layer in range(LAYERS):
        cache.remember(layer, k)
        cache.write(layer, k, v)
    with pytest.raises(RuntimeError, match=r"the last pass over layers \[0, 1\] was not the clean one"):
        cache.commit()
    write(cache, numbers(cache.layout))
    for call in (cache.begin_chunk, cache.restart_window, cache.state_dict):
        with pytest.raises(RuntimeError, match="commit"):
            call()
    cache.commit()
    with pytest.raises(RuntimeError, match="bank has not been brought up to date"):
        cache.begin_chunk()
    with pytest.raises(ValueError, match="one entry per layer, 2, got 1"):
        cache.update_bank(text[:1])
    cache.update_bank(text)
    with pytest.raises(ValueError, match="must have 2 entries, got 1"):
        cache.restart_window([True])
    with pytest.raises(RuntimeError, match="window of 7 frames does not hold whole chunks of 3"):
        ReleasedCache(layout_of(window_frames=7)).restart_window()
    with pytest.raises(ValueError, match="window_frames must hold the chunk, chunk_frames=3, got 2"):
        layout_of(window_frames=2)
    with pytest.raises(TypeError, match="record_interval must be an int"):
        layout_of(record_interval=1.5)


def test_a_broken_frame_is_the_first_to_go():
    cache = ReleasedCache(layout_of(batch=1, record_interval=1))
    for chunk in range(5):
        cache.update_bank([torch.ones(1, 2, HEADS, HEAD_DIM)] * LAYERS)
        cache.begin_chunk()
        kv = torch.full((2, LAYERS, 1, cache.layout.chunk_tokens, HEADS, HEAD_DIM), float(10 - chunk))
        if chunk == 1:
            kv[0] = torch.nan
        write(cache, kv)
        cache.commit()
    assert sorted(cache.recorded()[0, 0].tolist()) == [0, 6, 9]
