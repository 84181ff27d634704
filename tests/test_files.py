"""Files: a temporary name for each process, and a lock that one process holds at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memflow_ops.files import check_target, locked, locked_folders, write_atomically


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


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    abandoned, running = (tmp_path / f".video.mp4.{number}.tmp" for number in (ended.pid, os.getpid()))
    others = [tmp_path / name for name in (f"video.{ended.pid}.tmp", ".notes.tmp", f".video.mp4.{ended.pid}")]
    for path in (abandoned, running, *others):
        path.touch()
    with locked_folders([tmp_path]):
        assert not abandoned.exists()
    assert all(path.exists() for path in (running, *others))


def test_a_link_stays_one_and_its_target_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "current.json"
    link.symlink_to("disk/real.json")
    for content in (b"first", b"second"):
        check_target(link, ".json")
        write_atomically(link, content)
        assert link.is_symlink() and (tmp_path / "disk" / "real.json").read_bytes() == content
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.json"]


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    path = tmp_path / "private.json"
    path.touch()
    path.chmod(0o640)
    write_atomically(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_longest_name_is_written_and_a_longer_one_refused_beforehand(tmp_path):
    longest = tmp_path / ("é" * 125 + ".json")
    check_target(longest, ".json")
    with locked(longest):
        write_atomically(longest, b"content")
    assert [path.name for path in tmp_path.iterdir()] == [longest.name] and longest.read_bytes() == b"content"
    for path in (tmp_path / ("y" * 251 + ".json"), tmp_path / ("y" * 256) / "a.json"):
        with pytest.raises(ValueError, match=r"has 256 bytes, and a file system takes 255: choose a shorter one"):
            check_target(path, ".json")


def test_what_is_no_file_is_no_target(tmp_path):
    (tmp_path / "a.json").symlink_to("b.json")
    (tmp_path / "b.json").symlink_to("a.json")
    with pytest.raises(ValueError, match="leads to itself"):
        check_target(tmp_path / "a.json", ".json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="which is no file"):
        check_target(tmp_path / "pipe.json", ".json")
