"""A stream's passes recorded as CUDA graphs, and what the host waits for, on a real GPU. `make gpu-test`.

tests/model/streaming/test_cuda_graphs.py proves the same on a CPU but for the recording itself.
"""

from contextlib import contextmanager

import pytest
import torch
from graph_streams import CHUNKS, assert_same, encode, model_of, prompts_of, settings_of

from memflow_ops.model.streaming.streamer import Streamer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODES = {
    "none": ({"memory": "none"}, 3),
    "sink": ({"memory": "sink"}, 3),
    "memflow": ({"block_size": 4, "query_group": 6}, 3),
    "memflow-bounded": ({"positions": "bounded", "block_size": 4, "query_group": 6}, 3),
    "memflow-host": ({"window_frames": 6, "device_frames": 4, "host_frames": 6, "stochastic": True}, 3),
    "per-query": ({"query_group": 1, "recache": False}, 2),
    "released": ({"memory": "released", "record_interval": 1, "bank_schedule": "single-prompt"}, 3),
    "released-top": ({"memory": "released", "record_interval": 1, "top_frames": 2}, 2),
}


@pytest.fixture(autouse=True)
def as_streams_run():
    """Deterministic algorithms are others than a stream runs with."""
    torch.use_deterministic_algorithms(False)


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def streamer_of(changes, dtype, **options) -> Streamer:
    model = model_of(dim=128).to("cuda", dtype)
    return Streamer(model, 2, settings_of(height=8, width=12, **changes), seed=4, encode=encode, **options)


def guard(streamer: Streamer) -> None:
    """An error where a pass, eager or a replay, makes the host wait. Recording itself may."""
    recorder, passes = streamer.passes.recorder, streamer.passes
    if recorder is None:
        run = passes.run
        passes.run = lambda shape, one_pass: _guarded(run, shape, one_pass)
        return
    warm_up, record = recorder.warm_up, recorder.record

    def guarded_record(one_pass):
        replay, out = record(one_pass)
        return lambda: _guarded(replay), out

    recorder.warm_up = lambda one_pass: _guarded(warm_up, one_pass)
    recorder.record = guarded_record


def _guarded(run, *arguments):
    with no_waiting():
        return run(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("changes", "count"), MODES.values(), ids=MODES)
def test_replayed_passes_give_the_same_bits_and_no_pass_waits(changes, count, dtype):
    chunks = {}
    for recorded in (False, True):
        streamer = streamer_of(changes, dtype, cuda_graphs=recorded)
        streamer.next_chunk(prompts_of(0))  # compiles
        guard(streamer)
        chunks[recorded] = [streamer.next_chunk(prompts_of(index)) for index in range(1, CHUNKS)]
    assert_same(chunks[True], chunks[False])
    assert all(chunk.frames.isfinite().all() for chunk in chunks[True])
    assert streamer.passes.graphs == count
    assert all(chunk.replayed >= 3 for chunk in chunks[True][11:])


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("memory", ["none", "sink"])
def test_the_host_waits_for_nothing_in_a_whole_chunk(memory, cuda_graphs):
    streamer = streamer_of({"memory": memory}, torch.bfloat16, report=False, cuda_graphs=cuda_graphs)
    for _ in range(6):
        streamer.next_chunk(["a", "x"])
    torch.cuda.synchronize()
    with no_waiting():
        for _ in range(4):
            chunk = streamer.next_chunk(["a", "x"])
    assert chunk.replayed == (3 if cuda_graphs else 0)


def test_graphs_are_the_default_and_compiled_blocks_can_be_recorded():
    plain = streamer_of({}, torch.bfloat16)
    want = [plain.next_chunk(prompts_of(index)) for index in range(8)]
    assert plain.passes.graphs == 2 and want[-1].replayed == 3
    frames = {}
    for recorded in (False, True):
        compiled = streamer_of({}, torch.bfloat16, cuda_graphs=recorded)
        compiled.model.compile_blocks()
        frames[recorded] = [compiled.next_chunk(prompts_of(index)).frames for index in range(8)]
    for got, eager, uncompiled in zip(frames[True], frames[False], want, strict=True):
        assert torch.equal(got, eager)
        if uncompiled.index == 0:  # later chunks are made of earlier ones, and drift
            torch.testing.assert_close(got, uncompiled.frames, rtol=0, atol=0.1)
