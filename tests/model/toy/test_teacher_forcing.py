"""Teacher forcing: rows remember only what a stream could remember, and see nothing else."""

import pytest
import torch
import torch.nn.functional as F

from memflow_ops.model.streaming.inputs import pixel_coordinates
from memflow_ops.model.toy import language
from memflow_ops.model.toy.language import NOBODY
from memflow_ops.model.toy.losses import (
    CHUNKS,
    draw_batch,
)
from memflow_ops.model.toy.schedule import (
    TOY_CONFIG,
)
from memflow_ops.model.toy.teacher_forcing import CHUNK_FRAMES, TeacherForcedAttention, draw_training_memory
from memflow_ops.model.wan.transformer import CausalVideoModel
from memflow_ops.rotary import apply_rotation, rope_rotation


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


def test_memory_repeats_with_its_generator():
    shows = torch.rand(4, 6, NOBODY, generator=torch.Generator().manual_seed(5)) < 0.3
    one, two = (draw_training_memory(shows, torch.Generator().manual_seed(6)) for _ in range(2))
    assert torch.equal(one.frame, two.frame) and torch.equal(one.distance, two.distance)


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
