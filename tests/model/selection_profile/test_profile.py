"""The profile of a stream: what is drawn, that watching changes nothing, and what is written of it."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from memflow_ops.model.selection_profile import profile as selection_profile_profile
from memflow_ops.model.selection_profile.figures import Sampling, SelectionProfile
from memflow_ops.model.selection_profile.plot import draw_profile
from memflow_ops.model.selection_profile.profile import check_profile, first_full_chunk, profile_selection
from memflow_ops.model.selection_profile.quality import Choice, measure_call
from memflow_ops.model.selection_profile.report import (
    choices_of,
    profile_json,
)
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer, stream
from memflow_ops.model.toy.language import TEXT_DIM, embed_prompts
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

STORY = ["a ball in the meadow", "a box in the sea", "an empty desert", "a ball at night"]
SETTINGS = StreamSettings(
    height=16,
    width=16,
    bank_frames=2,
    device_frames=20,
    top_k=4,
    block_size=4,
    query_group=16,
    recache=True,
    steps=2,
    shift=7.0,
)
SIZES = {"block_sizes": [4, 16], "query_groups": [1, 6, None]}


@pytest.fixture(scope="module")
def model() -> CausalVideoModel:
    torch.manual_seed(3)
    sizes = {"dim": 32, "ffn_dim": 64, "num_heads": 4, "num_layers": 2, "in_dim": 5, "out_dim": 3}
    return CausalVideoModel(
        ModelConfig(**sizes, text_dim=TEXT_DIM, text_len=4, patch_size=(1, 4, 4), prediction="x0")
    ).eval()


@pytest.fixture(scope="module")
def spoken() -> list[tuple[str, ...]]:
    return chunk_prompts([STORY, STORY[::-1]], 6, 3)


def last(*arguments, **options) -> SelectionProfile:
    (*_, whole) = profile_selection(*arguments, **{**SIZES, "encode": embed_prompts, **options})
    return whole


@pytest.mark.parametrize(
    "changes",
    [{}, {"sink_frames": 0}, {"sink_frames": 5}, {"bank_frames": 0, "sink_frames": 1}, {"window_frames": 9}],
    ids=str,
)
def test_the_first_chunk_with_a_full_bank(model, changes):
    settings = replace(SETTINGS, **changes)
    streamer = Streamer(model, 1, settings, encode=embed_prompts)
    full = settings.sink_frames + settings.bank_frames
    sizes = []
    for _ in range(first_full_chunk(settings) + 2):
        sizes.append(len(streamer.next_chunk(["an empty sea"]).candidates[0]))
    assert sizes[-2:] == [full, full] and max(sizes[:-2], default=0) < full


def test_watching_changes_nothing_and_sees_every_call(model, spoken):
    seen = []
    watched = Streamer(
        model,
        2,
        SETTINGS,
        seed=5,
        encode=embed_prompts,
        observe=lambda layer, q, memory: seen.append((layer, q.shape, int(memory.frames[0]))),
    )
    frames = [watched.next_chunk(prompts).frames for prompts in spoken]
    alone = [chunk.frames for chunk in stream(model, spoken, SETTINGS, seed=5, encode=embed_prompts)]
    assert all(torch.equal(a, b) for a, b in zip(frames, alone, strict=True))
    with_a_bank = len(spoken) - 2  # the sink leaves the window with the second chunk
    assert [layer for layer, *_ in seen] == [0, 1] * (SETTINGS.steps + 1) * with_a_bank
    assert seen[-1][1:] == (torch.Size([2, 48, 4, 8]), 5)


def test_both_orders_of_tokens_are_measured_on_the_same_calls(model, spoken):
    """Where all queries are measured, they differ in the blocks alone: whole frames keep the same."""
    whole = last(model, spoken, SETTINGS, sampling=Sampling(chunks=2, calls=3, heads=2, queries=48, rounds=0))
    strips = whole.strips
    assert (strips.calls, strips.queries, strips.chunks) == (whole.calls, whole.queries, whole.chunks)
    assert strips.bank_mass == pytest.approx(whole.bank_mass, abs=1e-6)
    differ = 0
    for raster, other in zip(whole.figures(), strips.figures(), strict=True):
        assert (raster.choice, raster.top_k, raster.share) == (other.choice, other.top_k, other.share)
        if raster.share in (0, 1) or (raster.block_size == 16 and raster.query_group is None):
            assert other.captured == pytest.approx(raster.captured, abs=1e-5)
        elif raster.blocks == "oracle":
            differ += abs(other.captured - raster.captured) > 1e-4
    assert differ
    with pytest.raises(ValueError, match="a stream in raster order is profiled, and strips beside it, got 'strips'"):
        check_profile(replace(SETTINGS, token_order="strips"), 10, 16, [4], [1])
    with pytest.raises(ValueError, match="one query for window and bank, so no positions='bounded'"):
        check_profile(replace(SETTINGS, positions="bounded"), 10, 16, [4], [1])


def test_a_profile_is_of_so_many_chunks_calls_heads_and_queries(model, spoken):
    sampling = Sampling(chunks=3, calls=4, heads=2, queries=12, rounds=2)
    steps = []
    grown = profile_selection(
        model, spoken, SETTINGS, sampling=sampling, encode=embed_prompts, report=lambda *at: steps.append(at), **SIZES
    )
    for number, whole in enumerate(grown, 1):
        assert len(whole.chunks) == number and whole.calls == 4 * number and whole.queries == whole.calls * 2 * 12
    assert number == 3 and min(whole.chunks) >= first_full_chunk(SETTINGS)
    assert steps == [(i + 1, steps[-1][1]) for i in range(whole.chunks[-1] + 1)]

    rows = whole.figures()
    assert choices_of(rows) == whole.compared
    for row in rows:
        assert 0 <= row.captured <= 1 and 0 <= row.captured_p20 <= 1 and row.left_out <= whole.bank_mass + 1e-6
        assert row.share == pytest.approx(row.keys / (5 * 16))
        if row.share == 1:
            assert (row.captured, row.captured_p20, row.left_out, row.error) == (1, 1, 0, 0)
        timed = row.blocks in ("top", "moments", "normalised") and row.top_k > 0
        assert (row.ratio is not None) == (row.seconds is not None) == timed
        if row.ratio is not None:
            assert 0 < row.ratio_p20 <= row.ratio <= row.ratio_p80


def test_the_same_seed_measures_the_same(model, spoken):
    sampling = Sampling(chunks=2, calls=3, heads=1, queries=6, rounds=0)
    one, same, other = (
        last(model, spoken, SETTINGS, sampling=replace(sampling, seed=seed)).figures() for seed in (1, 1, 2)
    )
    assert one == same != other
    assert all(row.ratio is None for row in one)


def test_what_is_measured_is_the_stream_s_attention(model, spoken, monkeypatch):
    """Against the outputs of the calls themselves, which with all blocks activated are dense attention."""
    from memflow_ops.cache import attend

    dense, seen = [], []

    def attention(*arguments, **options):
        out = whole(*arguments, **options)
        if "memory_slots" in options:
            dense.append(out)
        return out

    def watch(call, compared, generator):
        seen.append((call, measure_call(call, compared, generator)))
        return seen[-1][1]

    whole = attend.memory_attention
    monkeypatch.setattr(attend, "memory_attention", attention)
    monkeypatch.setattr(selection_profile_profile, "measure_call", watch)
    settings, calls = replace(SETTINGS, top_k=100, recache=False), (SETTINGS.steps + 1) * 2 - 1
    sampling = Sampling(chunks=1, calls=calls, heads=4, queries=48, rounds=0)
    measured = last(model, [(one,) for one, _ in spoken], settings, sampling=sampling)
    assert len(seen) == 2 * calls and measured.calls == calls  # each of them in strips too, which dense is the same
    choice = Choice("oracle", 4, 1)
    outs = [out for out in dense[-calls:] for _ in ("raster", "strips")]
    for (call, found), out in zip(seen, outs, strict=True):
        assert call.bank_k.shape == (4, 5, 16, 8) and call.k.shape == (4, 96, 8)
        torch.testing.assert_close(found[choice].dense, out.double().square().sum((0, 1, 3)), rtol=1e-4, atol=0)


def test_query_groups_are_measured_whole(model, spoken, monkeypatch):
    measured = []
    monkeypatch.setattr(
        selection_profile_profile,
        "measure_call",
        lambda call, *rest: measured.append(call.measured.tolist()) or measure_call(call, *rest),
    )
    last(model, spoken, SETTINGS, sampling=Sampling(chunks=2, calls=3, queries=20, rounds=0), query_groups=[4, 6, 1])
    assert len(measured) == 2 * 6 and len({tuple(some) for some in measured}) > 1
    for some in measured:
        assert len(some) == 12 and some[0] % 12 == 0 and some == list(range(some[0], some[0] + 12))


@pytest.mark.parametrize(
    ("changes", "chunks", "says"),
    [
        ({"bank_frames": 10}, 8, "a bank of 10 frames is full in chunk 12, but the story ends after chunk 7"),
        ({"memory": "full"}, 8, "only memory='memflow'"),
        ({"sink_frames": 0, "bank_frames": 0}, 8, "nothing to select from"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, chunks, says):
    with pytest.raises(ValueError, match=says):
        check_profile(replace(SETTINGS, **changes), chunks, 16, [4], [1])


@pytest.mark.parametrize("name", ["chunks", "calls", "heads", "queries"])
def test_bad_samples_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Sampling(**{name: 0})


def test_json_and_picture(model, spoken):
    sampling = Sampling(chunks=1, calls=2, rounds=1)
    measured = last(model, spoken, SETTINGS, sampling=sampling)
    said = json.loads(profile_json(measured, {"command": "x"}, sampling, interrupted=True))
    assert said["command"] == "x" and said["interrupted"] and said["sampling"]["calls"] == 2
    for got, row in zip(said["rows"], measured.figures(), strict=True):
        kept = asdict(row)
        assert got.keys() == kept.keys()
        assert all(x == (pytest.approx(kept[n], rel=1e-5) if isinstance(x, float) else kept[n]) for n, x in got.items())
    for rows in (measured.figures(), [replace(row, ratio=None) for row in measured.figures()]):
        assert draw_profile(rows, 16, "a title", SETTINGS).startswith(b"\x89PNG")
