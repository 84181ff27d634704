"""What is not Wan's attention and Wan's RoPE is refused before anything is changed; what is built alike is accepted."""

import copy

import pytest
import torch

from memflow_ops.integrations.diffusers import WanMemoryProcessor, attach_memory

HEIGHT, WIDTH = 4, 6
SIZES = {
    "height": HEIGHT, "width": WIDTH, "window_frames": 6, "bank_frames": 1, "device_frames": 4, "block_size": 4,
}  # fmt: skip
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 32,
    "freq_dim": 32, "ffn_dim": 48, "num_layers": 2,
}  # fmt: skip
LTX = {
    "in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24,
    "num_layers": 1, "caption_channels": 16,
}  # fmt: skip
TEXT = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))


def build(name, **config):
    import diffusers

    torch.manual_seed(0)
    return getattr(diffusers, name)(**config).eval()


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("LTXVideoTransformer3DModel", LTX, "LTXVideoTransformer3DModel has no"),
        ("HeliosTransformer3DModel", {**WAN, "rope_dim": (4, 4, 4)}, "original_context_length"),
        ("AnyFlowTransformer3DModel", WAN, "attn1 of AnyFlowTransformer3DModel takes hidden_states, expected"),
        ("WanVACETransformer3DModel", {**WAN, "vace_layers": [0], "vace_in_channels": 16}, "vace_blocks.0.attn1"),
        ("WanTransformer3DModel", {**WAN, "patch_size": (2, 2, 2)}, r"patch of WanTransformer3DModel is \[?\(?2, 2, 2"),
    ],
)
def test_models_of_another_class_are_refused_by_their_structure(name, config, said):
    model = build(name, **config)
    with pytest.raises(TypeError, match=said):
        attach_memory(model, **SIZES)


def test_chronoedits_rope_is_refused_where_it_differs_from_wans():
    """Of two frames it takes the second for a later one; of three it does not."""
    model = build("ChronoEditTransformer3DModel", **WAN)
    before = [block.attn1.processor for block in model.blocks]
    with pytest.raises(ValueError, match="RoPE is not Wan's"):
        attach_memory(model, **SIZES, chunk_frames=2)
    assert [block.attn1.processor for block in model.blocks] == before and not model._forward_pre_hooks
    attach_memory(model, **SIZES)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["WanTransformer3DModel", "ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel"]
)
def test_models_that_are_built_like_wans_stream_their_first_chunk_as_without_memory(name):
    model = build(name, **WAN)
    latents, time = torch.randn(1, 16, 3, HEIGHT, WIDTH), torch.tensor([400])
    expected = model(latents, time, TEXT).sample
    memory = attach_memory(model, **SIZES)
    memory.begin_chunk(TEXT)
    assert (model(latents, time, TEXT).sample - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_rope_of_another_base_is_refused(transformer):
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    model = copy.deepcopy(transformer)
    model.rope = WanRotaryPosEmbed(12, (1, 2, 2), 1024, theta=1000.0)
    with pytest.raises(ValueError, match="RoPE is not Wan's"):
        attach_memory(model, **SIZES)


@torch.no_grad()
def test_rope_that_is_replaced_after_memory_was_attached_is_refused(transformer):
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    model = copy.deepcopy(transformer)
    memory = attach_memory(model, **SIZES)
    model.rope = WanRotaryPosEmbed(12, (1, 2, 2), 1024, theta=1000.0)
    memory.begin_chunk(TEXT)
    with pytest.raises(ValueError, match="RoPE is not Wan's"):
        model(torch.randn(1, 16, 3, HEIGHT, WIDTH), torch.zeros(1), TEXT)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"impl": "fast"}, ValueError, "impl must be one of"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"score": "max"}, ValueError, "score must be one of mean, moments, normalised, got 'max'"),
        ({"query_group": 0}, ValueError, "query_group must be at least 1"),
        ({"batch": 0}, ValueError, "batch must be positive"),
        ({"height": 4.0}, ValueError, "height is that of the latents"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating-point"),
    ],
)
def test_options_that_no_pass_could_use_are_refused_at_once(transformer, options, error, said):
    model = copy.deepcopy(transformer)
    with pytest.raises(error, match=said):
        attach_memory(model, **{**SIZES, **options})
    assert not any(isinstance(block.attn1.processor, WanMemoryProcessor) for block in model.blocks)


def test_a_processor_that_computes_something_else_is_refused(transformer):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class WithoutRope(WanAttnProcessor):
        def __call__(self, attn, x, context=None, mask=None, rotary_emb=None):
            return super().__call__(attn, x, context, mask, None)

    model = copy.deepcopy(transformer)
    model.blocks[1].attn1.set_processor(WithoutRope())
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 does not compute .* WithoutRope"):
        attach_memory(model, **SIZES)
    assert not any(isinstance(block.attn1.processor, WanMemoryProcessor) for block in model.blocks)


def test_the_checks_leave_the_model_and_the_random_numbers_as_they_were(transformer):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(transformer).train()
    model.add_adapter(peft.LoraConfig(target_modules=["to_k"], lora_dropout=0.5, init_lora_weights=False))
    model.blocks[0].attn1.to_v.eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    attach_memory(model, **SIZES)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_latents_of_another_shape_are_refused_though_they_have_as_many_tokens(transformer):
    model = copy.deepcopy(transformer)
    memory = attach_memory(model, **SIZES)
    memory.begin_chunk(TEXT)
    for latents in (torch.randn(1, 16, 3, WIDTH, HEIGHT), torch.randn(1, 16, 6, HEIGHT // 2, WIDTH)):
        named = {"hidden_states": latents, "timestep": torch.zeros(1), "encoder_hidden_states": TEXT}
        for given, by_name in ((tuple(named.values()), {}), ((), named)):
            with pytest.raises(ValueError, match="stories, channels, frames, height, width"), torch.no_grad():
                model(*given, **by_name)


def test_options_that_our_attention_does_not_have_are_refused(transformer):
    model = copy.deepcopy(transformer)
    memory = attach_memory(model, **SIZES)
    memory.begin_chunk(TEXT)
    attn, x = model.blocks[0].attn1, torch.randn(1, 18, 24)
    with pytest.raises(ValueError, match="without rotary_emb"):
        attn(x)
    for options, said in (
        ({"attention_mask": torch.ones(18, 18)}, "a mask"),
        ({"encoder_hidden_states": x}, "a mask"),
        ({"scale": 2}, "scale"),
    ):
        with pytest.raises(ValueError, match=f"got {said}"):
            attn(x, **options)


@pytest.mark.parametrize("text", [torch.zeros(2, 5, 32), torch.zeros(1, 0, 32), torch.zeros(5, 32)])
def test_text_that_does_not_fit_is_refused(transformer, text):
    memory = attach_memory(copy.deepcopy(transformer), **SIZES)
    with pytest.raises(ValueError, match="text must be embeddings"):
        memory.begin_chunk(text)
    with pytest.raises(ValueError, match="text_lengths must be 1 numbers"):
        memory.begin_chunk(TEXT, [6])
    assert not memory.is_open
