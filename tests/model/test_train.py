"""Training: it learns, repeats with its seed, and remembers in training only what a stream could remember."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from memflow_ops.model import text, train, world
from memflow_ops.model.checkpoints import load_checkpoint
from memflow_ops.model.teacher_forcing import CHUNK_FRAMES, TeacherForcedAttention, plan_memory, relevance_loss
from memflow_ops.model.train import CHUNKS, Settings, Stage, draw_batch, run, scaled_stages
from memflow_ops.model.transformer import CausalVideoModel, apply_rotation, rope_rotation

SMALL = Stage(steps=20, size=16, batch=2, shift=4.0, foreground=3.0)


@pytest.fixture(scope="module")
def batch() -> train.Batch:
    return draw_batch(12, 16, Settings(recached_share=0.5), torch.Generator().manual_seed(0))


def test_twenty_steps_lower_the_loss_and_repeat():
    settings = Settings(seed=3, stages=(SMALL,))
    losses: list[list[float]] = [[], []]
    weights = []
    for attempt in losses:
        model, curve = run(settings, report=lambda progress, kept=attempt: kept.append(progress.denoising))
        weights.append(model.state_dict())
        assert curve[-1]["step"] == 20
    assert losses[0] == losses[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses[0][-1] < 0.9 * losses[0][0]  # a running mean with a memory of 50 steps: the drop itself is larger

    other, _ = run(Settings(seed=4, stages=(Stage(1, 16, 2, 4.0),)))
    assert not torch.equal(other.state_dict()["head.head.weight"], weights[0]["head.head.weight"])


def test_ctrl_c_keeps_what_was_learned():
    def interrupt(progress: train.Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    short, _ = run(Settings(seed=3, stages=(SMALL,)), report=interrupt)
    initial = CausalVideoModel(train.TOY_CONFIG)
    assert short.state_dict().keys() == initial.state_dict().keys()
    assert all(torch.isfinite(tensor).all() for tensor in short.state_dict().values())


def test_command_writes_weights_and_notes(tmp_path):
    out = tmp_path / "w.safetensors"
    command = [sys.executable, "-m", "memflow_ops.model.train", "--out", out, "--steps", "4", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(out).config == train.TOY_CONFIG
    notes = json.loads(out.with_suffix(".json").read_text())
    assert notes["settings"]["seed"] == 0 and notes["steps_done"] == 4 and notes["seconds"] > 0
    assert notes["loss"][-1]["denoising"] > 0


def test_stages_scale_to_any_number_of_steps():
    stages = scaled_stages(train.STAGES, train.TOTAL_STEPS)
    assert stages == train.STAGES
    assert sum(stage.steps for stage in scaled_stages(train.STAGES, 1001)) == 1001
    assert sum(stage.steps for stage in scaled_stages(train.STAGES, 1)) == 1
    with pytest.raises(ValueError, match="at least 1"):
        scaled_stages(train.STAGES, 0)


def test_memory_is_what_a_stream_could_remember(batch):
    """No frame twice, none from the window or the future, none re-cached, and no stranger in the named role."""
    plan, who = batch.plan, batch.who
    chunk_of = plan.frame // CHUNK_FRAMES
    rows = torch.arange(len(who))[:, None]
    clip, chunk = rows // CHUNKS, rows % CHUNKS
    own = (chunk_of // CHUNKS == clip) & plan.valid
    foreign = (chunk_of // CHUNKS != clip) & plan.valid
    assert own.any() and foreign.any()
    assert (chunk_of % CHUNKS <= chunk - 2)[own].all()
    assert (who[chunk_of] != who[:, None])[foreign].all()
    assert batch.usable[chunk_of][plan.valid].all()
    assert not plan.valid[::CHUNKS].any()  # a first chunk has no past
    for frames, valid in zip(plan.frame, plan.valid, strict=True):
        assert len(frames[valid].unique()) == valid.sum()
    sink, bank = plan.frame[:, :3], plan.frame[:, 3:]
    assert (sink % (CHUNKS * CHUNK_FRAMES) == torch.arange(3))[plan.valid[:, :3]].all()
    assert (bank % CHUNK_FRAMES == 0).all()  # prototypes


def test_distances_reach_far_and_are_never_in_the_window(batch):
    distance = batch.plan.distance[batch.plan.valid]
    assert distance.min() >= 4  # the sink's last frame, two chunks back
    assert distance.max() > 200


def test_returns_are_frequent():
    batch = draw_batch(200, 16, Settings(), torch.Generator().manual_seed(1))
    who, plan = batch.who, batch.plan
    shown = (who[plan.frame // CHUNK_FRAMES] == who[:, None]) & plan.valid
    fresh = (torch.arange(len(who)) % CHUNKS > 0) & (who != who.roll(1)) & (who < world.EMPTY_INDEX)
    assert (fresh & shown.any(1)).float().mean() > 0.1
    assert (fresh & shown[:, 3:].any(1) & ~shown[:, :3].any(1)).float().mean() > 0.05  # not to be had from the sink


@pytest.mark.parametrize("top_k", [None, 4], ids=["dense", "top4"])
def test_attention_equals_a_masked_dense_one(batch, top_k):
    """Row by row, from the keys that the plan names, with the selection spelled out."""
    rows, tokens, heads, head_dim, block = len(batch.who), 16, 2, 12, 4
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2 * rows, CHUNK_FRAMES * tokens, heads, head_dim, generator=generator)
    recached = ~batch.usable
    attention = TeacherForcedAttention(batch.plan, CHUNKS, (4, 4), head_dim, recached=recached, top_k=top_k)
    out = attention(0, q, k, v)
    late_recached = int((recached & (torch.arange(rows) % CHUNKS > 1)).nonzero()[0])

    def rotated(x: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(4) * 2  # half resolution: tokens stand twice as far apart
        turn = rope_rotation(head_dim, frames, positions, positions)
        return apply_rotation(x[None], *turn)[0]

    here = torch.arange(3)
    for stream_index, row in (
        (0, 5),
        (1, 5),
        (1, 13),
        (1, 16),
        (0, 30),
        (1, 31),
        (0, late_recached),
        (1, late_recached),
    ):
        index = stream_index * rows + row
        query = rotated(q[index], here)
        for head in range(heads):
            keys, values = [rotated(k[index], here)[:, head]], [v[index][:, head]]
            if row % CHUNKS and not (stream_index == 0 and recached[row]):  # re-caching starts from an empty window
                keys.append(rotated(k[row - 1], here - 3)[:, head])
                values.append(v[row - 1][:, head])
            blocks = []
            remembered = (of[row] for of in (batch.plan.frame, batch.plan.distance, batch.plan.valid))
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
    model = CausalVideoModel(train.TOY_CONFIG).eval()
    rows = len(batch.who)
    x = torch.randn(2 * rows, 3, CHUNK_FRAMES, 16, 16, generator=torch.Generator().manual_seed(3))
    encoded = model.encode_text(text.embed_ids(torch.cat([batch.clean_ids, batch.ids])))
    t = torch.cat([torch.zeros(rows), torch.full((rows,), 700.0)])[:, None].expand(-1, CHUNK_FRAMES)

    @torch.no_grad()
    def answer(x: torch.Tensor) -> torch.Tensor:
        attention = TeacherForcedAttention(batch.plan, CHUNKS, (4, 4), 32, top_k=4)
        return model(x, t, encoded, attention, world.coordinates(CHUNK_FRAMES, 16, 16))

    before = answer(x)
    # A clean chunk at the end of its clip that no other clip remembers is seen by nobody but itself.
    remembered = set((batch.plan.frame[batch.plan.valid] // CHUNK_FRAMES).tolist())
    last = next(row for row in range(CHUNKS - 1, rows, CHUNKS) if row not in remembered)
    changed = x.clone()
    changed[rows + 10] += 1
    changed[last] += 1
    touched = (answer(changed) - before).abs().amax((1, 2, 3, 4)) > 1e-5
    assert touched.nonzero().flatten().tolist() == [last, rows + 10]


def test_relevance_loss_by_hand():
    """Two frames, one prompt naming the first: softplus of the wrong score minus the right one."""
    means = [torch.zeros(2, 2, 4)]
    means[0][0, :, 0], means[0][1, :, 0] = 1.0, 3.0
    keys = torch.zeros(2, 2, 2, 4)
    keys[..., 0] = 2.0
    who = torch.tensor([0, world.EMPTY_INDEX])
    scores = torch.tensor([1.0, 3.0]) * 2.0 / 4**0.5  # mean over heads and words of q . k / sqrt(4)
    expected = F.softplus(scores[1] - scores[0])
    got = relevance_loss(means, [(keys, keys)], who, torch.tensor([True, True]))
    torch.testing.assert_close(got, expected)
    assert relevance_loss(means, [(keys, keys)], who, torch.tensor([False, True])) == 0


def test_relevance_loss_reaches_the_self_attention_keys(batch):
    model = CausalVideoModel(train.TOY_CONFIG)
    losses = train.training_losses(model, batch, SMALL, Settings(), torch.Generator().manual_seed(4))
    losses.relevance.backward()
    for block in model.blocks:
        assert block.self_attn.k.weight.grad.abs().max() > 0
        assert block.cross_attn.k.weight.grad.abs().max() > 0


def test_plan_repeats_with_its_generator():
    who = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(5))
    recached = torch.zeros(4, 6, dtype=torch.bool)
    one, two = (plan_memory(who, recached, torch.Generator().manual_seed(6)) for _ in range(2))
    assert torch.equal(one.frame, two.frame) and torch.equal(one.distance, two.distance)
