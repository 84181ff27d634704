"""The predicted costs: the page has what the program prints, and the sums are those of the sizes."""

from pathlib import Path

import pytest

from memflow_ops.bench.scaling import COSTS, TABLES, Cost
from memflow_ops.bench.sizes import TINY
from memflow_ops.model.pipeline.budget import block_parameters
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
WAN, WAN_14B = (cost for _, cost in COSTS)


@pytest.mark.parametrize("rows", TABLES, ids=lambda rows: rows.__name__)
def test_the_page_has_the_table(rows):
    assert "\n" + "\n".join(rows()) + "\n" in PAGE.read_text(encoding="utf-8")


def test_a_frame_is_what_the_cost_model_says():
    assert WAN.frame_bytes == 287_539_200  # 288 MB: 30 layers x 2 x 1560 tokens x 1536 x 2 bytes
    assert WAN_14B.frame_bytes == 40 * 2 * 1560 * 5120 * 2


def test_all_ranks_send_what_none_keeps():
    """Of 4 tensors of the chunk a rank has 1/N of the tokens, and keeps 1/N of the heads of these."""
    for cost in (WAN, WAN_14B):
        chunk = cost.size.queries * cost.size.dim * 2
        assert cost.sent_bytes(1) == 0
        for ranks in (2, 4):
            exact = chunk / ranks * (1 - 1 / ranks) * (4 * 5 * cost.size.layers - 1)
            assert cost.sent_bytes(ranks) == pytest.approx(exact, rel=1e-6)
    assert WAN.sent_bytes(2) / 1e9 == pytest.approx(2.2, abs=0.05)


def test_weights_are_counted_as_the_model_has_them():
    sizes = {"dim": TINY.dim, "ffn_dim": TINY.ffn_dim, "num_heads": TINY.heads, "num_layers": TINY.layers}
    config = ModelConfig(**sizes, in_dim=4, out_dim=4, text_dim=TINY.text_dim, text_len=8)
    blocks = CausalVideoModel(config).blocks
    counted = sum(parameter.numel() for parameter in blocks.parameters())
    assert block_parameters(config) * TINY.layers == counted
    assert Cost(TINY).parameters == pytest.approx(counted, rel=0.05)  # without biases, norms and modulations
