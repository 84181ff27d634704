"""The trainer learns, repeats with its seed, and continues bit for bit from a state that is its own."""

from dataclasses import replace

import pytest
import torch

from memflow_ops.model.toy import train
from memflow_ops.model.toy.schedule import (
    TOY_CONFIG,
    TrainingSettings,
    TrainingStage,
)
from memflow_ops.model.toy.trainer import Trainer

SMALL = TrainingStage(steps=20, size=16, batch=2, shift=4.0, foreground=3.0)


def test_twenty_steps_lower_the_loss_and_resume_bit_for_bit(tmp_path):
    whole = Trainer(TrainingSettings(seed=3, stages=(SMALL,)))
    losses = [whole.step().denoising for _ in range(20)]
    assert losses[-1] < 0.9 * losses[0]  # a running mean with a memory of 50 steps: the drop itself is larger

    begun = Trainer(TrainingSettings(seed=3, stages=(SMALL,)))
    assert [begun.step().denoising for _ in range(7)] == losses[:7]
    begun.save(tmp_path / "state")
    resumed = Trainer(TrainingSettings(seed=3, stages=(SMALL,)))
    assert resumed.load(tmp_path / "state") == resumed.machine()
    assert [resumed.step().denoising for _ in range(13)] == losses[7:]
    assert resumed.curve == whole.curve and resumed.steps_done == 20
    for of in (lambda t: t.model.state_dict(), lambda t: t.average.weights):
        assert all(torch.equal(tensor, of(resumed)[name]) for name, tensor in of(whole).items())

    other = Trainer(TrainingSettings(seed=4, stages=(SMALL,)))
    assert other.step().denoising != losses[0]


def test_a_state_of_another_run_is_refused(tmp_path):
    Trainer(TrainingSettings(seed=3, stages=(SMALL,))).save(tmp_path / "state")
    with pytest.raises(ValueError, match="another settings: seed differ"):
        Trainer(TrainingSettings(seed=4, stages=(SMALL,))).load(tmp_path / "state")
    wider = replace(TOY_CONFIG, ffn_dim=128)
    with pytest.raises(ValueError, match="another model: ffn_dim differ"):
        Trainer(TrainingSettings(seed=3, stages=(SMALL,)), wider).load(tmp_path / "state")
    torch.save([1, 2], tmp_path / "list")
    (tmp_path / "bytes").write_bytes(b"nothing")
    (tmp_path / "empty").touch()
    for name in ("list", "bytes", "empty"):
        with pytest.raises(ValueError, match=f"{name} is no training state of ours; delete it, or"):
            Trainer(TrainingSettings(seed=3, stages=(SMALL,))).load(tmp_path / name)
    state = torch.load(tmp_path / "state", weights_only=True)
    whole = (tmp_path / "state").read_bytes()
    (tmp_path / "flipped").write_bytes(whole[: len(whole) // 3] + b"\xff" * 100 + whole[len(whole) // 3 + 100 :])
    with pytest.raises(ValueError, match="flipped is no training state of ours"):
        Trainer(TrainingSettings(seed=3, stages=(SMALL,))).load(tmp_path / "flipped")
    torch.save({name: value for name, value in state.items() if name != "machine"}, tmp_path / "old")
    with pytest.raises(ValueError, match="old is damaged"):
        Trainer(TrainingSettings(seed=3, stages=(SMALL,))).load(tmp_path / "old")
    torch.save(state | {"model": {}}, tmp_path / "state")
    with pytest.raises(ValueError, match="state is damaged; delete it, or"):
        Trainer(TrainingSettings(seed=3, stages=(SMALL,))).load(tmp_path / "state")
    with pytest.raises(ValueError, match=r"a \.safetensors file, got .*w\.partial"):
        train.train(tmp_path / "w.partial", steps=1)
    with pytest.raises(ValueError, match=r"cannot write to the folder .*empty/deep: .*empty is a file"):
        train.train(tmp_path / "empty" / "deep" / "w.safetensors", steps=1)


def test_a_loss_that_is_not_finite_ends_the_training():
    trainer = Trainer(TrainingSettings(seed=3, stages=(SMALL,)))
    trainer.model.state_dict()["head.head.weight"].fill_(torch.nan)
    with pytest.raises(ValueError, match="loss of step 1 is not finite"):
        trainer.step()
