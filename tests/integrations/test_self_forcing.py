"""Our attention in modules of the Self-Forcing kind, compared with such modules as they are."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memflow_ops import memory_attention
from memflow_ops.integrations.self_forcing import CacheAttention, attend_with_cache, restore_attention, swap_attention
from memflow_ops.model.wan.transformer import RMSNorm
from memflow_ops.rotary import apply_rotation, rope_rotation

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
def test_all_blocks_are_their_full_attention(sink, capacity, window):
    """With every block selected, nothing differs while the cache fills, evicts, and is passed over again."""
    theirs, ours, model = both(sink_size=sink)
    assert swap_attention(model, window_frames=window, top_k=1000, block_size=4, query_group=7) == 1
    their_cache, our_cache = new_cache(capacity, 2), new_cache(capacity, 2)
    for first in [0, 0, 3, 3, 6, 9, 9, 12, 15, 18, 18, 21, 18, 21]:
        x = torch.randn(2, 3 * T, DIM)
        expected = call(theirs, x, their_cache, first)
        assert (call(ours, x, our_cache, first) - expected).abs().max() <= 1e-5
        for name in ("global_end_index", "local_end_index"):
            assert torch.equal(our_cache[name], their_cache[name])
    for name in ("k", "v"):
        assert (our_cache[name] - their_cache[name]).abs().max() <= 1e-5


def test_old_frames_are_attended_to_by_blocks():
    """Compared with the operator called by hand, which computes the descriptors itself."""
    cache, past = new_cache(20), 11 * T
    for first in range(0, 15, 3):
        q, k, v = torch.randn(3, 1, 3 * T, HEADS, HEAD_DIM)
        attention = CacheAttention(window_frames=4, top_k=2, block_size=4, query_group=6)
        out, end = attend_with_cache(q, k, v, cache, first * T, attention, frame_tokens=T)
    assert end == 15 * T
    keys, values = cache["k"][:, :end], cache["v"][:, :end]
    expected = memory_attention(
        q, keys[:, past:], values[:, past:], keys[:, :past], values[:, :past],
        top_k=2, block_size=4, frame_tokens=T, query_group=6,
    )  # fmt: skip
    assert torch.equal(out, expected)
    full = memory_attention(q, keys, values)
    assert (out - full).abs().max() > 0.01


@pytest.mark.parametrize("block_size", [4, T], ids=["blocks", "a-frame-is-a-block"])
def test_descriptors_move_with_the_keys_of_an_eviction(block_size):
    """A cache that has evicted frames attends as one whose descriptors are computed from the same keys again."""
    attention = CacheAttention(window_frames=3, top_k=2, block_size=block_size, query_group=6)
    cache = new_cache(9)
    for first in range(0, 18, 3):
        before = {name: tensor.clone() for name, tensor in cache.items() if isinstance(tensor, torch.Tensor)}
        q, k, v = torch.randn(3, 1, 3 * T, HEADS, HEAD_DIM)
        out, _ = attend_with_cache(q, k, v, cache, first * T, attention, frame_tokens=T, sink_frames=2)
        anew, _ = attend_with_cache(q, k, v, before, first * T, attention, frame_tokens=T, sink_frames=2)
        assert torch.equal(cache["k"], before["k"])
        assert (out - anew).abs().max() <= 1e-6


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
    swap_attention(model, window_frames=3, top_k=2, block_size=4)
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


@pytest.mark.parametrize("kind", [TheirAttention, LaterAttention])
def test_calls_without_a_cache_and_after_restoring_go_the_old_way(kind):
    theirs, ours, model = both(kind)
    x = torch.randn(1, 6 * T, DIM)
    swap_attention(model)
    assert torch.equal(call(ours, x, None, 0), call(theirs, x, None, 0))
    restore_attention(model)
    assert "forward" not in vars(ours)
    swap_attention(model)


def test_half_precision():
    _, ours, model = both()
    swap_attention(model.bfloat16(), window_frames=3, top_k=4, block_size=4)
    cache = new_cache(20, dtype=torch.bfloat16)
    for first in (0, 3, 6):
        out = call(ours, torch.randn(1, 3 * T, DIM, dtype=torch.bfloat16), cache, first)
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
