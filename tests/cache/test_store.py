"""Prototypes on disk: what is written comes back to the bit, and what is damaged is named in one sentence."""

import copy
import errno
import os
import random
import subprocess
import sys

import pytest
import torch
from frame_lists import Naive, add_chunk, check_candidates, check_memory, layout_of, run_chunks

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.segment import PAGE, StoreError
from memflow_ops.cache.store import FrameStore, HistoryFolder

SMALL = {"device_frames": 5, "host_frames": 3, "disk_frames": 200, "sink_frames": 1}


def make(folder, **changes) -> tuple[FrameCache, Naive]:
    layout = layout_of(**{**SMALL, **changes})
    return FrameCache(layout, history=folder), Naive(layout)


def run_at_random(cache, naive, chunks, seed=0) -> None:
    """Random banks of all that is remembered; every frame of them is compared with what was written."""
    choice = random.Random(seed)
    for _ in range(chunks):
        chosen = [choice.sample(frames, min(3, len(frames))) for frames in cache.candidate_frames()]
        cache.set_bank(chosen)
        first = add_chunk(cache, naive)
        check_memory(cache, naive, first + cache.layout.chunk_frames - cache.layout.window_frames)
        cache.commit()


@pytest.mark.parametrize("host_frames", [0, 1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_frame_comes_back_as_it_was_written(tmp_path, host_frames, batch):
    cache, naive = make(HistoryFolder(tmp_path), host_frames=host_frames, batch=batch)
    run_at_random(cache, naive, 60)
    assert cache.candidate_frames()[0] == list(range(3, 3 * 59, 3)), "nothing is forgotten"
    check_candidates(cache, naive)
    for story in cache._stories:
        in_host = [p for p in story.history.values() if p.host]
        assert len(in_host) <= host_frames and len(in_host) + len(story.free_host) <= host_frames + 1
        assert sum(p.slot is not None for p in story.history.values()) == 5
        assert all((p.slot is None) or not p.host for p in story.history.values())
    assert cache.disk_reads()[1] > 50, "most frames were on disk alone"


def test_beyond_all_tiers_the_oldest_is_forgotten(tmp_path):
    layout = layout_of(**{**SMALL, "disk_frames": 4})
    cache, naive = FrameCache(layout, history=HistoryFolder(tmp_path)), Naive(layout)
    in_memory = FrameCache(layout_of(**{**SMALL, "disk_frames": 0, "host_frames": 7}))
    choice = random.Random(0)
    for _ in range(40):
        assert cache.candidate_frames() == in_memory.candidate_frames()
        chosen = [choice.sample(frames, min(3, len(frames))) for frames in cache.candidate_frames()]
        for one in (cache, in_memory):
            one.set_bank(chosen)
        torch.manual_seed(len(naive.first[0]))
        first = add_chunk(cache, naive)
        check_memory(cache, naive, first - 3)
        torch.manual_seed(len(naive.first[0]))
        add_chunk(in_memory, Naive(in_memory.layout))
        cache.commit(), in_memory.commit()
    assert len(cache.candidate_frames()[0]) == 11


def test_records_are_whole_pages_and_a_manifest_names_them(tmp_path):
    cache, naive = make(HistoryFolder(tmp_path))
    run_chunks(cache, naive, 9)
    cache.state_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".folder.lock",
        "history-0-0.bin",
        "history-0-0.jsonl",
    ]
    text = (tmp_path / "history-0-0.jsonl").read_text()
    assert text.count("\n") == 9 and '"frame": 24' in text and '"name": "descriptors"' in text
    assert (tmp_path / "history-0-0.bin").stat().st_size % PAGE == 0
    cache.close()
    assert (tmp_path / "history-0-0.bin").stat().st_size == 8 * PAGE, "what was allocated ahead is given back"
    assert not (tmp_path / ".folder.lock").exists()


def test_a_history_is_opened_again_by_another_process(tmp_path):
    cache, naive = make(HistoryFolder(tmp_path))
    run_at_random(cache, naive, 30)
    state = cache.state_dict()
    assert state["pools"][0].shape[2] == 7, "sink and window alone: the history is named"
    cache.close()
    again, _ = make(HistoryFolder(tmp_path))
    again._keys.fill_(torch.nan), again._means.fill_(torch.nan)
    again.load_state_dict(state)
    check_candidates(again, naive)
    run_at_random(again, naive, 30, seed=1)
    assert len(list(tmp_path.glob("*.bin"))) == 1, "it went on in the same file"


def test_after_going_back_nothing_that_was_written_is_lost(tmp_path):
    """Each way on has a file of its own from where they part."""
    cache, naive = make(HistoryFolder(tmp_path))
    run_at_random(cache, naive, 20)
    early = cache.state_dict(), dict(naive.first[0]), dict(naive.now[0])
    run_at_random(cache, naive, 10)
    late = cache.state_dict(), dict(naive.first[0]), dict(naive.now[0])
    for state, first, now in (early, late, early):
        naive.first, naive.now = [dict(first)], [dict(now)]
        cache.load_state_dict(state)
        run_at_random(cache, naive, 10, seed=3)
        check_candidates(cache, naive)


def test_what_is_expected_is_read_before_and_never_instead(tmp_path):
    cache, naive = make(HistoryFolder(tmp_path), host_frames=0)
    run_chunks(cache, naive, 30)
    story = cache._stories[0]
    expected, asked = [3, 6, 9], [6, 12, 9]
    assert cache.reads_ahead()
    story.expect(expected)
    cache.set_bank([asked])
    first = add_chunk(cache, naive)
    check_memory(cache, naive, first - 3)
    assert cache.disk_reads() == (2, 1)
    cache.commit()
    for _ in range(40):  # whatever is expected, room for it is bounded
        story.expect(random.sample(cache.candidate_frames()[0], 3))
        run_at_random(cache, naive, 1, seed=_)
    store = story.store
    assert len(store._free) + len(store._staged) + len(store._dropped) + len(store._writing) <= 2 + 3 + 1


# ------------------------------------------------------------------------------------------------------ what goes wrong


def written(tmp_path, chunks=12):
    """A folder with a history, closed, its state, and what was written."""
    cache, naive = make(HistoryFolder(tmp_path))
    run_chunks(cache, naive, chunks)
    state = cache.state_dict()
    cache.close()
    return state, naive


def loaded(tmp_path, state, **changes) -> FrameCache:
    cache, _ = make(HistoryFolder(tmp_path), **changes)
    cache.load_state_dict(state)
    return cache


def refused(tmp_path, state, words, **changes) -> None:
    cache, _ = make(HistoryFolder(tmp_path), **changes)
    with pytest.raises(StoreError, match=words) as error:
        cache.load_state_dict(state)
        cache.set_bank([cache.candidate_frames()[0][:3]])
    cache.close()
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_flipped_byte_is_named(tmp_path):
    state, _ = written(tmp_path)
    path = tmp_path / "history-0-0.bin"
    whole = path.read_bytes()
    for place in (0, 100, PAGE + 300, 3 * PAGE - 1):  # means, keys, padding too
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        refused(tmp_path, state, r"damaged in record \d, frame \d+: its checksum differs")
    path.write_bytes(whole)
    loaded(tmp_path, state).close()


def test_a_missing_or_short_file_is_named(tmp_path):
    state, _ = written(tmp_path)
    for name, words in (("history-0-0.bin", "is missing"), ("history-0-0.jsonl", "is missing")):
        (tmp_path / name).rename(tmp_path / "away")
        refused(tmp_path, state, f"{name} {words}")
        (tmp_path / "away").rename(tmp_path / name)
    whole = (tmp_path / "history-0-0.bin").read_bytes()
    (tmp_path / "history-0-0.bin").write_bytes(whole[:-1])
    refused(tmp_path, state, "is cut short: its manifest names 11 records")
    (tmp_path / "history-0-0.bin").write_bytes(whole)
    lines = (tmp_path / "history-0-0.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "history-0-0.jsonl").write_bytes(
        b"".join([*lines[:3], lines[3].replace(b"frame", b"grape"), *lines[4:]])
    )
    refused(tmp_path, state, "is damaged in line 4")
    (tmp_path / "history-0-0.jsonl").write_bytes(b"".join(lines[:-1]))
    refused(tmp_path, state, "has 10 records, and the state that is loaded needs 11")


def test_a_torn_tail_is_dropped_with_a_word(tmp_path):
    cache, naive = make(HistoryFolder(tmp_path))
    run_chunks(cache, naive, 12)
    state = cache.state_dict()
    run_chunks(cache, naive, 1)
    cache.close()
    path = tmp_path / "history-0-0.jsonl"
    path.write_bytes(path.read_bytes()[:-7])
    folder = HistoryFolder(tmp_path)
    again, _ = make(folder)
    again.load_state_dict(state)
    assert len(folder.notes) == 1 and "the last line was torn, its record is dropped" in folder.notes[0]
    naive.first = [{frame: of for frame, of in naive.first[0].items() if frame < 36}]
    naive.now = [{frame: of for frame, of in naive.now[0].items() if frame < 36}]
    run_at_random(again, naive, 10)


def test_a_history_of_another_cache_or_run_is_refused(tmp_path):
    state, _ = written(tmp_path / "a")
    other, _ = written(tmp_path / "b")
    (tmp_path / "b" / "history-0-0.bin").rename(tmp_path / "a" / "history-0-0.bin")
    (tmp_path / "b" / "history-0-0.jsonl").rename(tmp_path / "a" / "history-0-0.jsonl")
    refused(tmp_path / "a", state, "is of another run than the state")
    cache, _ = make(HistoryFolder(tmp_path / "a"), host_frames=2)
    with pytest.raises(ValueError, match="a cache with host_frames=3, here 2"):
        cache.load_state_dict(other)
    cache.close()
    fitting = {**other, "layout": {**other["layout"], "host_frames": 2}}
    refused(tmp_path / "a", fitting, "history of another cache: host_frames=3, here 2", host_frames=2)
    with pytest.raises(ValueError, match="holds its history in a history folder, which this cache has not"):
        FrameCache(layout_of(**{**SMALL, "disk_frames": 0})).load_state_dict(
            {**other, "layout": {**other["layout"], "disk_frames": 0}}
        )
    with pytest.raises(ValueError, match="disk_frames=200 needs a history folder"):
        FrameCache(layout_of(**SMALL))


def test_a_full_disk_is_named_and_what_is_written_stays(tmp_path, monkeypatch):
    state, naive = written(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = loaded(tmp_path, state)
    with monkeypatch.context() as patched, pytest.raises(StoreError, match=f"the disk of {tmp_path} is full"):
        patched.setattr(os, "posix_fallocate", full)
        run_chunks(cache, naive, 4)
    with pytest.raises(StoreError, match="is full"):
        cache.abort()
        cache.state_dict()
    cache.close()
    loaded(tmp_path, state)


def test_a_disk_that_fills_up_in_a_manifest_line(tmp_path, monkeypatch):
    """The line is torn, and the next process drops it."""
    state, naive = written(tmp_path)
    cache, write = loaded(tmp_path, state), os.write

    def short(number, content):
        if number != cache._stories[0].store._own._manifest:
            return write(number, content)
        if len(content) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(number, content[: len(content) - 9])

    with monkeypatch.context() as patched, pytest.raises(StoreError, match="is full"):
        patched.setattr(os, "write", short)
        run_chunks(cache, naive, 4)
    cache.close()
    folder = HistoryFolder(tmp_path)
    again, _ = make(folder)
    again.load_state_dict(state)
    assert "torn" in folder.notes[0]


def test_a_second_user_of_a_folder_gets_one_line(tmp_path):
    cache, naive = make(HistoryFolder(tmp_path))
    run_chunks(cache, naive, 3)
    program = f"from memflow_ops.cache.store import HistoryFolder; HistoryFolder({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert f"InUse: another process is writing to the folder {tmp_path}" in done.stderr
    own = tmp_path / "below" / ".."
    (tmp_path / "below").mkdir()
    with pytest.raises(ValueError, match="holds the history of another stream of this process: close that one"):
        HistoryFolder(own)
    cache.close()
    HistoryFolder(tmp_path).close()


def test_a_cache_that_is_gone_gives_up_its_folder(tmp_path):
    cache, _ = make(HistoryFolder(tmp_path))
    del cache
    HistoryFolder(tmp_path).close()


def test_an_interrupted_write_is_written_again(tmp_path, monkeypatch):
    """Ctrl-C while a frame is appended: the commit is completed, and the frame is there once for all that ask."""
    cache, naive = make(HistoryFolder(tmp_path))
    run_chunks(cache, naive, 5)
    append = FrameStore.append

    def interrupted(store, frame, tensors):
        append(store, frame, tensors)
        del store._index[frame]  # as if it had come before the last line
        raise KeyboardInterrupt

    monkeypatch.setattr(FrameStore, "append", interrupted)
    add_chunk(cache, naive)
    with pytest.raises(KeyboardInterrupt):
        cache.commit()
    monkeypatch.undo()
    cache.abort()
    run_at_random(cache, naive, 20)
    state = cache.state_dict()
    cache.close()
    again = loaded(tmp_path, state)
    check_candidates(again, naive)
    run_at_random(again, naive, 20)


def test_a_copy_is_refused(tmp_path):
    cache, _ = make(HistoryFolder(tmp_path))
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(cache)
