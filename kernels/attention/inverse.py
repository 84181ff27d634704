"""The selection turned around: which query heads and groups chose each block of the memory, always in the same order.

Every entry of the selection gets the number of the block that it names. A stable sort by these numbers brings the
entries of a block together, in the order of heads and groups. It needs a few integers of memory per entry.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.blocks import frames_of
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import slots_of_batch, stored_frame


# Bytes: the indices once, the numbers once; bound by memory.
@triton.jit
def block_numbers_kernel(
    indices,  # (B, H, G, K) int32, contiguous
    frames,  # Frames of the bank
    numbers,  # (B, H, G, K) int32: which block of which batch element and key head
    entries,  # G * K
    blocks_per_frame,
    HEADS_PER_KV_HEAD: tl.constexpr,
    SIZE: tl.constexpr,
):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    mask = places < entries
    first = (batch.to(tl.int64) * tl.num_programs(1) + head) * entries
    index = tl.load(indices + first + places, mask=mask, other=-1)
    table = slots_of_batch(frames.slots, batch.to(tl.int64), frames.slot_stride)
    frame = index // blocks_per_frame
    inside = (index >= 0) & (frame < frames.count)
    slot = stored_frame(table, frame, inside, frames.stored)
    kv_heads = tl.num_programs(1) // HEADS_PER_KV_HEAD
    blocks = frames.stored * blocks_per_frame
    number = (batch * kv_heads + head // HEADS_PER_KV_HEAD) * blocks + slot * blocks_per_frame
    number += index - frame * blocks_per_frame
    unused = tl.num_programs(2) * kv_heads * blocks
    tl.store(numbers + first + places, tl.where(inside, number, unused), mask=mask)


# Bytes: the places once, in place; bound by memory.
@triton.jit
def members_kernel(
    members,  # (B * H * G * K) int64: places in the selection, which Inverse.members replaces
    count,
    heads,
    group_entries,  # K
    groups,
    query_group,
    SIZE: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = places < count
    row = tl.load(members + places, mask=mask, other=0) // group_entries  # of (B, H, G)
    head = row // groups
    first_query = (row - head * groups) * query_group
    tl.store(members + places, (head % heads << 32) | first_query, mask=mask)


@dataclass(frozen=True)
class Sort:
    """A step between launches: torch's own stable sort of the block numbers, and where the entries of each block begin.

    Its results are written in place.
    """

    numbers: torch.Tensor
    """(N,) int32"""
    ascending: torch.Tensor
    """(N,) int32, a result: the numbers in order."""
    places: torch.Tensor
    """(N,) int64, a result: where each of them stood."""
    blocks: torch.Tensor
    """0, 1, ..., the number of blocks, int32."""
    starts: torch.Tensor
    """As many int32, a result: where the entries of each block begin in `ascending`."""

    def run(self) -> None:
        """The sort runs on the device of the tensors, and the host does not wait for it."""
        torch.sort(self.numbers, stable=True, out=(self.ascending, self.places))
        torch.searchsorted(self.ascending, self.blocks, out_int32=True, out=self.starts)


class Inverse(NamedTuple):
    """Which query heads and groups chose each block of the memory, as an argument.

    Block j of key head h in batch element b was chosen by members[starts[n]] up to, but without, members[starts[n + 1]]
    with n = (b * Hkv + h) * N + j.
    """

    members: Any
    """int64: query head * 2^32 + the first query of the group."""
    starts: Any
    """(B * Hkv * N + 1,) int32, N the number of stored blocks."""


def plan_inverse(
    indices: torch.Tensor, memory: torch.Tensor, geometry: Geometry
) -> tuple[list[Launch | Sort], Inverse]:
    """The steps that turn a selection (B, H, G, K) around, in order, and the inverse that they fill.

    memory: the keys (B, stored frames * frame_tokens, Hkv, D) that were selected from.
    """
    indices = indices.contiguous()
    batch, heads, groups, entries = indices.shape
    kv_heads, frames = memory.shape[2], frames_of(memory, geometry)
    count, blocks = indices.numel(), batch * kv_heads * frames.stored * geometry.blocks_per_frame
    numbers, ascending = torch.empty((2, count), dtype=torch.int32, device=indices.device)
    members = torch.empty(count, dtype=torch.int64, device=indices.device)
    starts = torch.empty(blocks + 1, dtype=torch.int32, device=indices.device)
    size = 1024
    number = Launch(
        block_numbers_kernel,
        (cdiv(groups * entries, size), heads, batch),
        dict(
            indices=indices,
            frames=frames,
            numbers=numbers,
            entries=groups * entries,
            blocks_per_frame=geometry.blocks_per_frame,
            HEADS_PER_KV_HEAD=heads // kv_heads,
            SIZE=size,
        ),
        dict(num_warps=4, num_stages=2),
    )
    sort = Sort(numbers, ascending, members, torch.arange(blocks + 1, dtype=torch.int32, device=indices.device), starts)
    member = Launch(
        members_kernel,
        (cdiv(count, size), 1, 1),
        dict(
            members=members,
            count=count,
            heads=heads,
            group_entries=entries,
            groups=groups,
            query_group=geometry.query_group,
            SIZE=size,
        ),
        dict(num_warps=4, num_stages=2),
    )
    return [number, sort, member], Inverse(members, starts)
