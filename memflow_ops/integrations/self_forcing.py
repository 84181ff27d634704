"""Our attention in causal models of the Self-Forcing kind (CausVid, Self-Forcing, LongLive), over their own cache.

    from memflow_ops.integrations.self_forcing import swap_attention, restore_attention

    swap_attention(model, window_frames=9, top_k=24)  # every self-attention module of the loaded model
    video = pipeline.inference(noise, prompts)        # their own code, with a cache of as many frames as you like
    restore_attention(model)

Their self-attention modules hold q, k, v, o, norm_q, norm_k, num_heads, and optionally sink_size (frames that are never
evicted). A call hands over a cache of one layer,

    {"k": (B, S, H, D), "v": (B, S, H, D), "global_end_index": (1,) int64, "local_end_index": (1,) int64}

with rotated keys of the frames so far, oldest first, the position in the whole video at which they end, and the number
of tokens that the cache holds. There, every query attends to all of the cache. Here, it attends to the newest frames in
full and only to the `top_k` most relevant blocks of the older ones, so that the cache can be made much longer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from memflow_ops.ops.attention import memory_attention
from memflow_ops.ops.selection import describe_blocks
from memflow_ops.rotary import apply_rotation, rope_rotation

_OWN_ENTRY = "memflow"
"""The key of our entry in their cache."""
_ORIGINAL = "_memflow_original_forward"


@dataclass(frozen=True)
class CacheAttention:
    """How a chunk attends to a cache: the newest frames in full, and selected blocks of the older ones."""

    window_frames: int = 9
    """The newest frames, attended to in full; at least the chunk itself."""
    top_k: int = 24
    """Blocks of older frames that each query group attends to."""
    block_size: int = 64
    """Tokens of a block."""
    query_group: int | None = 128
    """Consecutive queries that share a selection; None: the whole chunk."""
    impl: str = "auto"
    """Implementation of `memory_attention`."""


def swap_attention(
    model: nn.Module,
    *,
    window_frames: int = 9,
    top_k: int = 24,
    block_size: int = 64,
    query_group: int | None = 128,
    impl: str = "auto",
) -> int:
    """Makes every self-attention module in `model` (itself included) attend with ours; returns how many there are.

    The options are those of `CacheAttention`. Calls without a cache, as in training, are left to the original forward.
    `restore_attention` undoes the swap. A ValueError where there is no such module, or one that is swapped already.
    """
    modules = list(_self_attention(model))
    if not modules:
        raise ValueError(
            "no self-attention of the Self-Forcing kind in this model: expected modules with q, k, v, o, norm_q, "
            "norm_k, num_heads, and a forward that takes kv_cache and current_start"
        )
    if any(_ORIGINAL in vars(module) for module in modules):
        raise ValueError("attention has been swapped already; restore_attention(model) first")
    if window_frames < 1:
        raise ValueError(f"window_frames must be positive, got {window_frames}")
    attention = CacheAttention(window_frames, top_k, block_size, query_group, impl)
    for module in modules:
        original = module.forward
        vars(module)[_ORIGINAL] = original
        module.forward = _Forward(module, original, attention)
    return len(modules)


def restore_attention(model: nn.Module) -> None:
    """Gives every module that `swap_attention` has changed its own forward back."""
    for module in model.modules():
        if _ORIGINAL in vars(module):
            del vars(module)[_ORIGINAL], vars(module)["forward"]


def _self_attention(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        parts = all(hasattr(module, name) for name in ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads"))
        if parts and {"kv_cache", "current_start"} <= inspect.signature(module.forward).parameters.keys():
            yield module


class _Forward:
    """The forward of a swapped module."""

    def __init__(self, module: Any, original: Any, attention: CacheAttention):
        self.module, self.original, self.attention = module, original, attention
        self.reports_end = "sink_recache_after_switch" in inspect.signature(original).parameters
        """Whether the forward also returns where the cache ends: LongLive's model stores that after all layers."""

    def __call__(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Any,
        freqs: Any,
        block_mask: Any = None,
        kv_cache: MutableMapping[str, Any] | None = None,
        current_start: int = 0,
        cache_start: int | None = None,
        sink_recache_after_switch: bool = False,
        **options: Any,
    ) -> Any:
        """x (B, F * T, dim), grid_sizes (B, 3) frames, rows, columns -> (B, F * T, dim), called as theirs is."""
        if kv_cache is None:
            if self.reports_end:
                options["sink_recache_after_switch"] = sink_recache_after_switch
            options |= {"kv_cache": None, "current_start": current_start, "cache_start": cache_start}
            return self.original(x, seq_lens, grid_sizes, freqs, block_mask, **options)
        module = self.module
        frames, rows, columns = (int(n) for n in grid_sizes[0])
        tokens = rows * columns
        heads = (module.num_heads, x.shape[-1] // module.num_heads)
        q, k = (
            norm(linear(x)).unflatten(2, heads)
            for norm, linear in ((module.norm_q, module.q), (module.norm_k, module.k))
        )
        v = module.v(x).unflatten(2, heads)
        first = current_start // tokens
        places = torch.arange(first, first + frames, device=x.device)
        rotation = rope_rotation(heads[1], places, *(torch.arange(n, device=x.device) for n in (rows, columns)))
        out, end = attend_with_cache(
            apply_rotation(q, *rotation),
            apply_rotation(k, *rotation),
            v,
            kv_cache,
            current_start,
            self.attention,
            frame_tokens=tokens,
            sink_frames=getattr(module, "sink_size", 0),
            keep_sink=self.reports_end and not sink_recache_after_switch,
        )
        out = module.o(out.flatten(2))
        return (out, (current_start + x.shape[1], end, None)) if self.reports_end else out


def attend_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_cache: MutableMapping[str, Any],
    current_start: int,
    attention: CacheAttention,
    *,
    frame_tokens: int,
    sink_frames: int = 0,
    keep_sink: bool = False,
) -> tuple[Tensor, int]:
    """Writes a chunk's keys and values into their cache, and attends to its newest frames and selected older blocks.

    q, k, v: (B, chunk tokens, H, D), projected, normalised, q and k rotated; whole frames of `frame_tokens`.
    kv_cache: of this layer, as the module's docstring has it. Its indices are moved on as their own code would, and the
        block descriptors of its keys are kept in it.
    current_start: position of the chunk's first token in the whole video.
    sink_frames: first frames of the cache, which stay when the oldest of the others are evicted.
    keep_sink: whether passing over earlier frames once more (re-caching) leaves the sink as it is.

    Returns out (B, chunk tokens, H, D) and the token at which the cache now ends. The host reads their indices, which
    waits for the device, only where somebody else has written them.

    A ValueError where the chunk and the cache do not fit each other.
    """
    keys, values = kv_cache["k"], kv_cache["v"]
    size, sink = k.shape[1], sink_frames * frame_tokens
    if size % frame_tokens or current_start % frame_tokens:
        raise ValueError(
            f"a chunk is whole frames of {frame_tokens} tokens, got {size} tokens from position {current_start} on"
        )
    described = _DescribedCache.of(kv_cache, attention.block_size, frame_tokens)
    start, end, new = described.make_room(current_start, size, sink)
    written = max(start, sink) if keep_sink and new <= 0 and current_start > 0 else start
    keys[:, written:end] = k[:, written - start :]
    values[:, written:end] = v[:, written - start :]
    described.describe(written, end)
    past = max(0, end - max(attention.window_frames * frame_tokens, size))
    out = memory_attention(
        q,
        keys[:, past:end],
        values[:, past:end],
        keys[:, :past],
        values[:, :past],
        memory_descriptors=described.descriptors[:, : past // frame_tokens * described.blocks_per_frame],
        top_k=attention.top_k,
        block_size=described.block_size,
        frame_tokens=frame_tokens,
        query_group=attention.query_group,
        impl=attention.impl,
    )
    described.move_indices(kv_cache, current_start + size, end)
    return cast(Tensor, out), end


class _DescribedCache:
    """A cache of theirs with what we keep beside it: block descriptors of its keys, and how we left its indices."""

    def __init__(self, keys: Tensor, values: Tensor, block_size: int, frame_tokens: int):
        self.keys, self.values = keys, values
        self.block_size, self.frame_tokens = min(block_size, frame_tokens), frame_tokens
        self.blocks_per_frame = -(-frame_tokens // self.block_size)
        frames = keys.shape[1] // frame_tokens
        self.descriptors = keys.new_zeros(keys.shape[0], frames * self.blocks_per_frame, *keys.shape[2:])
        self.ends = 0, 0
        """Where the cache ends: in the whole video, and in the cache."""
        self._left: list[Any] = []

    @classmethod
    def of(cls, kv_cache: MutableMapping[str, Any], block_size: int, frame_tokens: int) -> _DescribedCache:
        """Our entry in the cache, brought up to date where somebody else has written to the cache since."""
        own, keys = kv_cache.get(_OWN_ENTRY), kv_cache["k"]
        sizes = (min(block_size, frame_tokens), frame_tokens)
        if own is None or own.keys is not keys or (own.block_size, own.frame_tokens) != sizes:
            own = kv_cache[_OWN_ENTRY] = cls(keys, kv_cache["v"], *sizes)
        if not _unchanged(own._left, _state(kv_cache)):
            own.ends = int(kv_cache["global_end_index"]), int(kv_cache["local_end_index"])
            own.describe(0, own.ends[1])
        return own

    def make_room(self, current_start: int, size: int, sink: int) -> tuple[int, int, int]:
        """Finds the tokens of the cache for a chunk of `size` tokens, and evicts the oldest beyond its capacity.

        current_start: position of the chunk in the whole video. sink: first tokens of the cache, which stay. Returns
        where the chunk begins and ends in the cache, and how far the cache grows in the whole video: 0 or less where
        the chunk has been passed over before. A ValueError where chunk and cache do not fit each other.
        """
        capacity = self.keys.shape[1]
        global_end, local_end = self.ends
        if not local_end:
            local_end, new = size, size  # an empty cache begins wherever the chunk does
        elif current_start > global_end:
            raise ValueError(
                f"the chunk begins at {current_start}, beyond what the cache holds, which ends at {global_end}"
            )
        else:
            new = current_start + size - global_end
            local_end += new
        if local_end > capacity:
            kept = capacity - sink - new
            if capacity % self.frame_tokens or kept < 0:
                raise ValueError(
                    f"the cache must hold whole frames of {self.frame_tokens} tokens, at least the sink and the chunk "
                    f"({sink} + {size} tokens), got room for {capacity}"
                )
            self._evict(sink, local_end - capacity, kept)
            local_end = capacity
        start = local_end - size
        if start < 0:
            raise ValueError(f"position {current_start} has left the cache, which ends at {global_end}")
        return start, local_end, new

    def _evict(self, sink: int, evicted: int, kept: int) -> None:
        """Drops `evicted` tokens after the sink; the `kept` tokens after them move up."""
        tokens, blocks = self.frame_tokens, self.blocks_per_frame
        for pool, per_frame in ((self.keys, tokens), (self.values, tokens), (self.descriptors, blocks)):
            target, source, length = (n // tokens * per_frame for n in (sink, sink + evicted, kept))
            pool[:, target : target + length] = pool[:, source : source + length].clone()

    def describe(self, start: int, end: int) -> None:
        """Computes the descriptors of the whole frames between two tokens."""
        first, last = start // self.frame_tokens, end // self.frame_tokens
        if first < last:
            keys = self.keys[:, first * self.frame_tokens : last * self.frame_tokens]
            places = slice(first * self.blocks_per_frame, last * self.blocks_per_frame)
            self.descriptors[:, places] = describe_blocks(keys, self.block_size, self.frame_tokens)

    def move_indices(self, kv_cache: MutableMapping[str, Any], global_end: int, local_end: int) -> None:
        """Writes their indices, which are tensors in some projects and integers in others."""
        self.ends = global_end, local_end
        for name, end in zip(("global_end_index", "local_end_index"), self.ends, strict=True):
            if isinstance(kv_cache[name], Tensor):
                kv_cache[name].fill_(end)
            else:
                kv_cache[name] = end
        self._left = _state(kv_cache)


def _state(kv_cache: MutableMapping[str, Any]) -> list[Any]:
    """The keys and indices of a cache, and how often torch has seen them written."""
    state: list[Any] = []
    for name in ("k", "global_end_index", "local_end_index"):
        value = kv_cache[name]
        # A tensor that was made in inference mode has no count, so it may have been written at any time.
        counted = isinstance(value, Tensor) and not value.is_inference()
        state += [value, value._version if counted else object() if isinstance(value, Tensor) else None]
    return state


def _unchanged(before: list[Any], now: list[Any]) -> bool:
    """Whether nobody has written or replaced anything between two states; integers are compared by value."""
    if len(before) != len(now):
        return False
    return all(a is b or (isinstance(a, int) and a == b) for a, b in zip(before, now, strict=True))
