"""The bank as `impl="torch"` reads it: selected blocks of a pool, gathered a few query groups at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch import Tensor

# Keys whose places are worked out at a time.
PLANNED_KEYS = 1 << 20
# Elements of scores, and of keys and values, that are held at a time.
SCORE_ELEMENTS = 4 << 20


class Rows:
    """A memory tensor (B, L, Hkv, D) of any strides seen as a table of rows of D elements, without a copy."""

    def __init__(self, x: Tensor):
        size = x.shape[3]
        strides = x.stride()[:3]
        self.unit = math.gcd(*(s for s, n in zip(strides, x.shape[:3], strict=True) if n > 1)) or size
        last = sum(s * (n - 1) for s, n in zip(strides, x.shape[:3], strict=True))
        self.table = x.as_strided((last // self.unit + 1, size), (self.unit, 1))
        self.batch_step, self.token_step, self.head_step = (s // self.unit for s in strides)
        self.strides = strides


class Bank:
    """The selected blocks of a memory, gathered for a few tiles (query groups of a head) at a time."""

    def __init__(
        self, memory_k: Tensor, memory_v: Tensor, indices: Tensor, block: int, frame: int, slots: Tensor | None
    ):
        batch, heads = indices.shape[:2]
        self.k, self.v = Rows(memory_k), Rows(memory_v)
        self.block, self.device = block, memory_k.device
        blocks = -(-frame // block)
        total = blocks * (memory_k.shape[1] // frame if slots is None else slots.shape[1])
        places = indices.flatten(0, 1).long()
        # host reads: on CUDA they would stall, so there the masks are always applied
        some_unused = not on_host(places) or not 0 <= int(places.min()) <= int(places.max()) < total
        self.empty = None  # [B * H, G] tiles without a block
        if some_unused:
            used = (places >= 0) & (places < total)
            self.empty = ~used.any(-1)
            # an unused entry repeats the tile's first used block, masked, so that nothing unselected is read
            first = places.gather(-1, used.byte().argmax(-1, keepdim=True))
            places = torch.where(used, places, first).clamp_(0, total - 1)
        bank_frames = places // blocks
        self.start = places.sub_(bank_frames * blocks).mul_(block)
        self.length = None  # [B * H, G, K] tokens, 0: unused; None: all are full
        if some_unused or frame % block:
            self.length = (frame - self.start).clamp_(max=block)
            if some_unused:
                self.length.masked_fill_(~used, 0)
            if on_host(places) and int(self.length.min()) == block:
                self.length = None
        if slots is not None:
            table = slots.clamp(0, memory_k.shape[1] // frame - 1).long()
            bank_frames = table.gather(1, bank_frames.view(batch, -1)).view_as(bank_frames)
        self.start += bank_frames.mul_(frame)  # [B * H, G, K] first token
        head = torch.arange(batch * heads, device=self.device)
        self.b, self.h = (head // heads).view(-1, 1, 1), (head % heads // (heads // memory_k.shape[2])).view(-1, 1, 1)

    def of(self, groups: slice) -> Bank:
        """The same for some of the query groups."""
        part = copy(self)
        part.start = self.start[:, groups]
        part.length = None if self.length is None else self.length[:, groups]
        part.empty = None if self.empty is None else self.empty[:, groups]
        return part

    def tokens(self, tiles: tuple[slice, slice]) -> tuple[Tensor, Tensor | None]:
        """Tokens [r, g, K * block] of some tiles, and which of them to mask."""
        offsets = torch.arange(self.block, device=self.device)
        start = self.start[tiles].unsqueeze(-1)
        if self.length is None:
            return (start + offsets).flatten(2), None
        length = self.length[tiles].unsqueeze(-1)
        inside = torch.minimum(offsets, (length - 1).clamp_(min=0))
        return (start + inside).flatten(2), (offsets >= length).flatten(2)

    def rows(self, tokens: Tensor, tiles: tuple[slice, slice], rows: Rows) -> Tensor:
        """Row of every token [r, g, K * block]."""
        heads = self.b[tiles[0]] * rows.batch_step + self.h[tiles[0]] * rows.head_step
        return tokens * rows.token_step + heads

    def gather(
        self, tokens: Tensor, tiles: tuple[slice, slice], count: int
    ) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Keys and values [r, g, K * block, D] of about `count` of the tiles at a time, in buffers used again."""
        rows_k = self.rows(tokens, tiles, self.k)
        rows_v = rows_k if self.v.strides == self.k.strides else self.rows(tokens, tiles, self.v)
        keys, size = tokens.shape[2], self.k.table.shape[1]
        sources = [(_Gather(x.table, min(count, tokens.shape[:2].numel()) * keys)) for x in (self.k, self.v)]
        for part in walk(tokens.shape, count):
            k, v = (source(rows[part].reshape(-1)) for source, rows in zip(sources, (rows_k, rows_v), strict=True))
            shape = (*rows_k[part].shape[:2], keys, size)
            yield part, k.view(shape), v.view(shape)


def on_host(x: Tensor) -> bool:
    """Whether reading a value waits for nothing."""
    return x.device.type == "cpu"


class _Gather:
    """Rows of a table into a buffer of up to `count` rows, which is used again."""

    def __init__(self, table: Tensor, count: int):
        self.buffer = torch.empty((count, table.shape[1]), dtype=table.dtype, device=table.device)
        per_word = 8 // table.element_size()
        # as 8-byte words, where the rows divide, gathering half precisions is a third faster
        whole = all(n % per_word == 0 for n in (table.shape[1], table.stride(0), table.storage_offset()))
        self.source, self.target = (x.view(torch.int64) if whole else x for x in (table, self.buffer))

    def __call__(self, rows: Tensor) -> Tensor:
        torch.index_select(self.source, 0, rows, out=self.target[: len(rows)])
        return self.buffer[: len(rows)]


def walk(shape: Sequence[int], tiles: int) -> Iterator[tuple[slice, slice]]:
    """Slices of about `tiles` tiles that cover all rows and groups of a shape [rows, groups, ...]."""
    rows, groups = shape[:2]
    row_step, group_step = max(1, tiles // groups), min(tiles, groups)
    for r in range(0, rows, row_step):
        for g in range(0, groups, group_step):
            yield slice(r, min(r + row_step, rows)), slice(g, min(g + group_step, groups))


def equal_groups(queries: int, group: int) -> Iterator[tuple[slice, slice, int]]:
    """Queries, query groups and their size: the whole groups, then the short one, where there are such."""
    groups = queries // group
    if groups:
        yield slice(0, groups * group), slice(0, groups), group
    if queries % group:
        yield slice(groups * group, queries), slice(groups, None), queries % group


def tiles_of(x: Tensor, n: int) -> Tensor:
    """(B, G * n, H, D) -> [B * H, G, n, D]; a view where B is 1."""
    return x.transpose(1, 2).flatten(0, 1).unflatten(1, (-1, n))
