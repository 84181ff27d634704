"""Our attention in modules of the Self-Forcing kind, compared with such modules as they are."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memflow_ops import memory_attention
from memflow_ops.integrations.self_forcing import CacheAttention, attend_with_cache, restore_attention, swap_attention
from memflow_ops.model.wan.transformer import RMSNorm
from memflow_ops.rotary import apply_rotation, rope_rotation
from memflow_ops.token_order import strip_order

ROWS, COLUMNS, HEADS, HEAD_DIM = 2, 5, 2, 12
T, DIM = ROWS * COLUMNS, HEADS * HEAD_DIM


class TheirAttention(nn.Module):
    """What such projects do, in short: evict the oldest frames but the sink, write the chunk to the cache, attend."""

    def __init__(self, sink_size=0):
        super().__init__()
        self.num_heads, self.sink_size = HEADS, sink_size
        self.q, self.k, self.v, self.o = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(DIM, 1e-6), RMSNorm(DIM, 1e-6)

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        frames, rows, columns = grid_sizes[0].tolist()
        places = torch.arange(frames) + current_start // (rows * columns)
        rotation = rope_rotation(HEAD_DIM, places, torch.arange(rows), torch.arange(columns))
        q, k, v = (f(x).unflatten(2, (HEADS, -1)) for f in (
            lambda x: self.norm_q(self.q(x)), lambda x: self.norm_k(self.k(x)), self.v))  # fmt: skip
        q, k = apply_rotation(q, *rotation), apply_rotation(k, *rotation)
        if kv_cache is not None:
            end, sink = current_start + x.shape[1], self.sink_size * rows * columns
            over, last = end - int(kv_cache["global_end_index"]), int(kv_cache["local_end_index"])
            excess = last + over - kv_cache["k"].shape[1]
            if over > 0 and excess > 0:
                for name in ("k", "v"):
                    kv_cache[name][:, sink : last - excess] = kv_cache[name][:, sink + excess : last].clone()
                last -= excess
            last += over
            kv_cache["k"][:, last - x.shape[1] : last], kv_cache["v"][:, last - x.shape[1] : last] = k, v
            k, v = kv_cache["k"][:, :last], kv_cache["v"][:, :last]
            kv_cache["global_end_index"].fill_(end)
            kv_cache["local_end_index"].fill_(last)
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        return self.o(out.flatten(2))


class LaterAttention(TheirAttention):
    """LongLive's signature and return value."""

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        out = super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start, cache_start)
        if kv_cache is None:
            return out
        return out, (int(kv_cache["global_end_index"]), int(kv_cache["local_end_index"]), None)


class OlderAttention(TheirAttention):
    """CausVid's signature: the caller says where the chunk begins and ends, and the cache has no indices."""

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, current_end=0):
        if kv_cache is not None:
            for name in ("global_end_index", "local_end_index"):
                kv_cache = {**kv_cache, name: torch.tensor([current_start])}
        return super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, current_start)


class RawKeysAttention(LaterAttention):
    """LongLive's with `use_infinite_attention`: the cache holds keys before RoPE, rotated to their places in it."""

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        if kv_cache is None:
            return super().forward(x, seq_lens, grid_sizes, freqs, block_mask)
        size = x.shape[1]
        q, k = (norm(linear(x)).unflatten(2, (HEADS, -1))
                for norm, linear in ((self.norm_q, self.q), (self.norm_k, self.k)))  # fmt: skip
        v = self.v(x).unflatten(2, (HEADS, -1))
        end = int(kv_cache["local_end_index"]) + current_start + size - int(kv_cache["global_end_index"])
        keys = torch.cat([kv_cache["k"][:, : end - size], k], dim=1)
        values = torch.cat([kv_cache["v"][:, : end - size], v], dim=1)
        turn = rope_rotation(HEAD_DIM, torch.arange(end // T), torch.arange(ROWS), torch.arange(COLUMNS))
        keys = apply_rotation(keys, *turn)
        q = apply_rotation(q, *(part[:, end - size :] for part in turn))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, keys, values))).transpose(1, 2)
        update = {"action": "direct_insert", "new_k": k, "new_v": v}
        return self.o(out.flatten(2)), (current_start + size, end, update)


class LaterAttentionThatUpdates(LaterAttention):
    """LongLive's: what is to be written is returned, and the cache is left as it is."""

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        sink_recache_after_switch=False,
    ):  # fmt: skip
        if kv_cache is None:
            return super().forward(x, seq_lens, grid_sizes, freqs, block_mask)
        copy = {name: tensor.clone() for name, tensor in kv_cache.items() if isinstance(tensor, torch.Tensor)}
        out, (end, last, _) = super().forward(
            x, seq_lens, grid_sizes, freqs, block_mask, copy, current_start, cache_start, sink_recache_after_switch
        )
        return out, (end, last, {"new_k": copy["k"][:, last - x.shape[1] : last]})


class ShotAttention(TheirAttention):
    """LongLive 2's signature."""

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        t_scale=1.0, use_relative_rope=False, method="linear", original_seq_len=None, temporal_offset=0.0,
    ):  # fmt: skip
        raise AssertionError("never called")


class BankAttention(TheirAttention):
    """The signature of MemFlow's own model."""

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        kv_bank=None, update_bank=None, is_recache=None,
    ):  # fmt: skip
        raise AssertionError("never called")


class ScaledAttention(TheirAttention):
    """An option that nobody here knows."""

    def forward(
        self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None,
        temperature=1.0,
    ):  # fmt: skip
        raise AssertionError("never called")


def new_cache(frames, batch=1, dtype=torch.float32):
    shape = (batch, frames * T, HEADS, HEAD_DIM)
    ends = (torch.zeros(1, dtype=torch.long) for _ in range(2))
    return {"k": torch.zeros(shape, dtype=dtype), "v": torch.zeros(shape, dtype=dtype),
            **dict(zip(("global_end_index", "local_end_index"), ends, strict=True))}  # fmt: skip


def call(module, x, kv_cache, first_frame, **options):
    grid = torch.tensor([[x.shape[1] // T, ROWS, COLUMNS]] * len(x))
    arguments = (torch.tensor([x.shape[1]]), grid, None, None)
    with torch.no_grad():
        return module(x, *arguments, kv_cache=kv_cache, current_start=first_frame * T, **options)


def both(kind=TheirAttention, **options):
    """A module of theirs, a copy of it that can be swapped, and a model around that copy."""
    theirs, ours = kind(**options), kind(**options)
    ours.load_state_dict(theirs.state_dict())
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"self_attn": ours, "other": nn.Linear(2, 2)})])})
    return theirs, ours, model


@pytest.mark.parametrize("sink, capacity", [(0, 12), (3, 12), (1, 7)])
@pytest.mark.parametrize("window", [1, 3, 5, 100])
@pytest.mark.parametrize("dense_sink", [False, True])
def test_all_blocks_are_their_full_attention(sink, capacity, window, dense_sink):
    """With every block selected, nothing differs while the cache fills, evicts, and is passed over again."""
    theirs, ours, model = both(sink_size=sink)
    options = {"window_frames": window, "dense_sink": dense_sink}
    assert swap_attention(model, **options, top_k=1000, block_size=4, query_group=7) == 1
    their_cache, our_cache = new_cache(capacity, 2), new_cache(capacity, 2)
    for first in [0, 0, 3, 3, 6, 9, 9, 12, 15, 18, 18, 21, 18, 21]:
        x = torch.randn(2, 3 * T, DIM)
        expected = call(theirs, x, their_cache, first)
        assert (call(ours, x, our_cache, first) - expected).abs().max() <= 1e-5
        for name in ("global_end_index", "local_end_index"):
            assert torch.equal(our_cache[name], their_cache[name])
    for name in ("k", "v"):
        assert (our_cache[name] - their_cache[name]).abs().max() <= 1e-5


def test_tokens_may_lie_in_strips():
    """Full attention is the same, their own forward finds nothing to complain of, and blocks are others."""
    theirs, ours, model = both(sink_size=1)
    swap_attention(model, window_frames=3, top_k=1000, block_size=4, query_group=7, token_order="strips")
    their_cache, our_cache = new_cache(9, 2), new_cache(9, 2)
    for first in (0, 0, 3, 3, 6, 9, 9, 12):
        x = torch.randn(2, 3 * T, DIM)
        expected = call(theirs, x, their_cache, first)
        assert (call(ours, x, our_cache, first) - expected).abs().max() <= 1e-5
    in_strips = their_cache["k"].unflatten(1, (-1, T))[:, :, strip_order(ROWS, COLUMNS)].flatten(1, 2)
    assert (our_cache["k"] - in_strips).abs().max() <= 1e-5 and not torch.equal(our_cache["k"], their_cache["k"])
    restore_attention(model)
    caches = [{name: x.clone() for name, x in their_cache.items() if isinstance(x, torch.Tensor)} for _ in range(2)]
    caches[1] |= {name: our_cache[name].clone() for name in ("k", "v")}
    outs = []
    for order, cache in zip(("raster", "strips"), caches, strict=True):
        swap_attention(model, window_frames=3, top_k=1, block_size=4, token_order=order)
        outs.append(call(ours, x, cache, 12))
        restore_attention(model)
    assert (outs[0] - outs[1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="token_order must be raster or strips"):
        swap_attention(model, token_order="hilbert")


@pytest.mark.parametrize("score", ["mean", "moments"])
def test_old_frames_are_attended_to_by_blocks(score):
    """Compared with the operator called by hand, which computes the descriptors itself."""
    cache, past = new_cache(20), 11 * T
    for first in range(0, 15, 3):
        q, k, v = torch.randn(3, 1, 3 * T, HEADS, HEAD_DIM)
        attention = CacheAttention(window_frames=4, top_k=2, block_size=4, query_group=6, score=score)
        out, end = attend_with_cache(q, k, v, cache, first * T, attention, frame_tokens=T)
    assert end == 15 * T
    keys, values = cache["k"][:, :end], cache["v"][:, :end]
    expected = memory_attention(
        q, keys[:, past:], values[:, past:], keys[:, :past], values[:, :past],
        top_k=2, block_size=4, frame_tokens=T, query_group=6, score=score,
    )  # fmt: skip
    assert torch.equal(out, expected)
    full = memory_attention(q, keys, values)
    assert (out - full).abs().max() > 0.01


@pytest.mark.parametrize("block_size", [4, T], ids=["blocks", "a-frame-is-a-block"])
def test_descriptors_move_with_the_keys_of_an_eviction(block_size):
    """A cache that has evicted frames attends as one whose descriptors are computed from the same keys again."""
    attention = CacheAttention(window_frames=3, top_k=2, block_size=block_size, query_group=6, score="moments")
    cache = new_cache(9)
    for first in range(0, 18, 3):
        before = {name: tensor.clone() for name, tensor in cache.items() if isinstance(tensor, torch.Tensor)}
        q, k, v = torch.randn(3, 1, 3 * T, HEADS, HEAD_DIM)
        out, _ = attend_with_cache(q, k, v, cache, first * T, attention, frame_tokens=T, sink_frames=2)
        anew, _ = attend_with_cache(q, k, v, before, first * T, attention, frame_tokens=T, sink_frames=2)
        assert torch.equal(cache["k"], before["k"])
        assert (out - anew).abs().max() <= 1e-6


def test_sink_is_attended_to_in_full_unless_its_blocks_are_to_be_chosen():
    """A video that is no longer than sink and window is not changed by the swap, as their attention to it is dense."""
    theirs, ours, model = both(sink_size=3)
    swap_attention(model, window_frames=4, top_k=1, block_size=4)
    their_cache, our_cache = new_cache(7), new_cache(7)
    for first in (0, 3, 4, 7, 10):
        x = torch.randn(1, (3 if first != 3 else 1) * T, DIM)
        assert (call(ours, x, our_cache, first) - call(theirs, x, their_cache, first)).abs().max() <= 1e-5
    restore_attention(model)
    swap_attention(model, window_frames=4, top_k=1, block_size=4, dense_sink=False, compare=False)
    assert (call(ours, x, our_cache, 10) - call(theirs, x, their_cache, 10)).abs().max() > 0.01


def test_a_dense_sink_and_chosen_blocks_share_one_softmax():
    """The keys that a query sees, in a cache that is longer than sink and window: with one block of each frame, by
    hand."""
    cache = new_cache(20)
    attention = CacheAttention(window_frames=4, top_k=2, block_size=T, query_group=None)
    for first in range(0, 15, 3):
        q, k, v = torch.randn(3, 1, 3 * T, HEADS, HEAD_DIM)
        out, end = attend_with_cache(q, k, v, cache, first * T, attention, frame_tokens=T, sink_frames=2)
    keys, values = (cache[name][:, :end].unflatten(1, (-1, T)) for name in ("k", "v"))
    expected = torch.empty_like(out)
    for head in range(HEADS):
        scores = keys[0, 2:11, :, head].mean(1) @ q[0, :, head].mean(0)
        seen = [0, 1, *(2 + scores.topk(2).indices).tolist(), *range(11, 15)]
        chosen = (pool[:, seen, :, head].flatten(1, 2)[:, None] for pool in (keys, values))
        expected[:, :, head] = F.scaled_dot_product_attention(q[:, None, :, head], *chosen)[:, 0]
    assert (out - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("window", [1, 4, 100])
def test_a_cache_without_indices_is_followed(window):
    """The positions of a call are places in the cache; a second video begins at 0 again, over the keys of the first."""
    theirs, ours, model = both(OlderAttention)
    swap_attention(model, window_frames=window, top_k=1000, block_size=4, query_group=7)
    their_cache, our_cache = ({name: torch.zeros(2, 12 * T, HEADS, HEAD_DIM) for name in "kv"} for _ in range(2))
    for first in [0, 0, 3, 3, 6, 9, 9, 0, 3, 3]:
        x, ends = torch.randn(2, 3 * T, DIM), {"current_end": (first + 3) * T}
        expected = call(theirs, x, their_cache, first, **ends)
        assert (call(ours, x, our_cache, first, **ends) - expected).abs().max() <= 1e-5
    for name in "kv":
        assert (our_cache[name] - their_cache[name]).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="ends at 130, beyond the 120 tokens"):
        call(ours, x, our_cache, 10, current_end=13 * T)
    with pytest.raises(ValueError, match="current_end must be current_start"):
        call(ours, x, our_cache, 3, current_end=5 * T)


def test_blocks_of_a_cache_without_indices_are_those_of_a_cache_with_them():
    _, older, older_model = both(OlderAttention)
    _, ours, model = both()
    ours.load_state_dict(older.state_dict())
    for one in (older_model, model):
        swap_attention(one, window_frames=1, top_k=2, block_size=4, query_group=6)
    bare, indexed = {name: torch.zeros(1, 12 * T, HEADS, HEAD_DIM) for name in "kv"}, new_cache(12)
    for first in (0, 3, 6, 9):
        x = torch.randn(1, 3 * T, DIM)
        expected = call(ours, x, indexed, first)
        assert torch.equal(call(older, x, bare, first, current_end=(first + 3) * T), expected)


def test_caches_that_others_write_are_described_anew():
    theirs, ours, model = both()
    swap_attention(model, window_frames=1, top_k=2, block_size=4, query_group=None)
    cache, other = new_cache(20), new_cache(20)
    for first in (0, 3, 6):
        call(ours, torch.randn(1, 3 * T, DIM), cache, first)
    # Other code resets the cache in place and fills it with other frames.
    restore_attention(model)
    for name in ("global_end_index", "local_end_index"):
        cache[name].zero_()
    for first in (0, 3, 6):
        x = torch.randn(1, 3 * T, DIM)
        for one in (cache, other):
            call(theirs, x, one, first)
    swap_attention(model, window_frames=1, top_k=2, block_size=4, query_group=None)
    x = torch.randn(1, 3 * T, DIM)
    assert torch.equal(call(ours, x, cache, 9), call(ours, x, other, 9))


def test_host_reads_no_index_that_it_has_written(monkeypatch):
    _, ours, model = both()
    swap_attention(model, window_frames=3, top_k=2, block_size=4, compare=False)
    cache, reads = new_cache(20), []
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: reads.append(self.shape) or self.item())
    for first in (0, 0, 3, 3, 6):
        call(ours, torch.randn(1, 3 * T, DIM), cache, first)
    assert reads.count(cache["global_end_index"].shape) == 2  # two indices, at the very first call


def test_later_kind_says_where_the_cache_ends():
    theirs, ours, model = both(LaterAttention, sink_size=3)
    swap_attention(model, window_frames=2, top_k=1000, block_size=4)
    their_cache, our_cache = new_cache(9), new_cache(9)
    for first in (0, 3, 6, 9):
        x = torch.randn(1, 3 * T, DIM)
        (expected, their_end), (out, our_end) = call(theirs, x, their_cache, first), call(ours, x, our_cache, first)
        assert (out - expected).abs().max() <= 1e-5 and our_end == their_end
    # All nine frames are re-cached at once. The sink keeps what it holds, unless it is to be re-cached too.
    x, sink = torch.randn(1, 9 * T, DIM), our_cache["k"][:, : 3 * T].clone()
    call(ours, x, our_cache, 3)
    assert torch.equal(our_cache["k"][:, : 3 * T], sink)
    call(ours, x, our_cache, 3, sink_recache_after_switch=True)
    assert not torch.equal(our_cache["k"][:, : 3 * T], sink)


@pytest.mark.parametrize("kind", [TheirAttention, LaterAttention, LaterAttentionThatUpdates, OlderAttention])
def test_calls_without_a_cache_and_after_restoring_go_the_old_way(kind):
    theirs, ours, model = both(kind)
    x = torch.randn(1, 6 * T, DIM)
    swap_attention(model)
    assert torch.equal(call(ours, x, None, 0), call(theirs, x, None, 0))
    restore_attention(model)
    assert "forward" not in vars(ours)
    swap_attention(model)


@pytest.mark.parametrize("kind", [TheirAttention, LaterAttentionThatUpdates])
def test_half_precision(kind):
    _, ours, model = both(kind)
    swap_attention(model.bfloat16(), window_frames=3, top_k=4, block_size=4)
    cache = new_cache(20, dtype=torch.bfloat16)
    for first in (0, 3, 6):
        out = call(ours, torch.randn(1, 3 * T, DIM, dtype=torch.bfloat16), cache, first)
        out = out[0] if isinstance(out, tuple) else out
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_what_does_not_fit_is_refused():
    _, ours, model = both(sink_size=3)
    with pytest.raises(ValueError, match="no self-attention"):
        swap_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="window_frames"):
        swap_attention(model, window_frames=0)
    swap_attention(model)
    with pytest.raises(ValueError, match="swapped already"):
        swap_attention(model)
    cache = new_cache(5)
    call(ours, torch.randn(1, 3 * T, DIM), cache, 0)
    before = cache["k"].clone()
    for first, frames, message in ((9, 3, "begins at 90, beyond"), (3, 3, "at least the sink and the chunk")):
        with pytest.raises(ValueError, match=message):
            call(ours, torch.randn(1, frames * T, DIM), cache, first)
    q = torch.randn(1, T + 1, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="whole frames"):
        attend_with_cache(q, q, q, cache, 0, CacheAttention(), frame_tokens=T)
    assert torch.equal(cache["k"], before) and math.prod(cache["global_end_index"].shape) == 1


@pytest.mark.parametrize(
    "kind, message",
    [
        (ShotAttention, "LongLive 2's attention"),
        (BankAttention, "MemFlow's own attention, which has a memory bank of its own"),
        (ScaledAttention, "options that are not known here: temperature"),
    ],
)
def test_a_forward_with_other_options_is_refused_and_nothing_is_changed(kind, message):
    model = nn.ModuleList([TheirAttention(), kind()])
    with pytest.raises(ValueError, match=message):
        swap_attention(model)
    assert not any("forward" in vars(module) for module in model)


def test_options_are_never_swallowed():
    _, ours, model = both()
    swap_attention(model)
    x = torch.randn(1, 3 * T, DIM)
    for cache in (new_cache(9), None):
        with pytest.raises(TypeError, match="sink_recache_after_switch"):
            call(ours, x, cache, 0, sink_recache_after_switch=True)


def test_keys_that_are_cached_before_rope_are_refused_on_the_first_call():
    """The output of the first chunk is the same, so only the written keys tell."""
    theirs, ours, model = both(RawKeysAttention, sink_size=3)
    swap_attention(model, window_frames=9)
    cache, x = new_cache(9), torch.randn(1, 3 * T, DIM)
    before = {name: tensor.clone() for name, tensor in cache.items()}
    with pytest.raises(ValueError, match=r"RawKeysAttention is called as LongLive 1's attention is.*keys differ by"):
        call(ours, x, cache, 0)
    assert cache.keys() == before.keys() and all(torch.equal(cache[name], before[name]) for name in before)
    restore_attention(model)
    assert torch.equal(call(ours, x, cache, 0)[0], call(theirs, x, cache, 0)[0])


class AnewAttention(TheirAttention):
    """Positions begin anew with every chunk, which does not show in the first one."""

    def forward(self, x, seq_lens, grid_sizes, freqs, block_mask, kv_cache=None, current_start=0, cache_start=None):
        kv_cache["global_end_index"] -= current_start
        out = super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, 0)
        kv_cache["global_end_index"] += current_start
        return out


def test_what_differs_only_later_is_refused_on_the_first_later_call():
    _, ours, model = both(AnewAttention)
    swap_attention(model, window_frames=9)
    cache = new_cache(9)
    call(ours, torch.randn(1, 3 * T, DIM), cache, 0)
    with pytest.raises(ValueError, match="at token 30, "):
        call(ours, torch.randn(1, 3 * T, DIM), cache, 3)


@pytest.mark.parametrize("kind", [TheirAttention, LaterAttentionThatUpdates])
def test_their_forward_is_called_for_the_first_two_chunks_only(kind, monkeypatch):
    _, ours, model = both(kind)
    seen, original = [], kind.forward

    def counted(self, *arguments, **named):
        seen.append(named["current_start"])
        return original(self, *arguments, **named)

    counted.__signature__ = inspect.signature(original)
    monkeypatch.setattr(kind, "forward", counted)
    swap_attention(model, window_frames=3)
    cache = new_cache(12)
    for first in (0, 0, 3, 3, 6):
        call(ours, torch.randn(1, 3 * T, DIM), cache, first)
    assert seen == [0, 3 * T]
    restore_attention(model)
    swap_attention(model, window_frames=3, compare=False)
    call(ours, torch.randn(1, 3 * T, DIM), cache, 9)
    assert seen == [0, 3 * T]


def test_their_limit_on_what_is_attended_to_does_not_hold_in_the_comparison():
    """A lengthened cache is longer than what their attention was set to see."""
    _, ours, model = both()
    ours.max_attention_size = 3
    swap_attention(model, window_frames=3)
    call(ours, torch.randn(1, 3 * T, DIM), new_cache(12), 0)
    assert ours.max_attention_size == 3


def test_a_forward_that_fails_by_itself_is_named(monkeypatch):
    """For one, because it needs a package for CUDA and runs on a CPU."""
    _, ours, model = both()
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *arguments: 1 / 0)
    swap_attention(model, impl="reference")
    cache, x = new_cache(9), torch.randn(1, 3 * T, DIM)
    with pytest.raises(
        RuntimeError, match=r"TheirAttention's own forward fails here.*ZeroDivisionError.*compare=False"
    ):
        call(ours, x, cache, 0)
    assert not cache["k"].any()
    restore_attention(model)
    swap_attention(model, impl="reference", compare=False)
    assert call(ours, x, cache, 0).isfinite().all()
