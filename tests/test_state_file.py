"""States as files: what comes back, and what a flipped byte or a torn end does."""

import math
import random

import pytest
import torch
from safetensors import SafetensorError

from memflow_ops import state_file
from memflow_ops.journal import checked_line, read_journal
from memflow_ops.state_file import load_state, save_state


def same(a, b) -> bool:
    if isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(b, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_as_it_was(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    state = {
        "numbers": [1, 2.5, math.pi, True, None, "text é"],
        "by chunk": {3: base, 4: base},  # one memory under two names
        "views": (base[:, 2], base.t(), base[1:3].bfloat16()),
        "small": [torch.tensor(7), torch.empty(0), torch.ones(3, dtype=torch.int8), torch.tensor([True, False])],
        "empty": {"dict": {}, "list": []},
    }
    size = save_state(tmp_path / "state.safetensors", state)
    assert size == (tmp_path / "state.safetensors").stat().st_size
    assert same(load_state(tmp_path / "state.safetensors"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(3)})
    with pytest.raises(TypeError, match=r"a state holds tensors, .* got object"):
        save_state(path, {"a": torch.zeros(3), "b": object()})
    assert same(load_state(path), {"a": torch.ones(3)})


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.ones(3)})

    def full(tensors, target, about):
        target.write_bytes(b"a part")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state_file, "save_file", full)
    with pytest.raises(OSError, match=r"state.safetensors cannot be written: .* No space left on device"):
        save_state(path, {"a": torch.zeros(3)})
    assert same(load_state(path), {"a": torch.ones(3)}) and len(list(tmp_path.iterdir())) == 1


def test_any_flipped_bit_of_a_state_is_seen(tmp_path):
    path = tmp_path / "state.safetensors"
    save_state(path, {"a": torch.randn(5), "b": [torch.zeros(2, dtype=torch.int8), 17, "words"]})
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_state(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            # Blanks pad the header of safetensors to eight bytes; nothing else may change unseen.
            assert whole[place : place + 1] == b" " and same(loaded["b"][1:], [17, "words"])
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        load_state(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_state(tmp_path / "other")


def test_a_torn_end_is_left_out_and_a_damaged_middle_is_refused(tmp_path):
    path, bodies = tmp_path / "lines.jsonl", [{"frame": i, "name": "ü", "x": i / 3} for i in range(4)]
    lines = [checked_line(body) for body in bodies]
    whole = b"".join(lines)
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        count = sum(end >= sum(map(len, lines[: i + 1])) for i in range(4))
        found = read_journal(path)
        assert found.lines == bodies[:count] and found.whole_bytes == sum(map(len, lines[:count]))
        assert found.torn == (end > found.whole_bytes)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        path.write_bytes(damaged)
        last = len(whole) - len(lines[-1])
        if place >= last - 1:  # in the last line, or in the end of the one before, which then are one
            assert read_journal(path).lines == bodies[: 3 if place >= last else 2]
        else:
            with pytest.raises(ValueError, match=r"is damaged in line [123]: its checksum differs"):
                read_journal(path)
