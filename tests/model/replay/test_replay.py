"""Replaying the released MemFlow: fixtures made here by a straight-line model, and the authors' own if given."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from released_recording import Recording, record
from safetensors.torch import load_file, save_file

from memflow_ops.model.replay.replay import main

RECORDINGS = {
    "as-released": Recording(timesteps=(1000.0, 0.0)),
    "switch-inside": Recording(
        switch_chunk=10, chunks=12, timesteps=(1000.0, 937.5, 625.0, 0.0), seed=11, grid=(3, 10)
    ),
    "one-layer-three-heads": Recording(
        dim=60, num_heads=3, num_layers=1, text_len=5, freq_dim=32, bank_size=2, record_interval=2, chunks=9
    ),
    "dense-alone-other-window": Recording(
        modes=("dense",), sink_size=1, local_attn_size=6, bank_size=4, record_interval=1, frames_per_chunk=2, chunks=11
    ),
    "sma-alone-large-sink": Recording(modes=("sma",), sink_size=6, local_attn_size=9, bank_size=1, chunks=8, seed=5),
    "no-bank": Recording(bank_size=0, chunks=6, switch_chunk=0),
    "sink-only-chunk": Recording(chunks=1, timesteps=(0.0,), modes=("sma",)),
    "defaults": Recording(
        omit=("local_attn_size", "sink_size", "bank_size", "record_interval", "switch_chunk"), chunks=11, num_layers=1
    ),
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Fixtures by name, each made once."""
    made = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            made[name] = record(RECORDINGS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return make


def replay(paths: tuple[Path, Path], capsys) -> tuple[int, str, str]:
    code = main([str(path) for path in paths])
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", RECORDINGS)
def test_replays_what_an_independent_model_recorded(recorded, name, capsys):
    code, printed, _ = replay(recorded(name), capsys)
    assert code == 0, printed
    recording = RECORDINGS[name]
    calls = len(recording.modes) * recording.chunks * len(recording.timesteps)
    lines = printed.splitlines()
    assert len(lines) == calls + 2 and lines[-1].startswith(f"{calls} calls, all agree")
    choices = recording.num_layers * recording.num_heads * recording.chunks * len(recording.timesteps)
    choices *= "sma" in recording.modes
    compressed = max(0, recording.chunks - 1 - recording.bank_size * recording.record_interval)
    choices += compressed * recording.num_layers * len(recording.modes) * bool(recording.bank_size)
    assert lines[-1].endswith(f"{choices} of {choices} top-k choices the same")


def test_the_recordings_exercise_what_they_should(recorded):
    """Banks that really choose, and layers and heads that differ, or the test above would prove little."""
    calls = json.loads(recorded("as-released")[1].read_text())["sma"]
    kept = [tuple(map(tuple, (of[0] for of in call["topk"][:2]))) for call in calls if len(call["topk"]) == 4]
    assert len(kept) == 3 and any(a != b for a, b in kept)
    activated = [head for call in calls for layer in call["topk"][-2:] for head in layer[0]]
    assert {i for head in activated for i in head} == set(range(6))
    assert any(call["topk"][-1][0][0] != call["topk"][-1][0][1] for call in calls)


@pytest.mark.skipif("MEMFLOW_FIXTURES" not in os.environ, reason="MEMFLOW_FIXTURES names no folder of recorded outputs")
def test_replays_the_authors_outputs(capsys):
    folder = Path(os.environ["MEMFLOW_FIXTURES"])
    fixtures = sorted(folder.glob("*.safetensors"))
    assert fixtures
    for tensors in fixtures:
        code, printed, _ = replay((tensors, tensors.with_suffix(".json")), capsys)
        assert code == 0, printed


# ------------------------------------------------------------------------------------------------ what does not agree


class Tampered:
    """A copy of a fixture whose parts can be changed."""

    def __init__(self, paths: tuple[Path, Path], folder: Path):
        self.paths = folder / "t.safetensors", folder / "t.json"
        shutil.copy(paths[0], self.paths[0])
        self.json = json.loads(paths[1].read_text())
        self.write()

    def write(self) -> None:
        self.paths[1].write_text(json.dumps(self.json))

    def change(self, **tensors: torch.Tensor | None) -> None:
        """name=None removes a tensor."""
        known = load_file(self.paths[0])
        for name, tensor in tensors.items():
            known.pop(name, None)
            if tensor is not None:
                known[name] = tensor
        save_file(known, self.paths[0])


@pytest.fixture
def small(recorded, tmp_path) -> Tampered:
    return Tampered(recorded("one-layer-three-heads"), tmp_path)


def tensor_of(small: Tampered, name: str) -> torch.Tensor:
    return load_file(small.paths[0])[name]


@pytest.mark.parametrize("amount", [2e-4, float("nan")])
def test_one_number_that_differs_is_exit_code_1(small, capsys, amount):
    out = tensor_of(small, "sma.out.03.1")
    out[3, 2, 1, 0] += amount
    small.change(**{"sma.out.03.1": out})
    code, printed, _ = replay(small.paths, capsys)
    assert code == 1
    differing = [line for line in printed.splitlines() if "differs" in line]
    assert len(differing) == 1 and differing[0].split()[:3] == ["sma", "3", "1"]
    assert "1 do not agree" in printed


def test_a_mean_that_differs_is_exit_code_1(small, capsys):
    """The sample is a small part of the outputs; mean and standard deviation are of all of them."""
    small.json["dense"][4]["y_std"] += 2e-4
    small.write()
    assert replay(small.paths, capsys)[0] == 1


def test_weights_that_differ_are_exit_code_1(small, capsys):
    name = "weights.blocks.0.self_attn.norm_k.weight"
    small.change(**{name: 1.01 * tensor_of(small, name)})
    assert replay(small.paths, capsys)[0] == 1


@pytest.mark.parametrize("layer", [0, -1], ids=["bank", "head"])
def test_another_choice_is_exit_code_1(small, capsys, layer):
    call = next(call for call in small.json["sma"] if call["chunk"] == 5 and call["step"] == 0)
    choice = call["topk"][layer][0]
    if layer == 0:
        choice[:] = [1 - choice[0]]
    else:
        choice[0][-1] = next(i for i in range(5) if i not in choice[0])
    small.write()
    code, printed, _ = replay(small.paths, capsys)
    assert code == 1 and ("layer 0, bank: recorded frames" if layer == 0 else "layer 0, head 0: recorded") in printed


def test_choices_are_compared_as_frames_best_first(recorded, tmp_path, capsys):
    """A frame that is in the sink and in the bank may be named by either index; the order is part of the choice."""
    tampered = Tampered(recorded("as-released"), tmp_path)
    first = next(c for c in tampered.json["sma"] if c["chunk"] == 1 and c["step"] == 0)
    assert any({0, 3} & set(head) for head in first["topk"][0][0]), "frame 0 is sink frame 0 and bank slot 0"
    for head in first["topk"][0][0]:
        head[:] = [{0: 3, 3: 0}.get(i, i) for i in head]
    tampered.write()
    assert replay(tampered.paths, capsys)[0] == 0
    late = next(c for c in tampered.json["sma"] if c["chunk"] == 9 and c["step"] == 1)
    late["topk"][0][0][0].reverse()
    tampered.write()
    code, printed, _ = replay(tampered.paths, capsys)
    assert code == 1 and "layer 0, head 0" in printed


def test_the_wrong_switch_is_exit_code_1(recorded, tmp_path, capsys):
    tampered = Tampered(recorded("switch-inside"), tmp_path)
    tampered.json["switch_chunk"] = 9
    tampered.write()
    code, printed, _ = replay(tampered.paths, capsys)
    assert code == 1
    assert all(line.split()[1] in ("9", "10", "11") for line in printed.splitlines() if "differs" in line)


# --------------------------------------------------------------------------------------------- what cannot be replayed


@pytest.mark.parametrize(
    "name",
    [
        "context",
        "noise_check.04",
        "sma.out.08.2",
        "weights.head.modulation",
        "weights.blocks.0.self_attn.q.weight",
    ],
)
def test_a_missing_tensor_is_named(small, capsys, name):
    small.change(**{name: None})
    code, _, errors = replay(small.paths, capsys)
    assert code == 2 and name.removeprefix("weights.") in errors and "missing" in errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "config must be an object, got None"),
        ({"config.dim": 61}, "dim must be num_heads times an even number"),
        ({"config.dim": 48}, "has shape (60,), expected (48,)"),
        ({"config.dim": "60"}, "dim must be a whole number from 1 to 1048576, got '60'"),
        ({"config.num_layers": 10**6}, "num_layers is 1000000, but the weights have 1 blocks"),
        ({"config.local_attn_size": 5}, "at least a chunk of 3 frames beside sink_size=3, got 5"),
        ({"config.in_dim": 20}, "in_dim must equal out_dim, got 20 and 16"),
        ({"config.model_type": "i2v"}, "model_type must be 't2v', got 'i2v'"),
        ({"config.text_len": 3}, "context must be (up to 3, 7), got (4, 7)"),
        ({"tokens_per_frame": 49}, "no grid of tokens_per_frame=49"),
        ({"noise_seed": 99}, "differs by"),
        ({"noise_seed": 2**70}, f"from 0 to {2**63 - 1}, got {2**70}"),
        ({"timesteps": []}, "timesteps must be a list, got []"),
        ({"timesteps": [1000.0, 400.0, 0.0]}, "timestep is 500.0, but timesteps[1] 400.0"),
        ({"text_tokens": 3}, "text_tokens is 3, but context has 4 rows"),
        ({"switch_chunk": 2}, "context_after_switch is missing"),
        ({"sma": [], "dense": []}, "nothing to replay"),
        ({"sma": "calls"}, "sma must be a list, got 'calls'"),
    ],
    ids=str,
)
def test_a_contradiction_is_named_before_anything_runs(small, capsys, changes, message):
    for name, value in changes.items():
        holder, _, key = name.rpartition(".")
        (small.json[holder] if holder else small.json)[key] = value
    small.write()
    code, printed, errors = replay(small.paths, capsys)
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert "e-0" not in printed, "a call was made"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda calls: calls.pop(4), "dense: chunk 1, step 1 is missing"),
        (lambda calls: calls.append(calls[0]), "chunk 0, step 0 is there twice"),
        (lambda calls: calls[0].update(step=7), "step 7 has no place among 3 timesteps"),
        (lambda calls: calls[15].update(topk=[]), "dense, chunk 5, step 0: topk must hold 1 choices, got 0"),
        (lambda calls: calls[15].update(topk=[[[2]]]), "different entries from 0 to 1, got [[2]]"),
        (lambda calls: calls[1].update(y_mean=None), "y_mean must be a finite number, got None"),
        (lambda calls: calls.insert(0, 3), "dense[0] must be an object, got 3"),
    ],
    ids=["missing", "twice", "step", "topk-missing", "topk-range", "mean", "no-object"],
)
def test_a_malformed_call_is_named(small, capsys, edit, message):
    edit(small.json["dense"])
    small.write()
    code, _, errors = replay(small.paths, capsys)
    assert code == 2 and message in errors


def test_broken_files_are_named(small, tmp_path, capsys):
    tensors, description = small.paths
    whole = tensors.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"{}"):
        tensors.write_bytes(content)
        code, _, errors = replay(small.paths, capsys)
        assert code == 2 and "t.safetensors is not a safetensors file" in errors
    tensors.write_bytes(whole)
    deep = b"[" * 100_000
    for content, message in ((b"{", "not JSON"), (b"\xff", "not JSON"), (deep, "not JSON"), (b"[]", "got a list")):
        description.write_bytes(content)
        code, _, errors = replay(small.paths, capsys)
        assert code == 2 and message in errors
    small.write()
    for missing in (tensors, description):
        missing.unlink()
        code, _, errors = replay(small.paths, capsys)
        assert code == 2 and f"cannot read {missing}" in errors


def test_a_wrong_command_line_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
