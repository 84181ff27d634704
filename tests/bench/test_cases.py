"""The cases: every contender is right and is timed, and every row says what was measured."""

from dataclasses import replace

import pytest
import torch

from memflow_ops.bench.cases import alternatives, registry, streams
from memflow_ops.bench.cases.attention_inputs import AttentionInputs
from memflow_ops.bench.cases.checked_cache import MemoryVariant
from memflow_ops.bench.harness.case import OURS, Case
from memflow_ops.bench.harness.contest import Contest
from memflow_ops.bench.harness.correctness import sampled
from memflow_ops.bench.report import table
from memflow_ops.bench.sizes import TINY

CPU = torch.device("cpu")
CEILINGS = {"tflops_float32": 1.0, "gbs": 1.0}


def tiny(name: str) -> Case:
    (found,) = registry.chosen("cpu", ["tiny"], name)
    return found


@pytest.mark.parametrize("case", registry.chosen("cpu", ["tiny"]), ids=lambda case: case.name)
@torch.no_grad()
def test_every_contender_is_right_and_timed(case):
    found = Contest(case, CPU)  # which checks
    for _ in range(2):
        found.run_round()
    rows = found.rows(CEILINGS, {"device": "here"})
    assert rows[0]["contender"] == OURS and len(rows) >= 2
    for row in rows:
        assert row["seconds"]["p20"] > 0 and row["device"] == "here" and row["settings"]["block_size"] == 8
        assert row["contender"] != rows[0]["baseline"] or row["over_baseline"]["p50"] == 1
    assert rows[0].get("flops") or rows[0].get("bytes")
    assert rows[0]["settings"] == case.all_settings()


@torch.no_grad()
@pytest.mark.parametrize("level", ["layer", "stream", "op"])
def test_every_row_states_the_budget_that_was_measured(level, monkeypatch):
    kept = {}
    layout = streams.stream_settings
    monkeypatch.setattr(streams, "stream_settings", lambda size, of, n: kept.setdefault(of, layout(size, of, n)))
    variants = {
        OURS: MemoryVariant("memflow"),
        "none": MemoryVariant("none"),
        "many": MemoryVariant("memflow", 4, 9, per_chunk=True),
    }
    if level == "layer":
        built = streams.layer(TINY, torch.float32, CPU, 0, variants)
        case = tiny("layer/block")
    elif level == "stream":
        built = streams.chunk(TINY, torch.float32, CPU, 0, variants=variants, history=6, rounds=1)
        case = tiny("stream/chunk")
    else:
        case = tiny("op/memory_attention")
        built = case.build(CPU, 0)
    found = Contest(replace(case, build=lambda *_: built), CPU)
    found.run_round()
    rows = found.rows(CEILINGS, {})
    settings = {row["contender"]: row["settings"] for row in rows}
    if level == "op":
        assert (settings[OURS]["query_group"], settings[OURS]["bank_frames"]) == (16, 4)
        assert settings["ours, one selection per chunk"]["query_group"] == TINY.queries
        return
    budgets = {name: [of[key] for key in ("bank_frames", "top_k", "query_group")] for name, of in settings.items()}
    assert budgets == {OURS: [3, 4, 16], "none": [None] * 3, "many": [4, 9, TINY.queries]}
    for name, variant in variants.items():
        if name != "none":
            assert budgets[name] == [kept[variant].bank_frames, kept[variant].top_k, kept[variant].query_group]


@torch.no_grad()
def test_flex_attention_of_the_same_selection_is_set_up_right(monkeypatch):
    """The blocks are checked without the compilation, which takes half a minute."""
    given = AttentionInputs.make(TINY, 4, torch.float32, CPU)
    masks = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda q, k, v, block_mask: masks.append(block_mask) or q
    )
    alternatives.flex(given).call()
    (mask,) = masks
    size = TINY
    window_blocks = -(-size.window_keys // size.block_size)
    for head, group in sampled(size.heads, size.groups):
        listed = []
        for number, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
            listed += indices[0, head, group, : number[0, head, group]].tolist()
        expected = [*range(window_blocks), *(given.indices[0, head, group] + window_blocks).tolist()]
        assert sorted(listed) == expected


def test_the_whole_history_grows_around_what_the_case_says(monkeypatch):
    seen = {}

    class Noted(streams.Streamer):
        def next_chunk(self, prompts):
            seen.setdefault(self.settings.memory, []).append(len(self.cache.candidate_frames()[0]))
            return super().next_chunk(prompts)

    monkeypatch.setattr(streams, "Streamer", Noted)
    case = tiny("stream/chunk")
    found = Contest(case, CPU)
    for _ in range(case.rounds):
        found.run_round()
    assert seen["full"] == [3, 4, 5, 6, 7, 8] and set(seen["memflow"]) == {6}
    rows = {row["contender"]: row for row in found.rows(CEILINGS, {})}
    assert rows["full"]["history_timed"] == [4, 8] and rows["full"]["settings"]["history"] == 6
    assert "frames/s" in table.named(rows[OURS])
    assert "history 4 to 8" in table.named(rows["full"]) and "history" not in table.named(rows[OURS])
    size = case.size
    flops, _ = streams.pass_work(size, size.window_keys + (size.sink_frames + 6) * size.frame_tokens, torch.float32)
    assert rows["full"]["flops"] == (size.steps + 1) * flops


def test_dense_attention_to_a_long_history_is_timed_more_than_once():
    case = registry.long_case(TINY, "float32", 256, "cpu")
    dense = case.build(CPU, 0).contenders["whole history, dense"]
    assert sum(number % dense.every == 0 for number in range(case.rounds)) >= 3


def test_names_are_unique_and_say_what_they_are():
    for device in ("cpu", "cuda"):
        fit = [case for case in registry.registry() if device in case.devices]
        assert len({case.name for case in fit}) == len(fit)
        for case in fit:
            level, _, size, dtype, *_ = case.name.split("/")
            assert (level, size, dtype) == (case.level, case.size.name, case.dtype)
    names = {case.name for case in registry.chosen("cuda", ["wan-1.3b"])}
    assert "stream/chunk/wan-1.3b/bfloat16/history-80" in names


def test_inputs_lie_as_in_the_cache():
    """A head's tokens lie behind one another in window and bank, which are views of one pool."""
    given = AttentionInputs.make(TINY, 3, torch.float32, CPU)
    frames = TINY.sink_frames + TINY.window_frames + 3
    for x in (*given.window, *given.bank, *given.sink_and_window, *given.history):
        assert x.stride()[1:] == (TINY.head_dim, TINY.head_dim * frames * TINY.frame_tokens, 1)
    assert torch.equal(given.history[0][:, : TINY.window_keys], given.window[0])
    assert torch.equal(given.history[1][:, TINY.window_keys :], given.bank[1])


def test_a_part_of_the_bank_has_the_descriptors_and_the_selection_of_its_own():
    large = AttentionInputs.make(TINY, 6, torch.float32, CPU)
    small = large.with_bank(2)
    assert small.bank[0].shape[1] == 2 * TINY.frame_tokens and torch.equal(small.window[0], large.window[0])
    small.check_descriptors()
    for head, group in sampled(TINY.heads, TINY.groups):
        assert small.selection(head, group).max() < 2 * TINY.blocks_per_frame


def test_the_union_of_a_tile_is_counted():
    given = AttentionInputs.make(TINY, 4, torch.float32, CPU).with_query_group(1)
    assert TINY.queries <= 128, "one tile holds all queries"
    chosen = [len(given.indices[0, head].unique()) for head in range(TINY.heads)]
    blocks = 4 * TINY.blocks_per_frame
    assert given.union_size() == {"union_blocks": sum(chosen) / TINY.heads, "bank_blocks": blocks}
    row = {"contender": "a selection per query", **given.union_size()}
    assert table.named(row) == f"a selection per query, {sum(chosen) / TINY.heads:.0f} of {blocks} blocks in a tile"
