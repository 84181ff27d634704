"""The life of an attached memory: what follows a failure, several memories, a saved state, and what is refused."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from memflow_ops.integrations.diffusers import WanMemoryProcessor, attach_memory

HEIGHT, WIDTH = 4, 6
SIZES = {"height": HEIGHT, "width": WIDTH, "window_frames": 6, "bank_frames": 2, "device_frames": 4, "block_size": 4}
TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
LATENTS = torch.randn(9, 1, 16, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
ZERO = torch.zeros(1)


@pytest.fixture
def model(transformer):
    return copy.deepcopy(transformer)


@torch.no_grad()
def stream(model, memory, chunks):
    outs = []
    for chunk in chunks:
        memory.begin_chunk(TEXT)
        outs.append(model(LATENTS[chunk], torch.tensor([700.0]), TEXT).sample)
        with memory.clean():
            model(LATENTS[chunk], ZERO, TEXT)
        memory.commit()
    return torch.stack(outs)


@pytest.mark.parametrize("sizes", [{}, {"device_frames": 0, "bank_frames": 0}], ids=["history", "no history"])
def test_a_chunk_without_a_clean_pass_is_not_committed(model, sizes):
    """Also the first, which lies in the sink, and also where another pass came after the clean one."""
    memory = attach_memory(model, **{**SIZES, **sizes})
    with torch.no_grad():
        memory.begin_chunk(TEXT)
        model(LATENTS[0], ZERO, TEXT)
        with pytest.raises(RuntimeError, match="clean"):
            memory.commit()
        with memory.clean():
            model(LATENTS[0], ZERO, TEXT)
        model(LATENTS[0], ZERO, TEXT)
        with pytest.raises(RuntimeError, match="clean"):
            memory.commit()
        assert memory.is_open
        with memory.clean():
            model(LATENTS[0], ZERO, TEXT)
    memory.commit()


def test_detaching_the_first_of_two_memories_leaves_the_second(model):
    own = [block.attn1.processor for block in model.blocks]
    first = attach_memory(model, **SIZES)
    expected = stream(model, first, range(3))
    second = attach_memory(model, **SIZES)
    first.detach()
    assert torch.equal(stream(model, second, range(3)), expected)
    with pytest.raises(RuntimeError, match="detached"):
        first.begin_chunk(TEXT)
    second.detach()
    assert [block.attn1.processor for block in model.blocks] == own
    assert not model._forward_pre_hooks


def test_a_memory_that_another_has_replaced_is_kept_alive_by_nothing(model):
    import gc
    import weakref

    caches = []
    for _ in range(4):
        memory = attach_memory(model, **SIZES)
        stream(model, memory, range(2))
        caches.append(weakref.ref(memory.cache))
    gc.collect()
    assert [cache() is not None for cache in caches] == [False, False, False, True]


def test_another_memory_is_refused_while_a_chunk_is_open(model):
    memory = attach_memory(model, **SIZES)
    memory.begin_chunk(TEXT)
    with pytest.raises(RuntimeError, match="commit or abort"):
        attach_memory(model, **SIZES)
    assert all(block.attn1.processor.memory is memory for block in model.blocks)


@torch.no_grad()
def test_a_chunk_that_failed_can_be_begun_again_or_given_up(model):
    memory = attach_memory(model, **SIZES)
    expected = stream(model, memory, range(4))
    memory.reset()
    got = [*stream(model, memory, range(3))]
    memory.begin_chunk(TEXT)
    with pytest.raises(ValueError, match="chunk tokens"):  # guidance as a batch of two
        model(LATENTS[3].expand(2, -1, -1, -1, -1), ZERO.expand(2), TEXT.expand(2, -1, -1))
    memory.begin_chunk(TEXT)  # nothing was written

    def fail(*_):
        raise MemoryError

    hook = model.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError), memory.clean():
        model(LATENTS[4], ZERO, TEXT)
    hook.remove()
    with pytest.raises(RuntimeError, match="abort"):
        memory.begin_chunk(TEXT)
    memory.abort()
    got += [*stream(model, memory, [3])]
    assert torch.equal(torch.stack(got), expected)


def test_a_stream_goes_on_from_a_saved_state_and_starts_anew_after_reset(model, transformer, tmp_path):
    memory = attach_memory(model, **SIZES)
    expected = stream(model, memory, range(6))
    memory.reset()
    assert torch.equal(stream(model, memory, range(4)), expected[:4])
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    other_model = copy.deepcopy(transformer)
    other = attach_memory(other_model, **SIZES)
    other.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert torch.equal(stream(other_model, other, range(4, 6)), expected[4:])
    state = memory.state_dict()
    turned = attach_memory(model, **{**SIZES, "height": WIDTH, "width": HEIGHT})
    with pytest.raises(ValueError, match="frames of"):
        turned.load_state_dict(state)
    strips = attach_memory(model, **SIZES, token_order="strips")
    with pytest.raises(ValueError, match="with token_order='raster', here 'strips'"):
        strips.load_state_dict(state)
    with pytest.raises(ValueError, match="has no state of a cache"):
        other.load_state_dict({"grid": state["grid"], "token_order": "raster"})
    for name in ("reselect", "token_order"):
        with pytest.raises(ValueError, match=f"{name} must be .*, got 'never'"):
            attach_memory(model, **SIZES, **{name: "never"})
    other.begin_chunk(TEXT)
    for call in (lambda: other.load_state_dict(state), other.state_dict):
        with pytest.raises(RuntimeError, match="chunk is open"):
            call()


def test_a_memory_without_a_bank_attends_to_window_and_sink(model):
    memory = attach_memory(model, **{**SIZES, "bank_frames": 0})
    without = stream(model, memory, range(5))
    memory = attach_memory(model, **SIZES)
    assert not torch.equal(stream(model, memory, range(5)), without)


def test_a_deep_copy_of_the_transformer_has_a_memory_of_its_own(model):
    memory = attach_memory(model, **SIZES)
    stream(model, memory, range(2))
    other = copy.deepcopy(model)
    copied = other.blocks[0].attn1.processor.memory
    assert copied is not memory and int(copied.number) != int(memory.number)
    assert int(other.blocks[1].attn1.processor.number) == int(copied.number)
    assert torch.equal(stream(other, copied, range(2, 4)), stream(model, memory, range(2, 4)))
    assert copied.cache.committed == memory.cache.committed == 4


@torch.no_grad()
def test_blocks_are_compiled_once_for_all_layers_and_chunks(model):
    eager = copy.deepcopy(model)
    expected = stream(eager, attach_memory(eager, **SIZES), range(4))
    memory = attach_memory(model, **SIZES)
    torch._dynamo.reset()
    counters.clear()
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert (stream(model, memory, range(4)) - expected).abs().max() <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    memory.begin_chunk(TEXT)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no gradients through memory"):
        model(LATENTS[0], ZERO, TEXT)
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=["follows", "float32", "bfloat16"])
@pytest.mark.parametrize("inside", [False, True], ids=["attached outside", "attached inside"])
def test_float32_weights_stream_under_autocast(model, dtype, inside):
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(LATENTS[0], ZERO, TEXT).sample
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        memory = attach_memory(model, **SIZES, dtype=dtype)
    assert memory.layout.dtype == (dtype or (torch.bfloat16 if inside else torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        memory.begin_chunk(TEXT)
        got = model(LATENTS[0], ZERO, TEXT).sample
        assert got.dtype == expected.dtype
        assert (got - expected).abs().max() <= 0.03 * expected.abs().max()
        memory.abort()
        stream(model, memory, range(5))


def test_a_transformer_that_is_compiled_as_a_whole_streams_and_refuses_gradients(model):
    eager = copy.deepcopy(model)
    expected = stream(eager, attach_memory(eager, **SIZES), range(4))
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    memory = attach_memory(compiled, **SIZES)
    assert (stream(compiled, memory, range(4)) - expected).abs().max() <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    memory.begin_chunk(TEXT)
    with pytest.raises(Exception, match="no gradients through memory"):
        compiled(LATENTS[0], ZERO, TEXT).sample.sum().backward()
    torch._dynamo.reset()


def test_fused_projections_stream_and_retrieve_the_same(model):
    memory = attach_memory(model, **SIZES)
    expected = stream(model, memory, range(6))
    memory.reset()
    model.fuse_qkv_projections()
    assert model.blocks[0].attn2.fused_projections
    assert (stream(model, memory, range(6)) - expected).abs().max() <= 1e-4


def test_processors_that_were_replaced_are_missed(model):
    memory = attach_memory(model, **SIZES)
    memory.begin_chunk(TEXT)
    model.blocks[1].attn1.set_processor(model.blocks[1].attn1.processor.before)
    with pytest.raises(RuntimeError, match="have been replaced"), torch.no_grad():
        model(LATENTS[0], ZERO, TEXT)
    memory.detach()
    assert not any(isinstance(block.attn1.processor, WanMemoryProcessor) for block in model.blocks)
