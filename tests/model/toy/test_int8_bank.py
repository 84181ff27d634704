"""An int8 bank under the toy's trained weights: the keys that they make are kept well, and a stream stays the same."""

from dataclasses import replace

import pytest
import torch

from memflow_ops import memory_attention, quantise_memory, select_blocks
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
from memflow_ops.model.toy.language import embed_prompts
from memflow_ops.model.toy.settings import TOY_SETTINGS

PROMPTS = ["the ball in the meadow"] * 3 + ["empty night"] * 4 + ["the ball in the desert"] * 2


@pytest.fixture(scope="module")
def streams():
    """Nine chunks with each kind of bank: the last chunk, and per layer the last queries and bank that were seen."""
    model, found = load_model(TOY_WEIGHTS, torch.device("cpu")), {}
    for kind in (None, "int8"):
        seen = {}

        def observe(layer, q, memory, seen=seen):
            # The table is overwritten at the commit; the frames that it names stay where they are.
            seen[layer] = q.clone(), memory._replace(slots=memory.slots.clone(), frames=memory.frames.clone())

        settings = replace(TOY_SETTINGS, steps=2, bank_dtype=kind, device_frames=10)
        streamer = Streamer(model, 1, settings, 3, encode=embed_prompts, observe=observe)
        for prompt in PROMPTS:
            chunk = streamer.next_chunk([prompt])
        found[kind] = chunk, seen, streamer.cache.layout
    return found


def test_attention_to_toy_keys_is_off_by_less_than_a_percent_and_selects_the_same(streams):
    _, seen, layout = streams[None]
    sizes = dict(block_size=layout.block_size, frame_tokens=layout.frame_tokens)
    assert len(seen) == layout.layers
    for layer, (q, memory) in seen.items():
        assert int(memory.frames) == 6
        where = dict(memory_slots=memory.slots, memory_frames=memory.frames, query_group=16)
        bank = memory.keys, memory.values
        used = memory.slots[0].long()
        stored = [x.unflatten(1, (-1, layout.frame_tokens))[:, used].flatten(1, 2) for x in bank]
        described = memory.descriptors.unflatten(1, (-1, layout.blocks_per_frame))[:, used].flatten(1, 2)
        int8 = quantise_memory(*stored, described, **sizes)
        nothing = q[:, :0]
        exact = memory_attention(
            q, nothing, nothing, *bank, memory_descriptors=memory.descriptors, top_k=8, **where, **sizes
        )
        out = memory_attention(
            q, nothing, nothing, **int8._asdict(), memory_descriptors=described, top_k=8, query_group=16, **sizes
        )
        error = float((out - exact).norm() / exact.norm())
        assert 1e-5 < error < 0.01, (layer, error)
        chosen = select_blocks(q, memory.descriptors, 8, **where, **sizes)
        assert torch.equal(select_blocks(q, described, 8, query_group=16, **sizes), chosen)


def test_a_stream_retrieves_the_same_frames_and_draws_nearly_the_same(streams):
    (exact, *_), (int8, seen, _) = streams[None], streams["int8"]
    assert seen[0][1].keys.dtype == torch.int8
    assert int8.retrieved == exact.retrieved and int8.candidates == exact.candidates
    difference = float((int8.frames - exact.frames).norm() / exact.frames.norm())
    assert 0 < difference < 0.1, difference
