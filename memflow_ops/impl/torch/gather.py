"""The selected blocks of a memory, gathered for a few query groups at a time.

A tile is one query group of one head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl.torch.int8 import numbers_of

PLANNED_KEYS = 1 << 20
"""So many keys have their places worked out at a time."""
SCORE_ELEMENTS = 4 << 20
"""So many elements of scores, and of keys and values, are held at a time."""


class TokenTable:
    """A memory tensor (B, L, Hkv, D) of any strides seen as a table of rows of D elements, without a copy.

    The row of token t of key head h in batch element b is b * batch_step + t * token_step + h * head_step.
    """

    def __init__(self, x: Tensor):
        size = x.shape[3]
        strides = x.stride()[:3]
        unit = math.gcd(*(s for s, n in zip(strides, x.shape[:3], strict=True) if n > 1)) or size
        last = sum(s * (n - 1) for s, n in zip(strides, x.shape[:3], strict=True))
        self.table = x.as_strided((last // unit + 1, size), (unit, 1))
        self.batch_step, self.token_step, self.head_step = (s // unit for s in strides)
        self.strides = strides


class SelectedBlocks:
    """Where the selected blocks of a memory lie, for every tile, and their keys and values on demand.

    start: the first token of each block, [B * H, G, K].
    length: the tokens of each block, [B * H, G, K], 0 for an unused entry; None: all blocks are full.
    empty: which tiles have no block, [B * H, G]; None: all have one.
    stored_block: the number of each block among those of the stored frames, [B * H, G, K]; for an int8 bank alone.
    """

    def __init__(self, memory_k: Tensor, memory_v: Tensor, indices: Tensor, geometry: Geometry):
        batch, heads = indices.shape[:2]
        stored = geometry.stored_frames(memory_k)
        blocks, total = geometry.blocks_per_frame, geometry.bank_blocks(stored)
        block, frame, slots = geometry.block_size, geometry.frame_tokens, geometry.memory_slots
        self.k, self.v = TokenTable(memory_k), TokenTable(memory_v)
        self.block, self.device = block, memory_k.device
        places = indices.flatten(0, 1).long()
        # These are reads by the host: on CUDA they would stall it, so the masks are always applied there.
        some_unused = not on_host(places) or not 0 <= int(places.min()) <= int(places.max()) < total
        self.empty = None
        if some_unused:
            used = (places >= 0) & (places < total)
            self.empty = ~used.any(-1)
            # An unused entry repeats the tile's first used block and is masked: what is not selected is not read.
            first = places.gather(-1, used.byte().argmax(-1, keepdim=True))
            places = torch.where(used, places, first).clamp_(0, total - 1)
        bank_frames = places // blocks
        self.start = places.sub_(bank_frames * blocks).mul_(block)
        self.length = None
        if some_unused or frame % block:
            self.length = (frame - self.start).clamp_(max=block)
            if some_unused:
                self.length.masked_fill_(~used, 0)
            if on_host(places) and int(self.length.min()) == block:
                self.length = None
        if slots is not None:
            table = slots.clamp(0, stored - 1).long()
            bank_frames = table.gather(1, bank_frames.view(batch, -1)).view_as(bank_frames)
        self.int8 = None
        if geometry.int8 is not None:
            descriptors, k_scale, v_scale = geometry.int8
            means = descriptors[..., : memory_k.shape[3]]
            self.int8 = [TokenTable(x) for x in (means, k_scale, v_scale.unsqueeze(3))]
            self.stored_block = bank_frames * blocks + self.start // block
        self.start += bank_frames.mul_(frame)
        head = torch.arange(batch * heads, dtype=torch.int64, device=self.device)
        self.batch = (head // heads).view(-1, 1, 1)
        self.kv_head = (head % heads // (heads // memory_k.shape[2])).view(-1, 1, 1)

    def of_groups(self, groups: slice) -> SelectedBlocks:
        """The blocks of some of the query groups."""
        part = copy(self)
        part.start = self.start[:, groups]
        part.length = None if self.length is None else self.length[:, groups]
        part.empty = None if self.empty is None else self.empty[:, groups]
        if self.int8 is not None:
            part.stored_block = self.stored_block[:, groups]
        return part

    def tokens(self, tiles: tuple[slice, slice]) -> tuple[Tensor, Tensor | None]:
        """The tokens [r, g, K * block] of some tiles, and which of them to mask (None: none)."""
        offsets = torch.arange(self.block, dtype=torch.int64, device=self.device)
        start = self.start[tiles].unsqueeze(-1)
        if self.length is None:
            return (start + offsets).flatten(2), None
        length = self.length[tiles].unsqueeze(-1)
        inside = torch.minimum(offsets, (length - 1).clamp_(min=0))
        return (start + inside).flatten(2), (offsets >= length).flatten(2)

    def rows(self, tokens: Tensor, tiles: tuple[slice, slice], table: TokenTable) -> Tensor:
        """The row of the table in which every token of the tiles lies, [r, g, K * block] as `tokens`."""
        heads = self.batch[tiles[0]] * table.batch_step + self.kv_head[tiles[0]] * table.head_step
        return tokens * table.token_step + heads

    def gather(
        self, tokens: Tensor, tiles: tuple[slice, slice], count: int
    ) -> Iterator[tuple[tuple[slice, slice], Tensor, Tensor]]:
        """Part by part of about `count` tiles: its slices of the tiles, its keys and its values [r, g, K * block, D].

        Keys and values may lie in buffers that the next part overwrites.
        """
        rows_k = self.rows(tokens, tiles, self.k)
        rows_v = rows_k if self.v.strides == self.k.strides else self.rows(tokens, tiles, self.v)
        keys, size = tokens.shape[2], self.k.table.shape[1]
        buffers = [_RowBuffer(x.table, min(count, tokens.shape[:2].numel()) * keys) for x in (self.k, self.v)]
        for part in tile_slices(tokens.shape, count):
            k, v = (fill(rows[part].reshape(-1)) for fill, rows in zip(buffers, (rows_k, rows_v), strict=True))
            shape = (*rows_k[part].shape[:2], keys, size)
            if self.int8 is not None:
                k, v = self._numbers(k, v, tokens, tiles, part)
            yield part, k.view(shape), v.view(shape)

    def _numbers(
        self, k: Tensor, v: Tensor, tokens: Tensor, tiles: tuple[slice, slice], part: tuple[slice, slice]
    ) -> tuple[Tensor, Tensor]:
        """The gathered int8 keys and values [n, D] of a part of the tiles as numbers [n, D]."""
        assert self.int8 is not None
        means, k_scale, v_scale = (
            table.table.index_select(0, self.rows(places, tiles, table)[part].reshape(-1))
            for table, places in zip(self.int8, (*[self.stored_block[tiles]] * 2, tokens), strict=True)
        )
        of_blocks = numbers_of(k.view(-1, self.block, k.shape[1]), k_scale.unsqueeze(1), means.unsqueeze(1))
        return of_blocks.flatten(0, 1), numbers_of(v, v_scale)


def on_host(x: Tensor) -> bool:
    """Whether the host can read a value of x without waiting for a device."""
    return x.device.type == "cpu"


class _RowBuffer:
    """A buffer of up to `count` rows, which every call fills with other rows of the table."""

    def __init__(self, table: Tensor, count: int):
        self.buffer = torch.empty((count, table.shape[1]), dtype=table.dtype, device=table.device)
        per_word = 8 // table.element_size()
        # Gathering half precisions is a third faster in words of 8 bytes, where rows are made of whole words.
        whole = all(n % per_word == 0 for n in (table.shape[1], table.stride(0), table.storage_offset()))
        self.source, self.target = (x.view(torch.int64) if whole else x for x in (table, self.buffer))

    def __call__(self, rows: Tensor) -> Tensor:
        torch.index_select(self.source, 0, rows, out=self.target[: len(rows)])
        return self.buffer[: len(rows)]


def tile_slices(shape: Sequence[int], tiles: int) -> Iterator[tuple[slice, slice]]:
    """Slices of about `tiles` tiles that together cover a shape [B * H, G, ...]."""
    heads, groups = shape[:2]
    head_step, group_step = max(1, tiles // groups), min(tiles, groups)
    for h in range(0, heads, head_step):
        for g in range(0, groups, group_step):
            yield slice(h, min(h + head_step, heads)), slice(g, min(g + group_step, groups))


def groups_of_one_size(queries: int, group: int) -> Iterator[tuple[slice, slice, int]]:
    """Queries, their query groups and the size of these: once for the whole groups, once for a last, short one."""
    groups = queries // group
    if groups:
        yield slice(0, groups * group), slice(0, groups), group
    if queries % group:
        yield slice(groups * group, queries), slice(groups, None), queries % group


def tiles_of(x: Tensor, n: int) -> Tensor:
    """x (B, G * n, H, D) as tiles [B * H, G, n, D]; a view where B is 1."""
    return x.transpose(1, 2).flatten(0, 1).unflatten(1, (-1, n))
