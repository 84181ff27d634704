"""Passes that are recorded and replayed, as CUDA graphs do it, here by a tape of operators on a CPU.

The tape holds the operators of one pass with their very arguments: numbers as they were, and tensors of outside by
reference. So what the pass should have read from a tensor that stays where it is, and did not, is stale at the next
chunk and shows in the frames. tests/gpu/test_stream_graphs.py does the same with CUDA's own.
"""

import warnings

import pytest
import torch
from graph_streams import CHUNKS, assert_same, encode, model_of, prompts_of, settings_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from memflow_ops.model.streaming import cuda_graphs
from memflow_ops.model.streaming.cuda_graphs import Passes
from memflow_ops.model.streaming.streamer import Chunk, Streamer

FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh", "randn", "rand", "resize_")
"""What a CUDA graph cannot hold: answers for the host, numbers from the host, sizes that depend on values."""


class Tape(TorchDispatchMode):
    """Records operators, and undoes what they did to memory of outside."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list = []
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in FORBIDDEN:
            raise RuntimeError(f"a graph cannot hold {name}")
        kwargs = kwargs or {}
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given.get(argument.name)):
                    if isinstance(tensor, Tensor):
                        storage = tensor.untyped_storage()
                        self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        out = func(*args, **kwargs)
        self.steps.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        for storage, content in self.before.values():
            storage.copy_(content)

    def replay(self) -> dict[int, Tensor]:
        """Runs all operators again; returns what now stands for each result of the recording."""
        made: dict[int, Tensor] = {}

        def now(x):
            return made.get(id(x), x) if isinstance(x, Tensor) else x

        for func, args, kwargs, out in self.steps:
            again = func(*tree_map(now, args), **tree_map(now, kwargs))
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor):
                    made[id(old)] = new
        return made


class TapeRecorder:
    """A `Recorder` for a CPU."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def warm_up(self, one_pass):
        return one_pass()

    def record(self, one_pass):
        tape = Tape()
        with tape:
            result = one_pass()
        tape.undo()
        self.tapes.append(tape)
        out = None if result is None else torch.full_like(result, torch.nan)  # recording does not run it

        def replay() -> None:
            made = tape.replay()
            if result is not None:
                out.copy_(made[id(result)])

        return replay, out


def stream(model, settings, recorder=None, report=True) -> tuple[Streamer, list[Chunk]]:
    streamer = Streamer(model, 2, settings, seed=4, encode=encode, report=report)
    streamer.passes = Passes(streamer.cache, recorder, insist=True)
    streamer.cache.counts_keys = recorder is not None  # as on CUDA, where passes are recorded
    return streamer, [streamer.next_chunk(prompts_of(index)) for index in range(CHUNKS)]


# Graphs: noisy and clean, and one for the clean passes again of all chunks that a switch leaves in the window.
MODES = {
    "none": ({"memory": "none"}, 3),
    "sink": ({"memory": "sink", "sink_frames": 4}, 3),
    "memflow": ({"memory": "memflow", "query_group": None, "relevance": "softmax"}, 3),
    "memflow-long": ({"memory": "memflow", "window_frames": 15, "query_group": 4}, 3),
    # The first noisy pass chooses, the second reuses its choice: a graph of each, with copies and without.
    "memflow-kept": ({"reselect": "chunk"}, 4),
    "memflow-kept-copies": ({"reselect": "chunk", "query_group": None}, 4),
    "memflow-bounded": ({"positions": "bounded"}, 3),
    "memflow-bounded-kept-copies": ({"positions": "bounded", "reselect": "chunk", "query_group": None}, 4),
    # Two chunks in the window; slots are used again, frames go to host memory and come back.
    "memflow-host": ({"window_frames": 6, "device_frames": 4, "host_frames": 6, "stochastic": True}, 3),
    "memflow-no-sink": ({"sink_frames": 0, "recache": False, "query_group": 1}, 2),
    "released": ({"memory": "released", "record_interval": 1, "bank_schedule": "single-prompt"}, 3),
    # A switch re-caches the window in one pass, which is not recorded.
    "released-top": ({"memory": "released", "record_interval": 2, "top_frames": 2, "sink_frames": 4}, 2),
}


@pytest.mark.parametrize(("changes", "count"), MODES.values(), ids=MODES)
def test_replayed_passes_give_the_same_bits(changes, count):
    model = model_of("x0" if changes.get("memory") == "sink" else "velocity")
    settings = settings_of(**changes)
    recorder = TapeRecorder()
    _, want = stream(model, settings)
    streamer, got = stream(model, settings, recorder)
    assert_same(got, want)
    assert streamer.passes.graphs == len(recorder.tapes) == count
    assert [chunk.replayed for chunk in want] == [0] * CHUNKS
    assert not any(chunk.replayed for chunk in got[:3]), "the window fills: none of these comes again"
    late = [chunk.replayed for chunk in got[12:]]
    at_once = settings.memory == "released" and settings.bank_schedule == "interactive"
    switched = settings.recache and not at_once
    passes = {3} if not switched else {3, 3 + streamer.cache.layout.window_frames // 3 - 1}
    assert set(late) == passes and streamer.passes.replayed == sum(chunk.replayed for chunk in got)


def inputs_of(streamer: Streamer) -> list[Tensor]:
    inputs = streamer.inputs
    return [*inputs.rotation, inputs.latents, *inputs.time, *tree_leaves(streamer.text.keys_values)]


@pytest.mark.parametrize("memory", ["memflow", "released"])
def test_what_a_pass_reads_stays_where_it_is(memory):
    streamer = Streamer(model_of(), 2, settings_of(memory=memory, reselect="chunk"), seed=4, encode=encode)

    def static() -> list[tuple[int, torch.Size]]:
        cache = streamer.cache
        streamer.cache.begin_chunk()
        tensors = [*inputs_of(streamer), cache._chunk_places, *cache.memory(1)[:5]]
        if streamer.chosen is not None:
            tensors += [streamer.chosen.indices, streamer.chosen.hidden]
        cache.abort()
        return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]

    before = static()
    for index in range(8):
        streamer.next_chunk(prompts_of(index))
    if memory == "released":
        streamer.cache.update_bank(streamer.text.keys)
    assert static() == before


def test_only_the_memory_of_the_stream_is_read():
    """Every tensor that a recording takes from outside is one that lives as long as the stream."""
    recorder = TapeRecorder()
    streamer, _ = stream(model_of(), settings_of(reselect="chunk"), recorder)
    cache, lasting = streamer.cache, set()
    own = [*streamer.model.parameters(), *inputs_of(streamer)]
    own += [x for of in (cache, cache._table, streamer.activation, streamer.chosen) for x in vars(of).values()]
    for tensor in tree_leaves(own):
        if isinstance(tensor, Tensor):
            lasting.add(tensor.untyped_storage().data_ptr())
    for tape in recorder.tapes:
        made = {id(x) for step in tape.steps for x in tree_leaves(step[3])}
        for func, args, kwargs, _ in tape.steps:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and id(x) not in made:
                    assert x.untyped_storage().data_ptr() in lasting, f"{func} reads a tensor that will be gone"


def test_the_double_notices_a_number_that_was_not_in_a_tensor(monkeypatch):
    """So that the tests above mean something."""
    model, settings = model_of(), settings_of(memory="none", recache=False)
    _, want = stream(model, settings)
    streamer = Streamer(model, 2, settings, seed=4, encode=encode)
    streamer.passes = Passes(streamer.cache, TapeRecorder(), insist=True)
    cache, begin = streamer.cache, streamer.cache.begin_chunk

    def moved():
        first_frame = begin()
        cache._chunk_places = cache._chunk_places.clone()
        return first_frame

    monkeypatch.setattr(cache, "begin_chunk", moved)
    got = [streamer.next_chunk(prompts_of(index)) for index in range(7)]
    same = [torch.equal(a.frames, b.frames) for a, b in zip(got, want, strict=False)]
    assert same == [True] * 5 + [False] * 2  # recorded at chunk 4, with the places of chunk 4


def test_a_history_that_grows_is_not_recorded():
    streamer, got = stream(model_of(), settings_of(memory="full", recache=False), TapeRecorder())
    assert streamer.passes.graphs == 0 and not any(chunk.replayed for chunk in got)


def test_after_an_interruption_and_a_saved_state_replays_go_on():
    model, settings = model_of(), settings_of()
    _, want = stream(model, settings)
    streamer = Streamer(model, 2, settings, seed=4, encode=encode)
    streamer.passes = Passes(streamer.cache, TapeRecorder(), insist=True)
    got = []
    for index in range(CHUNKS):
        if index in (9, 15):  # in the middle of a chunk's passes, with recordings and without
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(streamer, "_write_keys", lambda *arguments, **options: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    streamer.next_chunk(prompts_of(index))
        if index == 12:
            streamer.load_state_dict(streamer.state_dict())
        got.append(streamer.next_chunk(prompts_of(index)))
    assert_same(got, want)
    assert streamer.passes.replayed > 0


class Failing(TapeRecorder):
    def record(self, one_pass):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_failed_recording_is_said_and_the_stream_goes_on():
    model, settings = model_of(), settings_of()
    _, want = stream(model, settings)
    streamer = Streamer(model, 2, settings, seed=4, encode=encode)
    streamer.passes = Passes(streamer.cache, Failing())
    with pytest.warns(RuntimeWarning, match="goes on without: operation not permitted") as said:
        got = [streamer.next_chunk(prompts_of(index)) for index in range(CHUNKS)]
    assert len(said) == 1
    assert_same(got, want)
    streamer = Streamer(model, 2, settings, seed=4, encode=encode)
    streamer.passes = Passes(streamer.cache, Failing(), insist=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        for index in range(CHUNKS):
            streamer.next_chunk(prompts_of(index))


def test_where_there_can_be_none():
    model, cuda = model_of(), torch.device("cuda")
    with pytest.raises(ValueError, match="no CUDA graphs for this stream: they need a CUDA device, the model is on"):
        Streamer(model, 2, settings_of(), encode=encode, cuda_graphs=True)
    for off in (None, False):
        streamer = Streamer(model, 2, settings_of(), encode=encode, cuda_graphs=off)
        assert streamer.passes.recorder is None
    assert "draws its blocks on the host" in cuda_graphs.why_not_record(cuda, settings_of(selection="random"))
    assert "reads values back" in cuda_graphs.why_not_record(cuda, settings_of(impl="reference"))
    assert cuda_graphs.why_not_record(cuda, settings_of()) == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="a graph cannot hold"):  # and the double refuses it as well
            stream(model, settings_of(selection="random"), TapeRecorder())
