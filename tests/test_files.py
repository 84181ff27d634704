"""Files: a temporary name for each process, and a lock that one process holds at a time."""

import os
from pathlib import Path

import pytest

from memflow_ops.files import locked, write_atomically


def test_two_processes_do_not_share_a_temporary_name(tmp_path, monkeypatch):
    names = []
    replace_with = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: names.append(path.name) or replace_with(path, target))
    for number in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        write_atomically(tmp_path / "bench.json", b"{}")
        write_atomically(tmp_path / "report.html", b"words")
    assert len(set(names)) == 4 and sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "report.html"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.json"
    write_atomically(path, b"old")

    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new, half of it")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_writer_is_refused_while_the_first_is_inside(tmp_path):
    path = tmp_path / "deep" / "bench.json"
    with locked(path):
        with pytest.raises(ValueError, match=r"another process is writing .*bench\.json"), locked(path, wait=False):
            pytest.fail("two writers were inside")
        with locked(path.with_name("other.json"), wait=False):
            pass
    with locked(path, wait=False):
        pass
    assert list(path.parent.iterdir()) == []


def test_the_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), locked(tmp_path / "bench.json"):
        raise RuntimeError("a write failed")
    with locked(tmp_path / "bench.json", wait=False):
        pass
