"""Attention "memflow" in models of transformers, compared with their own attention."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    DynamicCache,
    EncoderDecoderCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from memflow_ops.integrations.transformers import (
    MemoryOptions,
    memory_attention_forward,
    memory_mask,
    set_memory,
)

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def padded(length, left):
    """Two rows of tokens, the second with padding on its left or right."""
    tokens, mask = torch.randint(1, 50, (2, length)), torch.ones(2, length, dtype=torch.long)
    mask[1, slice(0, 3) if left else slice(length - 3, length)] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def logits(model, name, inputs):
    model.set_attn_implementation(name)
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("left", [False, True])
def test_padding_of_a_prompt_is_not_attended_to(llama, left):
    inputs = padded(12, left)
    kept = inputs["attention_mask"].bool()
    expected = logits(llama, "eager", inputs)[kept]
    assert (logits(llama, "memflow", inputs)[kept] - expected).abs().max() <= 1e-5
    assert (logits(llama, "eager", {"input_ids": inputs["input_ids"]})[kept] - expected).abs().max() > 1e-3 or not left


def test_an_encoder_sees_both_ways_and_no_padding():
    model, inputs = BertModel(BertConfig(**SIZES)).eval(), padded(12, left=False)
    kept = inputs["attention_mask"].bool()
    for given in (inputs, {"input_ids": inputs["input_ids"]}):
        expected = logits(model, "eager", given)[kept]
        assert (logits(model, "memflow", given)[kept] - expected).abs().max() <= 1e-5


def generated(model, name, inputs, **options):
    if name == "memflow":
        set_memory(model, **options)
    else:
        model.set_attn_implementation(name)
    out = model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0,
                         output_logits=True, return_dict_in_generate=True)  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("window", [1, 8, 1024])
def test_with_all_blocks_text_is_generated_as_before(llama, window):
    inputs = {"input_ids": torch.randint(1, 50, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    expected = generated(llama, "sdpa", inputs)
    got = generated(llama, "memflow", inputs, window=window, top_k=100, block_size=4)
    assert (got - expected).abs().max() <= 1e-5
    few = generated(llama, "memflow", inputs, window=1, top_k=1, block_size=2)
    assert (few - expected).abs().max() > 1e-3


def test_a_token_attends_to_its_window_and_the_best_blocks(llama):
    module = llama.model.layers[0].self_attn
    set_memory(llama, window=5, top_k=1, block_size=4)
    q, k, v = torch.randn(1, 4, 1, 6), torch.randn(1, 2, 17, 6), torch.randn(1, 2, 17, 6)
    out, _ = memory_attention_forward(module, q, k, v, None, scaling=0.3)
    for head in range(4):
        keys, values = k[0, head // 2], v[0, head // 2]
        best = max(range(3), key=lambda b: float(keys[4 * b : 4 * b + 4].mean(0) @ q[0, head, 0]))
        seen = [*range(4 * best, 4 * best + 4), *range(12, 17)]
        expected = F.scaled_dot_product_attention(q[0, head], keys[seen], values[seen], scale=0.3)
        assert (out[0, 0, head] - expected[0]).abs().max() <= 1e-5


def in_two_passes(model, name, tokens, first, **options):
    """The logits of a prompt whose first tokens are passed before the others."""
    if name == "memflow":
        set_memory(model, **options)
    else:
        model.set_attn_implementation(name)
    cache = DynamicCache(config=model.config)
    parts = tokens[:, :first], tokens[:, first:]
    with torch.no_grad():
        return torch.cat([model(input_ids=x, past_key_values=cache, use_cache=True).logits for x in parts], 1)


@pytest.mark.parametrize("first", [1, 7, 11])
def test_a_causal_mask_is_not_written_out(llama, first, monkeypatch):
    """Also where a prompt is passed in parts, whose mask is aligned to the last key."""
    tokens = torch.randint(1, 50, (2, 12))
    assert memory_mask(2, 5, 12, q_offset=7) is None and memory_mask(2, 12, 12) is None
    assert memory_mask(2, 5, 12, q_offset=6).shape == (2, 1, 5, 12)
    expected = in_two_passes(llama, "eager", tokens, first)
    monkeypatch.setattr("memflow_ops.integrations.transformers.sdpa_mask", None)  # fails if called
    assert (in_two_passes(llama, "memflow", tokens, first) - expected).abs().max() <= 1e-5


def test_a_static_cache_is_masked(llama):
    """It has room for keys that are not there yet."""
    inputs = {"input_ids": torch.randint(1, 50, (1, 12)), "cache_implementation": "static", "disable_compile": True}
    expected = generated(llama, "eager", inputs)
    assert (generated(llama, "memflow", inputs, window=64) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("first, window", [(1, 1), (7, 3), (11, 5)])
def test_a_prompt_that_attends_to_all_blocks_is_dense(llama, first, window):
    tokens, sparse = torch.randint(1, 50, (2, 23)), {"window": window, "block_size": 2, "sparse_prompts": True}
    expected = in_two_passes(llama, "eager", tokens, first)
    assert (in_two_passes(llama, "memflow", tokens, first, top_k=100, **sparse) - expected).abs().max() <= 1e-5
    assert (in_two_passes(llama, "memflow", tokens, first, top_k=1, **sparse) - expected).abs().max() > 1e-3
    dense = in_two_passes(llama, "memflow", tokens, first, window=window, top_k=1, block_size=2)
    assert first == 1 or (dense - expected)[:, :first].abs().max() <= 1e-5, "without sparse_prompts they are dense"


def test_a_piece_of_a_prompt_attends_to_its_window_and_the_best_blocks(llama):
    module = llama.model.layers[0].self_attn
    set_memory(llama, window=4, top_k=1, block_size=3, sparse_prompts=True, query_group=2)
    q, k, v = torch.randn(1, 4, 6, 6), torch.randn(1, 2, 17, 6), torch.randn(1, 2, 17, 6)
    out, _ = memory_attention_forward(module, q, k, v, None, scaling=0.3)
    pieces = [(range(4), 8), (range(4, 6), 12)]  # queries 11 to 14 and 15 to 16 of 17, and the first key in full
    for piece, past in pieces:
        blocks = [range(start, min(start + 3, past)) for start in range(0, past, 3)]
        for head in range(4):
            keys, values = k[0, head // 2], v[0, head // 2]
            for i in piece:
                group = q[0, head, i - i % 2 : i - i % 2 + 2].mean(0)
                best = max(blocks, key=lambda block: float(keys[block.start : block.stop].mean(0) @ group))
                seen = [*best, *range(past, 11 + i + 1)]
                expected = F.scaled_dot_product_attention(q[0, head, i : i + 1], keys[seen], values[seen], scale=0.3)
                assert (out[0, i, head] - expected[0]).abs().max() <= 1e-5


def test_padding_where_a_prompt_chooses_blocks_is_refused(llama):
    set_memory(llama, window=4, sparse_prompts=True)
    with pytest.raises(ValueError, match="cannot mask keys where it chooses blocks"):
        llama(**padded(12, left=True))
    llama.train()
    llama.model.layers[0].self_attn.attention_dropout = 0.5
    with pytest.raises(ValueError, match=r"no dropout where it chooses blocks, got 0\.5"):
        llama(torch.randint(1, 50, (1, 12)))


def test_a_model_trains_through_blocks_of_its_prompt(llama):
    tokens = torch.randint(1, 50, (1, 20))
    gradients = []
    for options in ({}, {"window": 3, "top_k": 100, "block_size": 2, "sparse_prompts": True}):
        set_memory(llama, **options)
        llama.zero_grad()
        llama(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad.clone() for p in llama.parameters()])
    for dense, sparse in zip(*gradients, strict=True):
        assert (dense - sparse).abs().max() <= 1e-5 * max(1.0, float(dense.abs().max()))


def test_padding_where_blocks_are_chosen_is_refused(llama):
    with pytest.raises(ValueError, match="cannot mask keys where it chooses blocks"):
        generated(llama, "memflow", padded(12, left=True), window=4)
    within = generated(llama, "memflow", padded(12, left=True), window=64)
    assert within.isfinite().all()


def test_padding_within_the_window_is_not_attended_to(llama):
    inputs = padded(12, left=True)
    expected = generated(llama, "eager", inputs)
    assert (generated(llama, "memflow", inputs, window=64) - expected).abs().max() <= 1e-5


def test_a_sliding_window_is_followed_or_refused():
    model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=6)).eval()
    inputs = {"input_ids": torch.randint(1, 50, (1, 12))}
    assert (logits(model, "memflow", inputs) - logits(model, "eager", inputs)).abs().max() <= 1e-5


def test_what_is_not_known_is_refused(llama):
    module = llama.model.layers[0].self_attn
    q, k, v = torch.randn(1, 4, 1, 6), torch.randn(1, 2, 17, 6), torch.randn(1, 2, 17, 6)
    for name in ("softcap", "s_aux", "position_bias", "an_option_of_tomorrow"):
        with pytest.raises(NotImplementedError, match=name):
            memory_attention_forward(module, q, k, v, None, **{name: torch.ones(1)})
    memory_attention_forward(module, q, k, v, None, softcap=None, position_ids=torch.zeros(1, 1))
    with pytest.raises(NotImplementedError, match="output_attentions"):
        memory_attention_forward(module, q, k, v, None, output_attentions=True)
    for bad, said in (
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be an int, got float"),
        ({"impl": "fast"}, "impl must be one of"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            set_memory(llama, **bad)
    assert llama.config._attn_implementation != "memflow" and MemoryOptions().window == 1024


def test_a_decoder_sees_all_of_its_encoder():
    """Cross-attention of one new token is not causal, so it is dense even where the encoder has more than a window."""
    sizes = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    model = BartForConditionalGeneration(BartConfig(vocab_size=50, max_position_embeddings=64, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if "_proj" in name:  # sharper attention: what is attended to matters
            parameter.data.mul_(20)
    set_memory(model, window=4, top_k=1, block_size=2)
    tokens, mask = torch.randint(3, 50, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, -5:] = 0
    given = {"encoder_outputs": model.model.encoder(tokens, mask), "attention_mask": mask}

    def token_by_token(name):
        model.set_attn_implementation(name)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        steps = [{"decoder_input_ids": tokens[:, i : i + 1], "past_key_values": cache} for i in range(3)]
        return torch.cat([model(**given, **step).logits for step in steps], 1)

    with torch.no_grad():
        assert (token_by_token("memflow") - token_by_token("eager")).abs().max() <= 1e-5


def test_what_is_asked_of_outputs_and_loss_is_no_option_of_attention(llama):
    """Models hand such options on to every attention: a Trainer's number of items, and `generate`'s hidden states."""
    llama.set_attn_implementation("memflow")
    tokens = torch.randint(1, 50, (2, 12))
    got = llama(tokens, labels=tokens, num_items_in_batch=torch.tensor(24), output_hidden_states=True)
    llama.set_attn_implementation("eager")
    expected = llama(tokens, labels=tokens, num_items_in_batch=torch.tensor(24), output_hidden_states=True)
    assert (got.loss - expected.loss).abs() <= 1e-5
    torch.testing.assert_close(got.hidden_states, expected.hidden_states, rtol=0, atol=1e-5)
