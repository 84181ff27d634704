"""Tokens in strips: the same model and the same frames to rounding, other blocks, and a part of the state."""

from dataclasses import replace

import pytest
import torch
from graph_streams import encode, settings_of

from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig
from memflow_ops.rotary import apply_rotation, rope_rotation
from memflow_ops.token_order import token_order

GRID = (12, 3)  # tokens: two strips of 6 rows
STORIES = ["a", "x"]


@pytest.fixture(scope="module")
def model() -> CausalVideoModel:
    torch.manual_seed(3)
    config = ModelConfig(16, 16, 2, 2, in_dim=4, out_dim=2, text_dim=4, text_len=3, freq_dim=8)  # takes coordinates
    model = CausalVideoModel(config).eval()
    for name, parameter in model.named_parameters():
        if ".q." in name or ".k." in name:  # sharper attention: what is attended to matters
            parameter.data.mul_(4)
    return model


def settings(**changes):
    return settings_of(**{"height": 2 * GRID[0], "width": 2 * GRID[1], "block_size": 6, "window_frames": 6, **changes})


def frames_of(model, chunks: int = 5, **changes) -> torch.Tensor:
    streamer = Streamer(model, 2, settings(**changes), seed=4, encode=encode)
    prompts = [STORIES] * 3 + [["b", "x"]] * (chunks - 3)  # one story switches, and its window is re-cached
    return torch.cat([streamer.next_chunk(of).frames for of in prompts], 2)


def test_a_pass_gives_the_same_and_hands_over_tokens_in_the_order():
    torch.manual_seed(1)
    config = ModelConfig(16, 32, 2, 2, in_dim=6, out_dim=4, text_dim=8, text_len=5, freq_dim=8)
    model, order = CausalVideoModel(config).eval(), token_order("strips", *GRID)
    text = model.encode_text(torch.randn(2, 5, 8))
    x, t = torch.randn(2, 4, 3, 24, 6), torch.rand(2, 3) * 1000
    condition = torch.randn(1, 2, 3, 24, 6)
    places = (torch.arange(n) for n in (3, *GRID))
    rotation = rope_rotation(8, *places)
    seen: list[list] = [[], []]

    def attend_of(kept, rotation):
        def attend(layer, q, k, v):
            kept.append((q, k, v))
            q, k = (apply_rotation(y, *rotation).transpose(1, 2) for y in (q, k))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)

        return attend

    raster = model(x, t, text, attend_of(seen[0], rotation), condition)
    moved = tuple(map(order.apply, rotation))
    strips = model(x, t, text, attend_of(seen[1], moved), condition, order)
    torch.testing.assert_close(strips, raster, rtol=0, atol=1e-5)
    for plain, reordered in zip(seen[0], seen[1], strict=True):
        for a, b in zip(plain, reordered, strict=True):
            torch.testing.assert_close(b, order.apply(a), rtol=0, atol=1e-5)
    assert not torch.equal(seen[0][0][0], seen[1][0][0])
    wrong = model(x, t, text, attend_of([], rotation), condition, order)
    assert (wrong - raster).abs().max() > 1e-2, "positions travel with the tokens"


@pytest.mark.parametrize("memory", ["none", "sink", "full", "released", "memflow"])
def test_what_attends_to_everything_is_the_same_to_rounding(model, memory):
    changes = {"memory": memory, "top_k": 10_000} | ({"record_interval": 1} if memory == "released" else {})
    raster, strips = (frames_of(model, token_order=order, **changes) for order in ("raster", "strips"))
    torch.testing.assert_close(strips, raster, rtol=0, atol=2e-4)
    assert not torch.equal(strips, raster), "sums in another order"


def test_blocks_are_others(model):
    raster, strips = (frames_of(model, token_order=order, top_k=1) for order in ("raster", "strips"))
    assert torch.allclose(raster[:, :, :6], strips[:, :, :6], rtol=0, atol=1e-4), "nothing to choose from yet"
    assert (raster - strips).abs().max() > 1e-3


def test_a_state_goes_on_in_its_order_and_is_refused_in_another(model):
    whole = frames_of(model, token_order="strips", top_k=1)
    first = Streamer(model, 2, settings(token_order="strips", top_k=1), seed=4, encode=encode)
    for _ in range(3):
        first.next_chunk(STORIES)
    state = first.state_dict()
    second = Streamer(model, 2, first.settings, seed=4, encode=encode)
    second.load_state_dict(state)
    later = torch.cat([second.next_chunk(["b", "x"]).frames for _ in range(2)], 2)
    assert torch.equal(later, whole[:, :, 9:])
    other = Streamer(model, 2, replace(first.settings, token_order="raster"), seed=4, encode=encode)
    with pytest.raises(ValueError, match="other settings: token_order='strips', here 'raster'"):
        other.load_state_dict(state)


def test_names_are_checked():
    with pytest.raises(ValueError, match="token_order must be one of raster, strips, got 'hilbert'"):
        settings(token_order="hilbert")
    with pytest.raises(ValueError, match="reselect must be one of step, chunk, got 'never'"):
        settings(reselect="never")
