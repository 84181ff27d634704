"""Attention of a chunk to the key-value cache that belongs to another project's model.

A cache of one layer is a dictionary,

    {"k": (B, S, H, D), "v": (B, S, H, D), "global_end_index": (1,) int64, "local_end_index": (1,) int64}

with rotated keys of the frames so far, oldest first, the position in the whole video at which they end, and the number
of tokens that the cache holds. CausVid's has no indices: position in the video and place in the cache are the same, and
nothing is ever evicted.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from memflow_ops.geometry import Score, descriptor_width
from memflow_ops.ops.attention import memory_attention
from memflow_ops.ops.checks import check_score
from memflow_ops.ops.selection import describe_blocks
from memflow_ops.token_order import TokenOrderName

_OWN_ENTRY = "memflow"
"""The key of our entry in their cache."""
_INDICES = ("global_end_index", "local_end_index")


@dataclass(frozen=True)
class CacheAttention:
    """How a chunk attends to a cache: the newest frames and the sink in full, and selected blocks of all others."""

    window_frames: int = 9
    """The newest frames, attended to in full; at least the chunk itself."""
    top_k: int = 24
    """Blocks of older frames that each query group attends to."""
    block_size: int = 64
    """Tokens of a block."""
    query_group: int | None = 128
    """Consecutive queries that share a selection; None: the whole chunk."""
    dense_sink: bool = True
    """Whether the sink is attended to in full, as the checkpoints that have one were tuned. False: its blocks are
    chosen among like those of other old frames."""
    score: Score = "mean"
    """What blocks are ranked by, as for `select_blocks`."""
    impl: str = "auto"
    """Implementation of `memory_attention`."""
    token_order: TokenOrderName = "raster"
    """How the tokens of a frame lie in the cache, and so what a block covers; see `strip_order`."""

    def __post_init__(self) -> None:
        check_score(self.score)
        for name in ("window_frames", "top_k", "block_size", "query_group"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.token_order not in get_args(TokenOrderName):
            raise ValueError(f"token_order must be raster or strips, got {self.token_order!r}")


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
    described = DescribedCache.of(kv_cache, attention.block_size, frame_tokens, attention.score)
    start, end, new = described.make_room(current_start, size, sink)
    written = max(start, sink) if keep_sink and new <= 0 and current_start > 0 else start
    keys[:, written:end] = k[:, written - start :]
    values[:, written:end] = v[:, written - start :]
    described.describe(written, end)
    past = max(0, end - max(attention.window_frames * frame_tokens, size))
    dense = min(sink, past) if attention.dense_sink else 0  # the sink's tokens before the window
    blocks = slice(*(n // frame_tokens * described.blocks_per_frame for n in (dense, past)))
    out = memory_attention(
        q.to(keys.dtype),
        _sink_and_window(keys, dense, past, end),
        _sink_and_window(values, dense, past, end),
        keys[:, dense:past],
        values[:, dense:past],
        memory_descriptors=described.descriptors[:, blocks],
        top_k=attention.top_k,
        block_size=described.block_size,
        frame_tokens=frame_tokens,
        query_group=attention.query_group,
        score=attention.score,
        impl=attention.impl,
    )
    described.move_indices(kv_cache, current_start + size, end)
    return out.to(v.dtype), end


def _sink_and_window(pool: Tensor, sink: int, window: int, end: int) -> Tensor:
    """The first `sink` tokens of a pool and those from `window` to `end`: a view where nothing lies between them."""
    if not sink:
        return pool[:, window:end]
    return pool[:, :end] if window == sink else torch.cat([pool[:, :sink], pool[:, window:end]], dim=1)


class DescribedCache:
    """A cache of theirs with what we keep beside it: block descriptors of its keys, and how we left its indices."""

    def __init__(self, keys: Tensor, values: Tensor, block_size: int, frame_tokens: int, score: Score):
        self.keys, self.values, self.score = keys, values, score
        self.block_size, self.frame_tokens = min(block_size, frame_tokens), frame_tokens
        self.blocks_per_frame = -(-frame_tokens // self.block_size)
        frames = keys.shape[1] // frame_tokens
        batch, _, heads, size = keys.shape
        width = descriptor_width(size, score)
        self.moments = width // size
        self.descriptors = keys.new_zeros(batch, frames * self.blocks_per_frame, heads, width)
        self.ends = 0, 0
        """Where the cache ends: in the whole video, and in the cache."""
        self.evicts = True
        """Whether the cache has indices, and drops its oldest frames where there is no room for a chunk."""
        self._left: list[Any] = []

    @staticmethod
    def without(kv_cache: dict[str, Any]) -> dict[str, Any]:
        """A cache of theirs without our entry in it."""
        return {name: value for name, value in kv_cache.items() if name != _OWN_ENTRY}

    @classmethod
    def of(cls, kv_cache: MutableMapping[str, Any], block_size: int, frame_tokens: int, score: Score) -> DescribedCache:
        """Our entry in the cache, brought up to date where somebody else has written to the cache since."""
        own, keys = kv_cache.get(_OWN_ENTRY), kv_cache["k"]
        sizes = (min(block_size, frame_tokens), frame_tokens, score)
        if own is None or own.keys is not keys or (own.block_size, own.frame_tokens, own.score) != sizes:
            own = kv_cache[_OWN_ENTRY] = cls(keys, kv_cache["v"], *sizes)
        own.evicts = all(name in kv_cache for name in _INDICES)
        if not _unchanged(own._left, _state(kv_cache)):
            if own.evicts:
                own.ends = int(kv_cache["global_end_index"]), int(kv_cache["local_end_index"])
            else:
                own.ends = keys.shape[1], keys.shape[1]  # nothing tells how much of it is filled
            own.describe(0, own.ends[1])
        return own

    def make_room(self, current_start: int, size: int, sink: int) -> tuple[int, int, int]:
        """Finds the tokens of the cache for a chunk of `size` tokens, and evicts the oldest beyond its capacity.

        current_start: position of the chunk in the whole video. sink: first tokens of the cache, which stay. Returns
        where the chunk begins and ends in the cache, and how far the cache grows in the whole video: 0 or less where
        the chunk has been passed over before. A ValueError where chunk and cache do not fit each other.
        """
        capacity = self.keys.shape[1]
        if not self.evicts:
            if current_start + size > capacity:
                raise ValueError(
                    f"the chunk ends at {current_start + size}, beyond the {capacity} tokens of a cache without indices"
                )
            return current_start, current_start + size, size
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
            sizes = (self.block_size, self.frame_tokens)
            self.descriptors[:, places] = describe_blocks(keys, *sizes, moments=self.moments)

    def move_indices(self, kv_cache: MutableMapping[str, Any], global_end: int, local_end: int) -> None:
        """Writes their indices, which are tensors in some projects, integers in others, and missing in CausVid."""
        self.ends = global_end, local_end
        for name, end in zip(_INDICES, self.ends, strict=True):
            if name not in kv_cache:
                continue
            if isinstance(kv_cache[name], Tensor):
                kv_cache[name].fill_(end)
            else:
                kv_cache[name] = end
        self._left = _state(kv_cache)


def _state(kv_cache: MutableMapping[str, Any]) -> list[Any]:
    """The keys and indices of a cache, and how often torch has seen them written."""
    state: list[Any] = []
    for name in ("k", *_INDICES):
        value = kv_cache.get(name)
        writes: object = None
        if isinstance(value, Tensor):
            # One that was made in inference mode has no count, so it may have been written at any time.
            writes = object() if value.is_inference() else value._version
        state += [value, writes]
    return state


def _unchanged(before: list[Any], now: list[Any]) -> bool:
    """Whether nobody has written or replaced anything between two states; integers are compared by value."""
    if len(before) != len(now):
        return False
    return all(a is b or (isinstance(a, int) and a == b) for a, b in zip(before, now, strict=True))
