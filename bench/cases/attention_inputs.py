"""The inputs that everything that attends to a memory is measured with, and how each way to attend is checked.

Sink, window and bank lie behind one another in one pool, so that "sink and window" and "the whole history" are views,
and no baseline pays for putting them together. As in the frame cache, the tokens of a head lie behind one another,
from which all contenders gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memflow_ops import describe_blocks, memory_attention, select_blocks
from memflow_ops.bench import inputs
from memflow_ops.bench.harness.case import Contender
from memflow_ops.bench.harness.correctness import (
    KeysOf,
    check_attention,
    check_means,
    check_selection,
    queries_of,
    sampled,
    selected_tokens,
)
from memflow_ops.bench.sizes import Size

KeysAndValues = tuple[Tensor, Tensor]
"""Two tensors (1, L, H, D)."""

# Frames of the pool that are made at a time: a thousand are 10 GB, and twice as much while they are made.
_MADE_FRAMES = 40
# Consecutive queries that a program of the attention kernel takes together.
TILE_QUERIES = 128


@dataclass(frozen=True)
class AttentionInputs:
    """A chunk's queries, the pool of keys and values, and the selection that all contenders share."""

    size: Size
    bank_frames: int
    impl: str
    """The implementation of our ops: `auto`, or one by name."""
    q: Tensor
    """(1, Lq, H, D)."""
    pool_k: Tensor
    """(1, (sink + window + bank frames) * frame_tokens, H, D)."""
    pool_v: Tensor
    descriptors: Tensor
    """Of the bank's blocks, (1, N, H, D)."""
    indices: Tensor
    """The selected blocks, (1, H, G, K) int32."""

    @classmethod
    def make(
        cls,
        size: Size,
        bank_frames: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
        *,
        impl: str = "auto",
        correlated: bool = True,
    ) -> AttentionInputs:
        """Seeded inputs. correlated: neighbouring queries agree about the keys, as in a video; else nothing agrees."""
        make = inputs.correlated_tokens if correlated else inputs.random_tokens

        def tokens(count: int, number: int) -> Tensor:
            return make(1, count, size.heads, size.head_dim, dtype, number, str(device))

        frames, seed = size.sink_frames + size.window_frames + bank_frames, 100_000 * seed
        shape = (1, size.heads, frames * size.frame_tokens, size.head_dim)
        pool_k, pool_v = (torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
        for first in range(0, frames, _MADE_FRAMES):
            rows = slice(first * size.frame_tokens, min(first + _MADE_FRAMES, frames) * size.frame_tokens)
            for offset, pool in enumerate((pool_k, pool_v)):
                pool[:, rows] = tokens(rows.stop - rows.start, seed + 2 * first + offset + 2)
        q = tokens(size.queries, seed + 1)
        bank_k = pool_k[:, (size.sink_frames + size.window_frames) * size.frame_tokens :]
        descriptors = describe_blocks(bank_k, size.block_size, size.frame_tokens, impl=impl)
        indices = selection_of(size, q, descriptors, impl)
        return cls(size, bank_frames, impl, q, pool_k, pool_v, descriptors, indices)

    def with_query_group(self, query_group: int) -> AttentionInputs:
        """The same inputs with a selection for each so many queries."""
        size = replace(self.size, query_group=query_group)
        return replace(self, size=size, indices=selection_of(size, self.q, self.descriptors, self.impl))

    def with_bank(self, bank_frames: int) -> AttentionInputs:
        """The same inputs with the first so many frames of the bank."""
        tokens = (self.size.sink_frames + self.size.window_frames + bank_frames) * self.size.frame_tokens
        descriptors = self.descriptors[:, : bank_frames * self.size.blocks_per_frame]
        return replace(
            self,
            bank_frames=bank_frames,
            pool_k=self.pool_k[:, :tokens],
            pool_v=self.pool_v[:, :tokens],
            descriptors=descriptors,
            indices=selection_of(self.size, self.q, descriptors, self.impl),
        )

    def part(self, first: int, end: int | None) -> KeysAndValues:
        """Keys and values of some frames of the pool."""
        tokens = slice(first * self.size.frame_tokens, None if end is None else end * self.size.frame_tokens)
        return self.pool_k[:, tokens], self.pool_v[:, tokens]

    @property
    def window(self) -> KeysAndValues:
        return self.part(self.size.sink_frames, self.size.sink_frames + self.size.window_frames)

    @property
    def no_window(self) -> KeysAndValues:
        return self.part(0, 0)

    @property
    def sink_and_window(self) -> KeysAndValues:
        return self.part(0, self.size.sink_frames + self.size.window_frames)

    @property
    def history(self) -> KeysAndValues:
        """The window and every frame of the bank."""
        return self.part(self.size.sink_frames, None)

    @property
    def bank(self) -> KeysAndValues:
        return self.part(self.size.sink_frames + self.size.window_frames, None)

    @property
    def as_many_keys(self) -> KeysAndValues:
        """The first keys of the bank, as many as a query selects."""
        k, v = self.bank
        return k[:, : self.selected_keys], v[:, : self.selected_keys]

    @property
    def selected_keys(self) -> int:
        """Keys that a query selects, where blocks count as full."""
        return self.indices.shape[-1] * self.size.block_size

    def selection(self, head: int, group: int) -> Tensor:
        """The blocks (K,) of a query group, checked."""
        tile, table = self.q[0, queries_of(self.size, group), head], self.descriptors[0, :, head]
        chosen = self.indices[0, head, group]
        check_selection(tile, table, chosen, self.size.top_k, f"selection, head {head}, group {group}")
        return chosen

    def window_and_selection(self, window: KeysAndValues | None = None) -> KeysOf:
        """What ours attends to: the window (None: the inputs' own), then the selected blocks."""
        near, far = self.window if window is None else window, self.bank

        def keys_of(head: int, group: int) -> tuple[Tensor, Tensor]:
            tokens = selected_tokens(self.size, self.selection(head, group))
            k, v = (torch.cat([x[0, :, head], bank[0, tokens, head]]) for x, bank in zip(near, far, strict=True))
            return k, v

        return keys_of

    def check_descriptors(self) -> None:
        """Check all descriptors of every head."""
        size, (bank_k, _) = self.size, self.bank
        for head, _ in sampled(size.heads, 1):
            table, keys = self.descriptors[0, :, head], bank_k[0, :, head]
            check_means(table, keys, size.block_size, size.frame_tokens, f"descriptors of head {head}")

    def selected_by(self, head: int, rows: slice) -> tuple[Tensor, Tensor]:
        """The tokens (S,) that some whole query groups select between them, and which of them each query selects.

        rows: the queries; the second result is (n, S), bool.
        """
        size, group = self.size, self.size.query_group
        chosen = self._chosen(self.indices[0, head, rows.start // group : -(-rows.stop // group)])  # (groups, N)
        tokens = selected_tokens(size, chosen.any(0).nonzero()[:, 0])
        block = tokens // size.frame_tokens * size.blocks_per_frame + tokens % size.frame_tokens // size.block_size
        by_query = chosen[:, block].repeat_interleave(group, 0)
        return tokens, by_query[: len(range(size.queries)[rows])]

    def _chosen(self, indices: Tensor) -> Tensor:
        """Selected blocks (..., K) as (..., N) bool."""
        blocks = self.descriptors.shape[1]
        unused = blocks  # The column that unused entries go to, and which is cut off.
        chosen = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
        chosen.scatter_(-1, torch.where(indices < 0, unused, indices).long(), True)
        return chosen[..., :-1]

    def union_size(self) -> dict[str, object]:
        """The blocks that a tile of queries selects between them, on average, and those of the bank: notes of a row."""
        groups = max(1, TILE_QUERIES // self.size.query_group)
        unions = [self._chosen(tile).any(1).sum(-1).double() for tile in self.indices[0].split(groups, 1)]  # each (H,)
        return {"union_blocks": float(torch.stack(unions).mean()), "bank_blocks": self.descriptors.shape[1]}


def selection_of(size: Size, q: Tensor, descriptors: Tensor, impl: str) -> Tensor:
    """The blocks that the queries select, (1, H, G, K) int32."""
    return select_blocks(
        q,
        descriptors,
        size.top_k,
        query_group=size.query_group,
        blocks_per_frame=size.blocks_per_frame,
        impl=impl,
    )


# ---------------------------------------------------------------------------------------------------------- contenders


def attention_contender(
    given: AttentionInputs,
    call: Callable[[], Tensor],
    keys: int,
    keys_of: KeysOf,
    check_before: Callable[[], None] = lambda: None,
    **more: Any,
) -> Contender:
    """A way to attend, with the work of attending to `keys` keys per query.

    check_before: checks what the call takes as computed already, such as descriptors. more: for Contender.
    """
    size = given.size

    def check() -> None:
        check_before()
        check_attention(size, given.q, call(), keys_of)

    return Contender(
        call,
        check,
        flops=size.attention_flops(keys),
        bytes=size.attention_bytes(keys, given.q.element_size()),
        **more,
    )


def ours(
    given: AttentionInputs,
    window: KeysAndValues | None = None,
    notes: Callable[[], dict[str, object]] | None = None,
    **options: Any,
) -> Contender:
    """memory_attention with stored descriptors over the window (None: the inputs' own) and the bank.

    options: for memory_attention.
    """
    size, (k, v) = given.size, given.window if window is None else window

    def call() -> Tensor:
        out = memory_attention(
            given.q,
            k,
            v,
            *given.bank,
            memory_descriptors=given.descriptors,
            top_k=size.top_k,
            block_size=size.block_size,
            frame_tokens=size.frame_tokens,
            query_group=size.query_group,
            impl=given.impl,
            **options,
        )
        assert isinstance(out, Tensor)
        return out

    return attention_contender(
        given,
        call,
        k.shape[1] + given.selected_keys,
        given.window_and_selection((k, v)),
        given.check_descriptors,
        settings={"query_group": size.query_group},
        notes=notes,
    )


def ours_without_memory(given: AttentionInputs, keys: KeysAndValues, **options: Any) -> Contender:
    """memory_attention without a bank: dense attention to `keys`, with what our call around it takes."""

    def call() -> Tensor:
        out = memory_attention(given.q, *keys, impl=given.impl, **options)
        assert isinstance(out, Tensor)
        return out

    return attention_contender(given, call, keys[0].shape[1], all_of(keys))


def all_of(keys: KeysAndValues) -> KeysOf:
    """Every query attends to all of `keys`."""
    k, v = keys
    return lambda head, group: (k[0, :, head], v[0, :, head])
