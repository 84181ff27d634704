"""Gradients through an open chunk are those of plain attention over the concatenated keys of past and chunk."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from memflow_ops.cache import CacheLayout, FrameCache
from memflow_ops.integrations.diffusers import attach_memory
from memflow_ops.ops.attention import memory_attention
from memflow_ops.rotary import apply_rotation, rope_rotation

HEIGHT, WIDTH, GRID, TOKENS = 4, 6, (2, 3), 6
SIZES = {
    "window_frames": 6, "sink_frames": 3, "bank_frames": 2, "device_frames": 4, "top_k": 1000, "block_size": 4,
}  # fmt: skip
TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
LATENTS = torch.randn(9, 1, 16, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
PAST_CHUNKS = 6


class ExplicitAttention:
    """Attention of one layer over the keys of given past frames, which are kept without gradients, and of a chunk."""

    def __init__(self):
        self.frames = {}  # frame -> rotated keys and values
        self.past, self.first, self.keep = [], 0, False

    def __call__(self, attn, x, *_):
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (y.unflatten(2, (attn.heads, -1)) for y in (q, k, v))
        rotation = rope_rotation(12, torch.arange(self.first, self.first + 3), *map(torch.arange, GRID))
        q, k = apply_rotation(q, *rotation), apply_rotation(k, *rotation)
        if self.keep:
            for i in range(3):
                tokens = slice(i * TOKENS, (i + 1) * TOKENS)
                self.frames[self.first + i] = k[:, tokens].detach(), v[:, tokens].detach()
        keys, values = (
            torch.cat([*(self.frames[frame][i] for frame in self.past), own], 1) for i, own in enumerate((k, v))
        )
        out = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, keys, values))).transpose(1, 2)
        return attn.to_out[0](out.flatten(2))


def attended(chunk, retrieved):
    """The frames before a chunk that it attends to: window, sink, and what has been retrieved."""
    window = range(max(0, chunk * 3 - 3), chunk * 3)
    return sorted({*window, *range(min(3, chunk * 3)), *retrieved})


def explicit_model(model):
    model = copy.deepcopy(model)
    layers = [ExplicitAttention() for _ in model.blocks]
    for block, layer in zip(model.blocks, layers, strict=True):
        block.attn1.set_processor(layer)

    def tell(chunk, retrieved, keep):
        for layer in layers:
            layer.first, layer.past, layer.keep = chunk * 3, attended(chunk, retrieved), keep

    return model, tell


def stream_past(model, memory, reference, tell):
    """Streams the chunks of the past through both models without gradients."""
    with torch.no_grad():
        for chunk in range(PAST_CHUNKS):
            retrieved = memory.begin_chunk(TEXT).frames[0]
            tell(chunk, retrieved, keep=True)
            with memory.clean():
                got = model(LATENTS[chunk], torch.zeros(1), TEXT).sample
            assert (got - reference(LATENTS[chunk], torch.zeros(1), TEXT).sample).abs().max() <= 1e-4
            memory.commit()


def assert_same_gradients(model, reference):
    expected = {name: p.grad for name, p in reference.named_parameters() if p.requires_grad}
    assert any(".attn1.to_k" in name for name in expected)
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if expected[name] is None:
            assert p.grad is None, name
        else:
            assert (p.grad - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max() + 1e-7, name


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("checkpointing", ["none", "block by block", "reentrant"])
def test_gradients_are_those_of_plain_attention_over_concatenated_keys(transformer, checkpointing, lora):
    """Also when the backward pass comes after the commit, with another chunk begun and written."""
    model = copy.deepcopy(transformer)
    if lora:
        peft = pytest.importorskip("peft")
        targets = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
        model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    reference, tell = explicit_model(model)
    model.train()
    if checkpointing == "block by block":
        model.enable_gradient_checkpointing()
    elif checkpointing == "reentrant":
        model.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))
    memory = attach_memory(model, height=HEIGHT, width=WIDTH, **SIZES)
    stream_past(model, memory, reference, tell)

    retrieved = memory.begin_chunk(TEXT).frames[0]
    assert retrieved
    tell(PAST_CHUNKS, retrieved, keep=False)
    x = LATENTS[PAST_CHUNKS].clone().requires_grad_(checkpointing == "reentrant")  # reentrant: or nothing is trained
    loss = model(x, torch.tensor([600.0]), TEXT).sample.square().sum()
    with memory.clean(), torch.no_grad():
        model(LATENTS[PAST_CHUNKS], torch.zeros(1), TEXT)
    memory.commit()
    memory.begin_chunk(TEXT)
    with torch.no_grad():
        model(LATENTS[PAST_CHUNKS + 1], torch.tensor([600.0]), TEXT)
    kept = [tensor.clone() for tensor in memory.cache.window(1)]
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, memory.cache.window(1), strict=True))

    reference(LATENTS[PAST_CHUNKS], torch.tensor([600.0]), TEXT).sample.square().sum().backward()
    assert_same_gradients(model, reference)


def test_clean_passes_with_gradients_leave_the_cache_that_passes_without_leave(transformer):
    model = copy.deepcopy(transformer).train()
    model.enable_gradient_checkpointing()
    memory = attach_memory(model, height=HEIGHT, width=WIDTH, **SIZES)
    states = []
    for grad in (False, True):
        memory.reset()
        with torch.set_grad_enabled(grad):
            for latents in LATENTS[:4]:
                memory.begin_chunk(TEXT)
                with memory.clean():
                    out = model(latents, torch.zeros(1), TEXT).sample
                if grad:
                    out.sum().backward()
                memory.commit()
        states.append(memory.state_dict()["cache"])
    for name in ("pools", "means"):
        for a, b in zip(states[0][name], states[1][name], strict=True):
            assert (a - b).abs().max() <= 1e-5, name


def test_what_the_backward_pass_cannot_compute_again_is_refused(transformer):
    model = copy.deepcopy(transformer).train()
    memory = attach_memory(model, height=HEIGHT, width=WIDTH, **SIZES)
    memory.begin_chunk(TEXT)
    whole = checkpoint(lambda x: model(x, torch.zeros(1), TEXT).sample, LATENTS[0], use_reentrant=False)
    with pytest.raises(RuntimeError, match="enable_gradient_checkpointing"):
        whole.sum().backward()
    model.enable_gradient_checkpointing()
    loss = model(LATENTS[0], torch.zeros(1), TEXT).sample.sum()
    with pytest.raises(RuntimeError, match="detach: the backward pass"):
        memory.detach()
    loss.backward()
    memory.detach()


def test_a_pass_without_memory_stays_one_when_it_is_computed_again_in_an_open_chunk(transformer):
    model = copy.deepcopy(transformer).train()
    model.enable_gradient_checkpointing()
    memory = attach_memory(model, height=HEIGHT, width=WIDTH, **SIZES)
    with torch.no_grad():
        memory.begin_chunk(TEXT)
        with memory.clean():
            model(LATENTS[0], torch.zeros(1), TEXT)
        memory.commit()
    loss = model(LATENTS[1], torch.zeros(1), TEXT).sample.square().sum()
    memory.begin_chunk(TEXT)
    loss.backward()
    reference = copy.deepcopy(transformer)
    reference(LATENTS[1], torch.zeros(1), TEXT).sample.square().sum().backward()
    assert_same_gradients(model, reference)


@pytest.mark.parametrize("learns", ["q", "k", "v"])
def test_a_cache_written_by_hand_keeps_the_passs_own_keys_and_values_in_the_graph(learns):
    layout = CacheLayout(1, 1, 4, 2, 8, window_frames=6, sink_frames=3, bank_frames=1, device_frames=2, block_size=4)
    cache = FrameCache(layout)
    frames = {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        first = cache.begin_chunk()
        q, k, v = torch.randn(3, 1, 12, 2, 8, generator=generator).unbind()
        cache.write(0, k, v)
        cache.remember(0, k)
        cache.commit()
        frames |= {first + i: (k[:, 4 * i : 4 * i + 4], v[:, 4 * i : 4 * i + 4]) for i in range(3)}
    first = cache.begin_chunk()
    q, k, v = torch.randn(3, 1, 12, 2, 8, generator=generator).unbind()
    own = {"q": q, "k": k, "v": v}
    own[learns].requires_grad_()
    rotation = rope_rotation(8, torch.zeros(3), torch.zeros(2), torch.zeros(2))  # turns nothing
    rotated = cache.write_projections(0, q, k, v, rotation)
    memory = cache.memory(0)
    out = memory_attention(
        rotated, *cache.window(0), memory.keys, memory.values, memory_descriptors=memory.descriptors, top_k=100,
        block_size=4, frame_tokens=4, memory_frames=memory.frames, memory_slots=memory.slots,
    )  # fmt: skip
    cache.write(0, k.detach() * 0, v.detach() * 0)
    cache.remember(0, k)
    cache.commit()
    (got,) = torch.autograd.grad(out.square().sum(), own[learns])

    past = [*range(first - 3, first), 0, 1, 2]
    keys, values = (torch.cat([*(frames[f][i] for f in past), x], 1) for i, x in enumerate((k, v)))
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values))).transpose(1, 2)
    (expected,) = torch.autograd.grad(plain.square().sum(), own[learns])
    assert (out - plain).abs().max() <= 1e-5
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
