"""Diffusers' transformer with our processor streams what our own model does with the same weights and noise."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from memflow_ops.integrations.diffusers import WanMemoryProcessor, attach_memory
from memflow_ops.model.checkpoints.pretrained import read_pretrained
from memflow_ops.model.streaming.sampler import FlowMatchSampler
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer

HEIGHT, WIDTH, TEXT_LEN = 4, 6, 8
SETTINGS = StreamSettings(
    height=HEIGHT, width=WIDTH, window_frames=6, sink_frames=3, bank_frames=2, device_frames=4, host_frames=9, top_k=3,
    block_size=4, query_group=5, score="moments", recache=False, steps=2, shift=5.0,
)  # fmt: skip
SIZES = (
    "window_frames",
    "sink_frames",
    "bank_frames",
    "device_frames",
    "host_frames",
    "top_k",
    "block_size",
    "query_group",
    "score",
    "positions",
    "reselect",
    "token_order",
)
PROMPTS = [("a", "b"), ("c", "b"), ("c", "d"), ("a", "a"), ("b", "c"), ("a", "b"), ("d", "c")]


def encode(prompts):
    """A random embedding for every letter; the further on in the alphabet, the longer."""
    out = torch.zeros(len(prompts), TEXT_LEN, 32)
    for row, prompt in zip(out, prompts, strict=True):
        length = ord(prompt) - ord("a") + 3
        row[:length] = torch.randn(length, 32, generator=torch.Generator().manual_seed(length))
    return out


@pytest.fixture
def theirs(transformer):
    return copy.deepcopy(transformer)


@torch.no_grad()
@pytest.mark.parametrize("recache", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"reselect": "chunk", "token_order": "strips"}, {"positions": "bounded"}],
    ids=["plain", "kept-strips", "bounded"],
)
def test_streams_what_our_model_streams(theirs, pipeline, recache, changes):
    settings = replace(SETTINGS, recache=recache, **changes)
    ours = Streamer(read_pretrained(pipeline, text_len=TEXT_LEN).build(), 2, settings, [3, 8], encode=encode)
    sizes = {name: getattr(settings, name) for name in SIZES}
    memory = attach_memory(theirs, height=HEIGHT, width=WIDTH, batch=2, **sizes)
    sampler = FlowMatchSampler(SETTINGS.steps, SETTINGS.shift)
    remembered, before, switch, x = False, PROMPTS[0], {}, torch.empty(0)
    for index, prompts in enumerate(PROMPTS):
        expected, text = ours.next_chunk(prompts), encode(prompts)
        if recache and prompts != before:
            switch = {"recache": x, "switched": [old != new for old, new in zip(before, prompts, strict=True)]}
        retrieved = memory.begin_chunk(text, **switch)
        before, switch = prompts, {}
        assert retrieved.frames == expected.retrieved
        remembered |= any(retrieved.frames)
        seeds = [int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) for seed in (3, 8)]
        noise = (torch.randn(16, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in seeds)
        x = torch.stack(list(noise))
        for i, sigma in enumerate(sampler.sigmas[:-1]):
            y = theirs(x, torch.full((2,), 1000 * sigma), text).sample
            x = sampler.step(x, sampler.denoised(x, y, sigma), i)
        with memory.clean():
            theirs(x, torch.zeros(2), text)
        memory.commit()
        assert (x - expected.frames).abs().max() <= 1e-4 * x.abs().max(), index
    assert remembered


@torch.no_grad()
def test_first_chunk_and_what_lies_between_chunks_are_as_without_memory(theirs, transformer):
    x, t, text = torch.randn(1, 16, 3, HEIGHT, WIDTH), torch.tensor([400.0]), encode(["b"])
    expected = transformer(x, t, text).sample
    memory = attach_memory(theirs, height=HEIGHT, width=WIDTH, block_size=4)
    assert torch.equal(theirs(x, t, text).sample, expected)
    memory.begin_chunk(text)
    assert (theirs(x, t, text).sample - expected).abs().max() <= 1e-4
    with memory.clean():
        theirs(x, torch.zeros(1), text)
    memory.commit()
    memory.begin_chunk(text)
    later = theirs(x, t, text).sample
    assert (later - expected).abs().max() > 1e-2
    for block in theirs.blocks:
        block.attn1.fuse_projections()
    assert (theirs(x, t, text).sample - later).abs().max() <= 1e-4
    memory.detach()
    assert not any(isinstance(block.attn1.processor, WanMemoryProcessor) for block in theirs.blocks)
    assert torch.equal(theirs(x, t, text).sample, expected)


@torch.no_grad()
def test_text_length_decides_what_counts_as_padding(theirs):
    kept = {}
    for lengths in (None, [5], [2]):
        memory = attach_memory(theirs, height=HEIGHT, width=WIDTH, window_frames=3, bank_frames=1, block_size=4)
        torch.manual_seed(1)
        text, scores = encode(["c"]), []
        for _ in range(5):
            scores += memory.begin_chunk(text, lengths).scores
            with memory.clean():
                theirs(torch.randn(1, 16, 3, HEIGHT, WIDTH), torch.zeros(1), text)
            memory.commit()
        memory.detach()
        kept[str(lengths)] = scores
    assert kept["None"] == kept["[5]"] != kept["[2]"]


def test_what_does_not_fit_is_refused(theirs):
    for sizes, message in (({"height": 5}, "do not divide"), ({"window_frames": 4}, "multiple of chunk_frames")):
        with pytest.raises(ValueError, match=message):
            attach_memory(theirs, **{"height": HEIGHT, "width": WIDTH, **sizes})
    assert not any(isinstance(block.attn1.processor, WanMemoryProcessor) for block in theirs.blocks)
    memory = attach_memory(theirs, height=HEIGHT, width=WIDTH)
    with pytest.raises(RuntimeError, match="begin_chunk"), memory.clean():
        pass
    memory.begin_chunk(encode(["a"]))
    with pytest.raises(ValueError, match="chunk tokens"), torch.no_grad():
        theirs(torch.randn(1, 16, 2, HEIGHT, WIDTH), torch.zeros(1), encode(["a"]))
