"""A training run: the files that it writes, and what an interruption leaves."""

import json
import signal

import pytest
import torch

from memflow_ops.cli import main
from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.toy import train, trainer
from memflow_ops.model.toy.losses import (
    TrainingLosses,
)
from memflow_ops.model.toy.schedule import (
    TOY_CONFIG,
    TrainingStage,
)

SMALL = TrainingStage(steps=20, size=16, batch=2, shift=4.0, foreground=3.0)


def test_command_writes_weights_and_notes(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STAGES", (SMALL,))
    out = tmp_path / "w.safetensors"
    with pytest.raises(SystemExit) as end:
        main(["toy", "train", "--out", str(out), "--training-steps", "4", "--threads", str(torch.get_num_threads())])
    assert not end.value.code
    assert load_checkpoint(out).config == TOY_CONFIG
    notes = json.loads(out.with_suffix(".json").read_text())
    assert notes["settings"]["seed"] == 0 and notes["steps_done"] == 4 and notes["seconds"] > 0
    assert notes["loss"][-1]["denoising"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.json", "w.safetensors"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> bytes:
    """The weights of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "w.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "STAGES", (SMALL,))
        train.train(out, seed=5, steps=6, threads=torch.get_num_threads())
    return out.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_ctrl_c_and_the_same_command_again_equal_one_run(number, tmp_path, monkeypatch, capsys, whole_run):
    """Three steps are done when the run ends; what they learned is on disk, and the rest follows bit for bit."""
    out, losses, done = tmp_path / "halting.safetensors", trainer.training_losses, []

    def interrupted(*arguments: object) -> TrainingLosses:
        done.append(losses(*arguments))
        if len(done) == 3:
            signal.raise_signal(number)  # in the middle of a step
        return done[-1]

    monkeypatch.setattr(train, "STAGES", (SMALL,))
    monkeypatch.setattr(trainer, "training_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(out, seed=5, steps=6, threads=torch.get_num_threads())
    assert not out.exists() and out.with_suffix(".partial").is_file()
    monkeypatch.setattr(trainer, "training_losses", losses)
    train.train(out, seed=5, steps=6, threads=torch.get_num_threads())
    assert "continuing after step 3 of 6" in " ".join(capsys.readouterr().out.split())
    assert out.read_bytes() == whole_run
    assert not out.with_suffix(".partial").exists()
