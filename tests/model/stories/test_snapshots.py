"""The folder of a run's snapshots after a process that was killed in the middle of a write."""

import os

import pytest

from memflow_ops.files import write_atomically
from memflow_ops.model.stories.snapshots import Snapshots


def begun(folder, resume=False):
    snapshots = Snapshots(folder)
    snapshots.begin({"prompts": ["a ball"]}, resume)
    return snapshots


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_run_that_was_killed_when_it_was_finished_is_tidied_up(tmp_path, monkeypatch):
    """Its snapshot, its history and the video that has grown are there, after what says that it is finished."""
    folder, video = tmp_path / "history", tmp_path / "video.mp4"
    snapshots = begun(folder)
    snapshots.save(lambda: {"done": 1, "stores": []})
    for name in ("history-0-0.bin", "history-0-0.jsonl"):
        (folder / name).touch()
    growing = tmp_path / "video.part.mp4"
    for path in (video, growing):
        path.touch()
    monkeypatch.setattr(Snapshots, "_delete", lambda _: None)
    snapshots.finish({"prompts": ["a ball"]})
    snapshots.close()
    monkeypatch.undo()
    assert names(folder) == {"run.json", "snapshot.safetensors", "history-0-0.bin", "history-0-0.jsonl"}

    again = begun(folder, resume=True)
    again.check_made([video])
    again.close()
    assert again.finished and names(folder) == {"run.json"} and names(tmp_path) == {"history", "video.mp4"}


def test_a_snapshot_is_whole_or_the_one_before(tmp_path, monkeypatch):
    snapshots = begun(tmp_path)
    snapshots.save(lambda: {"done": 1, "stores": []})

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            snapshots.save(lambda: {"done": 2, "stores": []})
    snapshots.close()
    again = begun(tmp_path, resume=True)
    assert again.found == {"done": 1, "stores": []}
    again.close()
    write_atomically(tmp_path / "snapshot.safetensors", b"half")
    with pytest.raises(ValueError, match="damaged"):
        begun(tmp_path, resume=True)
