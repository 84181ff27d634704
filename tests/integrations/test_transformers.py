"""Attention "memflow" in models of transformers, compared with their own attention."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from memflow_ops.integrations.transformers import MemoryOptions, memory_attention_forward, set_memory

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
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        set_memory(llama, window=0)
    assert llama.config._attn_implementation != "memflow" and MemoryOptions().window == 1024
