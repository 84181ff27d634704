"""Streams whose history is on disk: the same bits as in memory, resumed, forked, and read ahead."""

import gc
import random
import sys
import threading

import pytest
import torch
from test_resume import assert_same, chunks_of, encode, make, model, prompts_of, settings_of  # noqa: F401

from memflow_ops.cache.segment import Segment, StoreError
from memflow_ops.cache.store import HistoryFolder
from memflow_ops.model.streaming.streamer import Streamer, stream

TIERS = {"device_frames": 5, "host_frames": 2, "disk_frames": 40, "bank_frames": 3}
IN_MEMORY = {**TIERS, "disk_frames": 0, "host_frames": 42}
KINDS = {
    "linear": {},
    "coverage": {"relevance": "coverage", "recache": False},
    "random": {"relevance": "random"},
    "no-host": {"host_frames": 0},
    "moments": {"score": "moments", "top_k": 2},
    "copies": {"reselect": "chunk", "top_k": 2, "query_group": None},
}
kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def on_disk(model, folder, changes) -> Streamer:  # noqa: F811
    settings = settings_of(**{**TIERS, **changes})
    return Streamer(model, 2, settings, seed=4, encode=encode, history_dir=folder)


def upcoming(streamer: Streamer, count: int):
    """As `chunks_of`, with the prompts of the next chunk known."""
    index = streamer.cache.committed
    return [streamer.next_chunk(prompts_of(index + i), prompts_of(index + i + 1)) for i in range(count)]


@kinds
def test_frames_are_those_of_a_history_in_memory(model, tmp_path, changes):  # noqa: F811
    in_memory = {**IN_MEMORY, **changes, "host_frames": 42}
    whole = chunks_of(make(model, in_memory), 24)
    streamer = on_disk(model, tmp_path, changes)
    for got, want in zip(upcoming(streamer, 24), whole, strict=True):
        assert_same(got, want)
    hits, misses = streamer.cache.disk_reads()
    assert hits + misses > 0 and misses <= 0.05 * (hits + misses), (hits, misses)


@pytest.mark.parametrize("changes", [KINDS["coverage"], KINDS["no-host"]], ids=["coverage", "no-host"])
def test_stopped_and_resumed_it_gives_the_same_bits(model, tmp_path, changes):  # noqa: F811
    whole = chunks_of(on_disk(model, tmp_path / "whole", changes), 20)
    for stop in (0, 1, 9, 16):
        first = on_disk(model, tmp_path / str(stop), changes)
        chunks_of(first, stop)
        state = first.state_dict()
        first.close()
        second = on_disk(model, tmp_path / str(stop), changes)
        for tensor in (second.cache._keys, second.cache._values, second.cache._means):
            tensor.fill_(torch.nan)
        second.load_state_dict(state)
        for got, want in zip(upcoming(second, 20 - stop), whole[stop:], strict=True):
            assert_same(got, want)
        second.close()


@pytest.mark.parametrize("changes", [{}, {"bank_dtype": "int8"}], ids=["", "int8"])
def test_a_state_in_full_goes_on_without_the_folder(model, tmp_path, changes):  # noqa: F811
    """As several processes go on with what one has begun: with all of the history in memory, to the same bits."""
    tiers = {**changes, "host_frames": 42, "disk_frames": 0}
    first = on_disk(model, tmp_path / "first", tiers)
    chunks_of(first, 15)
    named = first.state_dict()
    first.close()
    again = on_disk(model, tmp_path / "first", tiers)
    again.load_state_dict(named)  # leaves on disk what was in host memory
    state = {**named, "cache": again.cache.state_dict(in_full=True)}
    whole = chunks_of(again, 6)
    again.close()
    second = make(model, {**TIERS, **tiers})
    second.load_state_dict(state)
    for got, want in zip(chunks_of(second, 6), whole, strict=True):
        assert_same(got, want)


def test_all_of_the_past_on_the_device_is_kept_too(model, tmp_path):  # noqa: F811
    changes = {"memory": "full", "device_frames": 30, "host_frames": 0, "disk_frames": 0}
    whole = chunks_of(make(model, {"memory": "full"}), 14)
    first = on_disk(model, tmp_path, changes)
    chunks_of(first, 8)
    state = first.state_dict()
    first.close()
    second = on_disk(model, tmp_path, changes)
    second.load_state_dict(state)
    for got, want in zip(chunks_of(second, 6), whole[8:], strict=True):
        assert_same(got, want)


def test_a_state_that_cannot_be_read_leaves_nothing_that_could_go_on(model, tmp_path):  # noqa: F811
    """Frames of two states would be mixed without a word."""
    first = on_disk(model, tmp_path, {})
    chunks_of(first, 10)
    state = first.state_dict()
    want = chunks_of(first, 3)
    records = next(iter(first.history._segments.values())).path
    content = records.read_bytes()
    records.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(StoreError, match="is damaged in record 0"):
        first.load_state_dict(state)
    for doing in (lambda: chunks_of(first, 1), first.state_dict, first.cache.begin_chunk):
        with pytest.raises(RuntimeError, match="a state could not be loaded to its end"):
            doing()
    records.write_bytes(content)
    first.load_state_dict(state)
    for got, other in zip(chunks_of(first, 3), want, strict=True):
        assert_same(got, other)


def test_a_stream_that_is_closed_says_so_before_it_makes_a_chunk(model, tmp_path):  # noqa: F811
    first = on_disk(model, tmp_path, {})
    second = first.fork()  # which keeps the folder open
    first.close()
    for doing in (lambda: chunks_of(first, 1), first.state_dict, first.fork):
        with pytest.raises(RuntimeError, match="the cache has been closed"):
            doing()
    assert first.cache.committed == 0 and chunks_of(second, 1)


@pytest.mark.parametrize("disk", [True, False], ids=["on disk", "in memory"])
def test_two_continuations_of_one_past_do_not_disturb_each_other(model, tmp_path, disk):  # noqa: F811
    def begin(name):
        return on_disk(model, tmp_path / name, {}) if disk else make(model, IN_MEMORY)

    def go_on(streamer, prompts, count=8):
        return [streamer.next_chunk(prompts) for _ in range(count)]

    ways = (["a lake", "a ball"], ["a star", "a wood"])
    alone = []
    for number, prompts in enumerate(ways):
        streamer = begin(f"alone {number}")
        chunks_of(streamer, 10)
        alone.append(go_on(streamer, prompts))
    first = begin("shared")
    chunks_of(first, 10)
    second = first.fork()
    got = [[], []]
    for _ in range(8):  # in turn
        for number, (streamer, prompts) in enumerate(zip((first, second), ways, strict=True)):
            got[number] += go_on(streamer, prompts, 1)
    for ours, want in zip(got, alone, strict=True):
        for a, b in zip(ours, want, strict=True):
            assert_same(a, b)
    if disk:
        sizes = [path.stat().st_size for path in (tmp_path / "shared").glob("*.jsonl")]
        assert len(sizes) == 4 and max(sizes) > min(sizes), "each story has a file more, of what the fork adds"
        third = second.fork()  # of a fork, and its parents may go
        first.close(), second.close()
        del first, second
        gc.collect()
        assert_same(third.next_chunk(ways[1]), go_on(streamer_at(begin("again"), ways[1], 18), ways[1], 1)[0])


def streamer_at(streamer: Streamer, prompts, count: int) -> Streamer:
    """10 chunks of the usual prompts, and then these."""
    chunks_of(streamer, 10)
    for _ in range(count - 10):
        streamer.next_chunk(prompts)
    return streamer


def test_a_wrong_guess_costs_time_and_no_frame(model, tmp_path):  # noqa: F811
    """The prompts that are said to come never do."""
    whole = chunks_of(make(model, IN_MEMORY), 24)
    streamer, choice = on_disk(model, tmp_path, {}), random.Random(1)
    for index, want in enumerate(whole):
        words = [choice.choice(["a lake", "a wood", "a sea"]) for _ in range(2)]
        assert_same(streamer.next_chunk(prompts_of(index), words), want)


def test_a_slow_disk_changes_nothing(model, tmp_path, monkeypatch):  # noqa: F811
    whole = chunks_of(make(model, IN_MEMORY), 16)
    pause = threading.Event()
    for name in ("read", "write"):
        original = getattr(Segment, name)
        monkeypatch.setattr(Segment, name, lambda *a, original=original, **k: (pause.wait(0.01), original(*a, **k))[1])
    streamer = on_disk(model, tmp_path, {})
    for got, want in zip(upcoming(streamer, 16), whole, strict=True):
        assert_same(got, want)


def test_an_interrupted_chunk_is_made_again(model, tmp_path):  # noqa: F811
    """Ctrl-C anywhere in the bookkeeping of a store."""
    whole = chunks_of(make(model, IN_MEMORY), 14)
    streamer = on_disk(model, tmp_path, {})
    chunks_of(streamer, 12)
    state = streamer.state_dict()

    class Interrupted(BaseException):
        pass

    def run_until(line: int) -> bool:
        left = line

        def trace(frame, event, argument):
            nonlocal left
            name = frame.f_code.co_filename
            if "/cache/store.py" not in name and "/cache/history.py" not in name:
                return trace if "/memflow_ops/" in name or "/model/" in name else None
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
    while run_until(line):
        left = 14 - streamer.cache.committed
        for a, b in zip(chunks_of(streamer, left), whole[14 - left :], strict=False):
            assert_same(a, b)
        streamer.load_state_dict(state)
        line += 37
    assert line > 300


def test_the_folder_is_for_one_stream_at_a_time_and_for_kinds_with_a_history(model, tmp_path):  # noqa: F811
    first = on_disk(model, tmp_path, {})
    with pytest.raises(ValueError, match="holds the history of another stream of this process"):
        on_disk(model, tmp_path, {})
    first.close()
    with pytest.raises(ValueError, match="disk_frames=40 needs a history folder"):
        make(model, TIERS)
    without = on_disk(model, tmp_path / "none", {"memory": "sink"})
    assert without.history is None and not (tmp_path / "none").exists()
    without.close()


def test_stream_knows_the_prompts_that_come(model, tmp_path):  # noqa: F811
    prompts = [prompts_of(index // 4) for index in range(20)]
    folder = HistoryFolder(tmp_path)
    settings = settings_of(**TIERS)
    got = list(stream(model, prompts, settings, 4, encode=encode, history_dir=folder))
    in_memory = list(stream(model, prompts, settings_of(**IN_MEMORY), 4, encode=encode))
    for a, b in zip(got, in_memory, strict=True):
        assert_same(a, b)
