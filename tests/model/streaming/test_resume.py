"""A stream that is stopped and resumed, interrupted, or runs for hours; and what it computes only once."""

import copy
import gc
import io
import itertools
import json
import pickle
import sys
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.policies import Retrieved
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig, TimeEmbedding

SIZE, TEXT_LEN, TEXT_DIM = 4, 3, 4
PROMPTS = ["a ball", "a ball", "a box", "a box", "a box", "a ball", "a ring", "a ring"]


def encode(prompts) -> Tensor:
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
        rows.append(F.pad(torch.randn(2, TEXT_DIM, generator=generator), (0, 0, 0, 1)))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def model() -> CausalVideoModel:
    torch.manual_seed(3)
    sizes = {"dim": 16, "ffn_dim": 16, "num_heads": 2, "num_layers": 2, "in_dim": 2, "out_dim": 2}
    config = ModelConfig(**sizes, text_dim=TEXT_DIM, text_len=TEXT_LEN, freq_dim=8, prediction="x0")
    return CausalVideoModel(config).eval()


def settings_of(**changes) -> StreamSettings:
    defaults = {"height": SIZE, "width": SIZE, "steps": 2, "block_size": 2, "query_group": 5, "top_k": 4, "shift": 7.0}
    return StreamSettings(**{**defaults, "device_frames": 30, **changes})


MODES = {
    "none": {"memory": "none"},
    "sink": {"memory": "sink", "window_frames": 9},
    "full": {"memory": "full"},
    "memflow": {"memory": "memflow"},
    "host": {"device_frames": 4, "host_frames": 2, "relevance": "random", "bank_frames": 2},
    "stochastic": {"stochastic": True, "recache": False},
    "moments": {"score": "moments", "top_k": 2},
    "int8": {"bank_dtype": "int8", "top_k": 2},
    "int8-host-copies": {
        "bank_dtype": "int8",
        "device_frames": 4,
        "host_frames": 2,
        "bank_frames": 2,
        "relevance": "random",
        "top_k": 2,
        "query_group": None,
    },
    "kept": {"reselect": "chunk", "top_k": 2},
    "kept-copies": {"reselect": "chunk", "top_k": 2, "query_group": None},
    "bounded": {"positions": "bounded", "top_k": 2},
    "bounded-copies": {"positions": "bounded", "reselect": "chunk", "top_k": 2, "query_group": None},
    "random-blocks": {"selection": "random", "relevance": "coverage", "top_k": 2},
    "released": {
        "memory": "released",
        "window_frames": 9,
        "record_interval": 1,
        "bank_frames": 2,
        "bank_schedule": "single-prompt",
    },
    "released-interactive": {"memory": "released", "window_frames": 9, "record_interval": 2, "bank_frames": 2},
    "released-top": {"memory": "released", "window_frames": 6, "record_interval": 1, "top_frames": 2},
}
modes = pytest.mark.parametrize("changes", MODES.values(), ids=MODES)


def told(chunk: Chunk) -> tuple:
    """All of a chunk but its pixels and its time."""
    return (
        *(chunk.index, chunk.first_frame, chunk.prompts),
        *(chunk.retrieved, chunk.relevance, chunk.candidates, chunk.activation),
    )


def assert_same(got: Chunk, want: Chunk) -> None:
    assert torch.equal(got.frames, want.frames), f"chunk {want.index}"
    assert told(got) == told(want)


def prompts_of(index: int) -> list[str]:
    """Of two stories that switch at different chunks."""
    return [PROMPTS[index % 8], PROMPTS[(index + 3) // 2 % 8]]


def make(model, changes) -> Streamer:
    return Streamer(model, 2, settings_of(**changes), seed=4, encode=encode)


def chunks_of(streamer: Streamer, count: int) -> list[Chunk]:
    return [streamer.next_chunk(prompts_of(streamer.cache.committed)) for _ in range(count)]


# -------------------------------------------------------------------------------------------------- stopped and resumed


@modes
def test_stopped_and_resumed_it_gives_the_same_bits(model, changes):
    whole = chunks_of(make(model, changes), 14)
    for stop in (0, 4, 11):
        first = make(model, changes)
        chunks_of(first, stop)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second = make(model, changes)
        for tensor in (second.cache._keys, second.cache._values, *second.cache._bank[2:]):
            tensor.fill_(torch.nan)  # whatever is needed and not in the state shows
        second.load_state_dict(torch.load(file, weights_only=True))
        for got, want in zip(chunks_of(second, 14 - stop), whole[stop:], strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("seeds", [np.int64(4), np.array([4, 5])], ids=["one", "one per story"])
def test_integers_of_numpy_are_integers(model, seeds):
    """Also in what is saved, which torch would not load, and JSON not write."""
    changes = {**MODES["memflow"], "top_k": np.int64(4), "device_frames": np.int32(30), "query_group": np.uint8(5)}
    streamer = Streamer(model, 2, settings_of(**changes), seeds, encode=encode)
    for got, want in zip(chunks_of(streamer, 4), chunks_of(make(model, MODES["memflow"]), 4), strict=True):
        assert_same(got, want)
    file = io.BytesIO()
    torch.save(streamer.state_dict(), file)
    file.seek(0)
    make(model, MODES["memflow"]).load_state_dict(torch.load(file, weights_only=True))
    assert json.loads(json.dumps(vars(streamer.settings))) == vars(settings_of())


@pytest.mark.parametrize("seed", [1.0, "7", None, [1, 2.0]], ids=str)
def test_a_seed_that_is_no_integer_is_refused(model, seed):
    with pytest.raises(TypeError, match="seed must be an int or a sequence of ints, one per story"):
        Streamer(model, 2, settings_of(), seed, encode=encode)


def test_a_state_is_a_copy(model):
    """Going on changes neither a state that was taken nor one that was loaded."""
    changes = MODES["host"]
    first, second = make(model, changes), make(model, changes)
    chunks_of(first, 9)
    state = first.state_dict()
    want = chunks_of(first, 4)
    second.load_state_dict(state)
    chunks_of(second, 4)
    third = make(model, changes)
    third.load_state_dict(state)
    for a, b in zip(chunks_of(third, 4), want, strict=True):
        assert_same(a, b)


def test_a_stream_goes_back_to_an_earlier_state(model):
    streamer = make(model, MODES["memflow"])
    chunks_of(streamer, 5)
    state = streamer.state_dict()
    want = chunks_of(streamer, 6)
    streamer.load_state_dict(state)
    for a, b in zip(chunks_of(streamer, 6), want, strict=True):
        assert_same(a, b)


def test_a_state_of_another_stream_is_refused_and_nothing_is_lost(model):
    streamer, twin = make(model, MODES["memflow"]), make(model, MODES["memflow"])
    chunks_of(streamer, 6), chunks_of(twin, 6)
    other_model = CausalVideoModel(ModelConfig(**{**vars(model.config), "ffn_dim": 8}))
    alone = Streamer(model, 1, settings_of(), encode=encode)
    for state, message in (
        ({}, "no state of a stream: expected the format 'memflow-ops stream 1', got None"),
        ([], "got 'list'"),
        (make(model, {"memory": "none"}).state_dict(), "other settings: memory='none', here 'memflow'"),
        (make(model, {"top_k": 2}).state_dict(), "other settings: top_k=2, here 4"),
        (make(other_model, {}).state_dict(), "other model: ffn_dim=8, here 16"),
        (alone.state_dict(), r"stories with the seeds \[0\], here \[4, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            streamer.load_state_dict(state)
    damaged = twin.state_dict()
    damaged["cache"]["pools"][0] = damaged["cache"]["pools"][0][:, :, 1:]
    with pytest.raises(ValueError, match="the state's pools must have the shapes"):
        streamer.load_state_dict(damaged)
    for a, b in zip(chunks_of(streamer, 3), chunks_of(twin, 3), strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy, lambda x: torch.save(x, io.BytesIO())])
@pytest.mark.parametrize("name", ["memflow", "released"])
def test_neither_a_stream_nor_its_cache_is_pickled_or_copied(model, name, way):
    """The tensors of a copy would not share memory, and it would go on to other frames without a word."""
    streamer = make(model, MODES[name])
    chunks_of(streamer, 3)
    for part in (streamer, streamer.cache)[: 1 if way is copy.deepcopy else 2]:
        with pytest.raises(TypeError, match=f"{type(part).__name__} cannot be pickled .* `state_dict"):
            way(part)


# ---------------------------------------------------------------------------------------------------------- interrupted


class Interrupted(BaseException):
    """Like KeyboardInterrupt, it is no Exception."""


def interrupt_at_pass(model: CausalVideoModel, number: int):
    """Makes the model's layers raise in their number-th self-attention."""
    countdown = itertools.count(number, -1)

    def hook(module, arguments):
        if next(countdown) == 0:
            raise Interrupted

    return [block.self_attn.q.register_forward_pre_hook(hook) for block in model.blocks]


@modes
def test_an_interrupted_chunk_is_made_again(model, changes):
    """Whichever layer of whichever pass it was; at chunk 5 one of two stories switches, at 0 there is nothing yet."""
    whole = chunks_of(make(model, changes), 8)
    for done in (0, 5):
        number, finished = 0, False
        streamer = make(model, changes)
        chunks_of(streamer, done)
        state = streamer.state_dict()
        while not finished:
            hooks = interrupt_at_pass(model, number)
            try:
                got, finished = chunks_of(streamer, 1), True
            except Interrupted:
                got = None
            finally:
                for hook in hooks:
                    hook.remove()
            got = got or chunks_of(streamer, 1)
            for a, b in zip(got + chunks_of(streamer, 1), whole[done:], strict=False):
                assert_same(a, b)
            streamer.load_state_dict(state)
            number += 1
        assert number > 6, "two layers in at least three passes"


@modes
def test_after_an_interruption_another_prompt_may_follow(model, changes):
    """Whatever was half done under the prompt that was given up leaves no trace that matters."""
    streamer, twin = make(model, changes), make(model, changes)
    chunks_of(streamer, 7), chunks_of(twin, 7)
    for number in (0, 1, 2, 5):
        hooks = interrupt_at_pass(model, number)
        with pytest.raises(Interrupted):
            streamer.next_chunk(["a star", "a star"])
        for hook in hooks:
            hook.remove()
    saved = streamer.state_dict()  # an interrupted stream can be saved
    got, want = (s.next_chunk(["a lake", "a lake"]) for s in (streamer, twin))
    torch.testing.assert_close(got.frames, want.frames, rtol=0, atol=1e-5)
    resumed = make(model, changes)
    resumed.load_state_dict(saved)
    assert_same(resumed.next_chunk(["a lake", "a lake"]), got)


@pytest.mark.parametrize("done", [9, 13], ids=["one-story-switches", "both-switch"])
@pytest.mark.parametrize("name", ["host", "memflow", "int8-host-copies", "released-top"])
def test_an_interruption_at_any_line_leaves_the_stream_usable(model, name, done):
    """As Ctrl-C does: between any two lines of the streaming loop and of the caches, here every ninth one."""
    changes = MODES[name]
    streamer = make(model, changes)
    chunks_of(streamer, done)
    state = streamer.state_dict()
    whole = chunks_of(streamer, 2)
    folders = ("/memflow_ops/cache/", "/model/streaming/")

    def run_until(line: int) -> bool:
        """One chunk, interrupted after so many lines; False if it has not so many."""
        left = line

        def trace(frame, event, argument):
            nonlocal left
            if not any(folder in frame.f_code.co_filename for folder in folders):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise Interrupted
            return trace

        sys.settrace(trace)
        try:
            chunks_of(streamer, 1)
        except Interrupted:
            return True
        finally:
            sys.settrace(None)
        return False

    line = 1
    while True:
        streamer.load_state_dict(state)
        if not run_until(line):
            break
        left = done + 2 - streamer.cache.committed
        assert left >= 1, "at most the interrupted chunk itself is finished"
        # While the frames of a story that goes on are moved, it is not to be trusted either, and re-cached as well.
        moving = streamer._window_prompts == [None, None] and done == 9
        for a, b in zip(chunks_of(streamer, left), whole[-left:], strict=True):
            if moving:
                assert a.index == b.index and torch.isfinite(a.frames).all()
            else:
                assert_same(a, b)
        line += 9
    assert line > 200


# ------------------------------------------------------------------------------------------------------------ only once


def test_text_is_encoded_once_per_prompt_and_time_once_per_step(model, monkeypatch):
    asked, texts, times = [], [], []

    def spy_encode(prompts):
        asked.append(list(prompts))
        return encode(prompts)

    for name, calls in (("encode_text", texts), ("encode_time", times)):
        original = getattr(model, name)
        monkeypatch.setattr(model, name, lambda x, original=original, calls=calls: (calls.append(x), original(x))[1])
    streamer = Streamer(model, 2, settings_of(), encode=spy_encode)
    for prompts in (["a", "b"], ["a", "b"], ["a", "c"], ["a", "c"], ["d", "c"]):
        streamer.next_chunk(prompts)
    assert asked == [["a", "b"], ["c"], ["d"]]
    assert [tuple(x.shape) for x in texts] == [(1, TEXT_LEN, TEXT_DIM)] * 4
    assert sorted(x.item() for x in times) == sorted(1000 * sigma for sigma in streamer.sampler.sigmas)


def test_a_time_embedding_for_all_is_that_of_each(model):
    text = model.encode_text(encode(["a", "b"]))
    x = torch.randn(2, 2, 3, SIZE, SIZE)
    each = model(x, torch.full((2, 3), 625.0), text, lambda layer, q, k, v: v)
    once = model.encode_time(torch.full((1, 1), 625.0))
    assert isinstance(once, TimeEmbedding) and once.modulation.shape == (1, 1, 6, 16)
    torch.testing.assert_close(model(x, once, text, lambda layer, q, k, v: v), each, rtol=0, atol=1e-6)


def test_a_pass_for_keys_hands_over_the_same_and_ends_there(model):
    text, x, t = model.encode_text(encode(["a"])), torch.randn(1, 2, 3, SIZE, SIZE), torch.zeros(1, 3)
    handed: dict[str, list] = {"whole": [], "keys": []}
    late: list[str] = []
    model(x, t, text, lambda *given: (handed["whole"].append(given), given[3])[1])
    hooks = [m.register_forward_pre_hook(lambda *_: late.append("late")) for m in (model.head, model.blocks[-1].ffn)]
    assert model.forward_keys(x, t, text, lambda *given: (handed["keys"].append(given), given[3])[1]) is None
    for hook in hooks:
        hook.remove()
    assert not late
    for whole, keys in zip(handed["whole"], handed["keys"], strict=True):
        assert whole[0] == keys[0] and all(torch.equal(a, b) for a, b in zip(whole[1:], keys[1:], strict=True))


@modes
def test_no_value_is_read_back_while_a_chunk_is_made(model, changes):
    """On tensors without values: whatever the host wanted to know of them would raise."""
    if changes.get("relevance") == "random":
        pytest.skip("brings frames back from the host, whose copies need values")
    shapes = CausalVideoModel(model.config).to("meta").eval()
    streamer = Streamer(shapes, 2, settings_of(**changes), encode=encode, report=False)
    if streamer.policy is not None:  # retrieval is the one that asks, before the passes, where frames have to be moved
        choose = lambda candidates, *_: Retrieved([f[:2] for f in candidates.frames], [[], []])  # noqa: E731
        streamer.policy = SimpleNamespace(choose=choose)
    for index in range(12):
        chunk = streamer.next_chunk(prompts_of(index))
    assert chunk.frames.shape == (2, 2, 3, SIZE, SIZE) and chunk.frames.device.type == "meta"
    assert chunk.activation == chunk.candidates == chunk.retrieved == [[], []]


@pytest.mark.parametrize("relevance", ["linear", "softmax", "coverage"])
def test_nor_by_retrieval_where_the_device_holds_all_of_the_past(model, relevance):
    shapes = CausalVideoModel(model.config).to("meta").eval()
    settings = settings_of(memory="memflow", relevance=relevance, device_frames=12, host_frames=0)
    streamer = Streamer(shapes, 2, settings, encode=encode, report=False)
    streamer.policy.choose = lambda *_: pytest.fail("the choice came to the host")
    for index in range(12):
        streamer.next_chunk(prompts_of(index))
    assert len(streamer.cache.candidate_frames()[0]) == 10


# ------------------------------------------------------------------------------------------------------------ for hours


def live_bytes() -> int:
    """Of all tensors there are, each storage once."""
    gc.collect()
    storages = {}
    for candidate in gc.get_objects():
        if type(candidate) is torch.Tensor and candidate.layout == torch.strided:
            storage = candidate.untyped_storage()
            with suppress(RuntimeError):  # What another test has left to torch's compiler has no memory.
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def in_host_memory(cache: FrameCache | ReleasedCache) -> int:
    """Bytes of prototypes off the device, and of the room that they have left."""
    stories = cache._stories if isinstance(cache, FrameCache) else []
    frames = [f for s in stories for f in (*s.free_host, *(p.host for p in s.history.values() if p.slot is None))]
    return sum(tensor.nbytes for frame in frames for tensor in frame)


def watch(streamer: Streamer, chunks: int, every: int) -> Iterator[tuple[int, int, int]]:
    """(chunks so far, bytes in host memory, bytes of all other tensors)."""
    for index in range(chunks):
        streamer.next_chunk(prompts_of(index // 9))
        if (index + 1) % every == 0:
            host = in_host_memory(streamer.cache)
            yield index + 1, host, live_bytes() - host


def test_over_500_chunks_the_device_is_flat_and_the_host_grows_by_a_prototype_per_chunk(model):
    settings = settings_of(steps=1, device_frames=6, host_frames=300, relevance="random", bank_frames=2)
    streamer = Streamer(model, 2, settings, encode=encode)
    measured = list(watch(streamer, 500, 50))
    layout = streamer.cache.layout
    for chunks, host, _ in measured:
        # All but the sink's chunk leave a prototype: six stay on the device, at most 300 wait, one more swaps through.
        expected = min(chunks - 1 - 6, 300) * layout.frame_bytes
        assert 0 <= host - expected <= layout.frame_bytes, (chunks, host, expected)
    assert measured[-1][1] == measured[-3][1] == layout.host_bytes, "at its cap"
    device = [rest for _, _, rest in measured]
    assert max(device) - min(device) <= 1024, device


def test_the_released_cache_is_flat(model):
    streamer = Streamer(model, 2, settings_of(**MODES["released-top"], steps=1), encode=encode)
    measured = [rest for chunks, _, rest in watch(streamer, 150, 30) if chunks > 30]
    assert max(measured) - min(measured) <= 1024, measured
