"""Training: it learns, repeats with its seed, and remembers in training only what a stream could remember."""

import json
import signal
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from memflow_ops.cli import main
from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.streaming.inputs import pixel_coordinates
from memflow_ops.model.toy import language, train, trainer
from memflow_ops.model.toy.language import NOBODY
from memflow_ops.model.toy.losses import (
    CHUNKS,
    TrainingBatch,
    TrainingLosses,
    draw_batch,
    relevance_loss,
    training_losses,
)
from memflow_ops.model.toy.schedule import (
    HELD_OUT_SEED,
    STAGES,
    TOTAL_STEPS,
    TOY_CONFIG,
    TrainingSettings,
    TrainingStage,
    scaled_stages,
)
from memflow_ops.model.toy.teacher_forcing import CHUNK_FRAMES, TeacherForcedAttention, draw_training_memory
from memflow_ops.model.toy.trainer import Trainer
from memflow_ops.model.wan.transformer import CausalVideoModel
from memflow_ops.rotary import apply_rotation, rope_rotation

SMALL = TrainingStage(steps=20, size=16, batch=2, shift=4.0, foreground=3.0)


@pytest.fixture(scope="module")
def batch() -> TrainingBatch:
    return draw_batch(12, 16, torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("seed", [-1, HELD_OUT_SEED, 123_456])
def test_held_out_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="held out for evaluation"):
        TrainingSettings(seed=seed)


def test_command_writes_weights_and_notes(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "STAGES", (SMALL,))
    out = tmp_path / "w.safetensors"
    with pytest.raises(SystemExit) as end:
        main(["toy", "train", "--out", str(out), "--steps", "4", "--threads", str(torch.get_num_threads())])
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


def test_stages_scale_to_any_number_of_steps():
    stages = scaled_stages(STAGES, TOTAL_STEPS)
    assert stages == STAGES
    assert sum(stage.steps for stage in scaled_stages(STAGES, 1001)) == 1001
    assert sum(stage.steps for stage in scaled_stages(STAGES, 1)) == 1
    with pytest.raises(ValueError, match="at least 1"):
        scaled_stages(STAGES, 0)


def named(ids: torch.Tensor) -> torch.Tensor:
    """(R, 3) -> whom each row names (R, characters)."""
    return (ids[:, :2, None] == torch.arange(NOBODY)).any(1)


def test_memory_is_what_a_stream_could_remember(batch):
    """No frame twice, none from the window or the future, and no stranger in the role of who is named."""
    memory, shows = batch.memory, named(batch.ids)
    chunk_of = memory.frame // CHUNK_FRAMES
    rows = torch.arange(len(shows))[:, None]
    clip, chunk = rows // CHUNKS, rows % CHUNKS
    own = (chunk_of // CHUNKS == clip) & memory.valid
    foreign = (chunk_of // CHUNKS != clip) & memory.valid
    assert own.any() and foreign.any()
    assert (chunk_of % CHUNKS <= chunk - 2)[own].all()
    assert not (shows[chunk_of] & shows[:, None]).any(-1)[foreign].any()
    assert not memory.valid[::CHUNKS].any()  # a first chunk has no past
    for frames, valid in zip(memory.frame, memory.valid, strict=True):
        assert len(frames[valid].unique()) == valid.sum()
    sink, bank = memory.frame[:, :3], memory.frame[:, 3:]
    assert (sink % (CHUNKS * CHUNK_FRAMES) == torch.arange(3))[memory.valid[:, :3]].all()
    assert (bank % CHUNK_FRAMES == 0).all()  # prototypes


def test_distances_reach_far_and_are_never_in_the_window(batch):
    distance = batch.memory.distance[batch.memory.valid]
    assert distance.min() >= 4  # the sink's last frame, two chunks back
    assert distance.max() > 200


def test_returns_are_frequent_and_pairs_find_both():
    batch = draw_batch(200, 16, torch.Generator().manual_seed(1))
    shows, memory = named(batch.ids), batch.memory
    remembered = shows[memory.frame // CHUNK_FRAMES] & memory.valid[..., None]  # (R, M, characters)
    in_past = torch.arange(len(shows)) % CHUNKS > 0
    fresh = shows & ~shows.roll(1, 0) & in_past[:, None]  # comes in this chunk
    back = fresh & remembered.any(1)
    assert back.any(1).float().mean() > 0.1
    assert (fresh & remembered[:, 3:].any(1) & ~remembered[:, :3].any(1)).any(
        1
    ).float().mean() > 0.05  # not in the sink
    both = fresh.sum(1) == 2
    assert (back.sum(1)[both] == 2).float().mean() > 0.2


@pytest.mark.parametrize("top_k", [None, 4], ids=["dense", "top4"])
def test_attention_equals_a_masked_dense_one(batch, top_k):
    """Row by row, from the keys that the plan names, with the selection spelled out."""
    rows, tokens, heads, head_dim, block = len(batch.ids), 16, 2, 12, 4
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2 * rows, CHUNK_FRAMES * tokens, heads, head_dim, generator=generator)
    attention = TeacherForcedAttention(batch.memory, CHUNKS, (4, 4), head_dim, top_k=top_k)
    out = attention(0, q, k, v)

    def rotated(x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(4) * 2  # half resolution: tokens stand twice as far apart
        turn = rope_rotation(head_dim, frames, positions, positions)
        return apply_rotation(x[None], *turn)[0]

    here = torch.arange(3)
    for stream_index, row in ((0, 5), (1, 5), (1, 13), (1, 16), (0, 30), (1, 31)):
        index = stream_index * rows + row
        query = rotated(q[index], here)
        for head in range(heads):
            keys, values = [rotated(k[index], here)[:, head]], [v[index][:, head]]
            if row % CHUNKS:
                keys.append(rotated(k[row - 1], here - 3)[:, head])
                values.append(v[row - 1][:, head])
            blocks = []
            remembered = (of[row] for of in (batch.memory.frame, batch.memory.distance, batch.memory.valid))
            for frame, distance, valid in zip(*remembered, strict=True):
                if valid:
                    source, inside = divmod(int(frame), CHUNK_FRAMES)
                    part = slice(inside * tokens, (inside + 1) * tokens)
                    frame_keys = rotated(k[source][part], -distance[None])[:, head]
                    blocks += list(zip(frame_keys.split(block), v[source][part][:, head].split(block), strict=True))
            if top_k is not None:
                mean_query = query[:, head].mean(0)
                blocks = sorted(blocks, key=lambda pair: -(pair[0].mean(0) @ mean_query).item())[:top_k]
            keys += [pair[0] for pair in blocks]
            values += [pair[1] for pair in blocks]
            expected = F.scaled_dot_product_attention(
                query[None, :, head].double(), torch.cat(keys)[None].double(), torch.cat(values)[None].double()
            )[0]
            torch.testing.assert_close(out[index, :, head].double(), expected, atol=1e-5, rtol=0)


def test_noisy_rows_do_not_leak_into_others(batch):
    """The answer to one row's noise depends on no other row's noise, nor on its own clean chunk."""
    model = CausalVideoModel(TOY_CONFIG).eval()
    rows = len(batch.ids)
    x = torch.randn(2 * rows, 3, CHUNK_FRAMES, 16, 16, generator=torch.Generator().manual_seed(3))
    encoded = model.encode_text(language.embed_ids(batch.ids.repeat(2, 1)))
    t = torch.cat([torch.zeros(rows), torch.full((rows,), 700.0)])[:, None].expand(-1, CHUNK_FRAMES)

    @torch.no_grad()
    def answer(x: torch.Tensor) -> torch.Tensor:
        attention = TeacherForcedAttention(batch.memory, CHUNKS, (4, 4), 32, top_k=4)
        return model(x, t, encoded, attention, pixel_coordinates(CHUNK_FRAMES, 16, 16))

    before = answer(x)
    # A clean chunk at the end of its clip that no other clip remembers is seen by nobody but itself.
    remembered = set((batch.memory.frame[batch.memory.valid] // CHUNK_FRAMES).tolist())
    last = next(row for row in range(CHUNKS - 1, rows, CHUNKS) if row not in remembered)
    changed = x.clone()
    changed[rows + 10] += 1
    changed[last] += 1
    touched = (answer(changed) - before).abs().amax((1, 2, 3, 4)) > 1e-5
    assert touched.nonzero().flatten().tolist() == [last, rows + 10]


def test_relevance_loss_by_hand():
    """Two frames, one prompt naming whom the first shows: softplus of the wrong score minus the right one."""
    means = [torch.zeros(2, 2, 4)]
    means[0][0, :, 0], means[0][1, :, 0] = 1.0, 3.0
    keys = torch.zeros(2, 3, 2, 4)
    keys[:, 1:, :, 0] = 2.0  # the place prefers no frame
    ids = torch.tensor([[0, NOBODY, 1], [NOBODY, NOBODY, 2]])
    scores = torch.tensor([1.0, 3.0]) * 2.0 / 4**0.5  # mean over heads of q . k / sqrt(4)
    got = relevance_loss(means, [(keys, keys)], ids)
    torch.testing.assert_close(got, F.softplus(scores[1] - scores[0]))

    keys[:, 0, :, 0] = 2.0  # now it prefers the second: the variance is on top
    torch.testing.assert_close(relevance_loss(means, [(keys, keys)], ids) - got, scores.var())

    # The second word asks for its own character: the frame of the other is wrong for it, although it is named too.
    keys[:, 0] = 0.0
    pair = torch.tensor([[0, 1, 1], [1, NOBODY, 2]])
    means[0][0, :, 0], means[0][1, :, 0] = 3.0, 1.0
    right = relevance_loss(means, [(keys, keys)], pair)
    asked = [scores[1] - scores[0]]  # row 1, its character is in both frames: nothing to tell apart; row 0, word 0
    torch.testing.assert_close(right, F.softplus(-torch.stack(asked)).mean())


def test_relevance_loss_reaches_the_self_attention_keys(batch):
    model = CausalVideoModel(TOY_CONFIG)
    losses = training_losses(model, batch, SMALL, TrainingSettings(), torch.Generator().manual_seed(4))
    losses.relevance.backward()
    for block in model.blocks:
        assert block.self_attn.k.weight.grad.abs().max() > 0
        assert block.cross_attn.k.weight.grad.abs().max() > 0


def test_memory_repeats_with_its_generator():
    shows = torch.rand(4, 6, NOBODY, generator=torch.Generator().manual_seed(5)) < 0.3
    one, two = (draw_training_memory(shows, torch.Generator().manual_seed(6)) for _ in range(2))
    assert torch.equal(one.frame, two.frame) and torch.equal(one.distance, two.distance)
