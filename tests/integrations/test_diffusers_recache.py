"""Re-caching at a prompt switch: the window then holds what it would, had its frames been made under the new prompt."""

import copy

import pytest
import torch

from memflow_ops.integrations.diffusers import attach_memory

HEIGHT, WIDTH = 4, 6
SIZES = {"height": HEIGHT, "width": WIDTH, "window_frames": 9, "bank_frames": 2, "device_frames": 8, "block_size": 4}
ALONE = {**SIZES, "sink_frames": 0, "bank_frames": 0, "device_frames": 0}
OLD, NEW = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
LATENTS = torch.randn(6, 2, 16, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model(transformer):
    return copy.deepcopy(transformer)


@torch.no_grad()
def chunk(model, memory, number, text, **switch):
    """A chunk's noisy pass; its clean pass leaves its keys."""
    batch = memory.layout.batch
    memory.begin_chunk(text[:batch], **switch)
    out = model(LATENTS[number, :batch], torch.full((batch,), 700.0), text[:batch]).sample
    with memory.clean():
        model(LATENTS[number, :batch], torch.zeros(batch), text[:batch])
    memory.commit()
    return out


@pytest.mark.parametrize("before", [1, 2, 4])
def test_the_window_is_as_if_made_under_the_new_prompt(model, before):
    """Without sink and bank, outputs depend on how far frames are apart: another video begins with the same frames."""
    memory = attach_memory(model, **ALONE)
    for number in range(before):
        chunk(model, memory, number, OLD)
    kept = range(max(0, before - 2), before)
    past = torch.cat([LATENTS[number, :1] for number in range(before)], 2)
    assert memory.recached_frames == 3 * len(kept)
    switched = copy.deepcopy(memory.state_dict())
    got = chunk(model, memory, before, NEW, recache=past)
    later = chunk(model, memory, before - 1, NEW)  # the re-cached keys stay
    memory.load_state_dict(switched)
    assert (chunk(model, memory, before, NEW) - got).abs().max() > 1e-3, "without re-caching it is another chunk"
    memory.reset()
    for number in kept:
        chunk(model, memory, number, NEW)
    assert (chunk(model, memory, before, NEW) - got).abs().max() <= 2e-5
    assert (chunk(model, memory, before - 1, NEW) - later).abs().max() <= 2e-5


def test_a_story_whose_prompt_stays_is_not_written_again(model):
    memory = attach_memory(model, **SIZES, batch=2)
    for number in range(4):
        chunk(model, memory, number, OLD)
    state, past = copy.deepcopy(memory.state_dict()), torch.cat(list(LATENTS[2:4]), 2)
    texts = torch.cat([NEW[:1], OLD[1:]])
    plain = chunk(model, memory, 4, texts)
    memory.load_state_dict(state)
    got = chunk(model, memory, 4, texts, recache=past, switched=[True, False])
    assert (got - plain)[0].abs().max() > 1e-3
    assert (got - plain)[1].abs().max() <= 1e-5
    memory.load_state_dict(state)
    assert (chunk(model, memory, 4, texts, recache=past) - plain)[1].abs().max() > 0


def test_what_does_not_fit_is_refused_and_a_failure_is_given_up(model):
    memory = attach_memory(model, **SIZES)
    for number in range(3):
        chunk(model, memory, number, OLD)
    past = torch.cat([LATENTS[number, :1] for number in range(3)], 2)
    for bad, said in (
        ({"recache": past[:, :, :5]}, r"at least the newest 6 finished frames, \(1, channels, 6, 4, 6\)"),
        ({"recache": past[0]}, "at least the newest 6"),
        ({"recache": past[..., :4]}, "at least the newest 6"),
        ({"recache": past, "switched": [True, False]}, "switched must have 1 entries"),
    ):
        with pytest.raises(ValueError, match=said):
            memory.begin_chunk(NEW[:1], **bad)
    state = memory.state_dict()

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        memory.begin_chunk(NEW[:1], recache=past)
    hook.remove()
    assert not memory.is_open
    again = chunk(model, memory, 3, NEW, recache=past)
    memory.load_state_dict(state)
    assert torch.equal(chunk(model, memory, 3, NEW, recache=past), again)
