"""The selection turned around: which query heads and groups chose each block of the memory, in an order without chance.

Every entry of the selection gets the number of the block that it names; a stable sort by these numbers puts the entries
of a block one behind the other, in the order of heads and groups. Memory: a few integers per entry.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.primitives import physical_frame


# Bytes: the indices once, the numbers once; bound by memory.
@triton.jit
def block_numbers_kernel(
    indices,  # (B, H, G, K) int32, contiguous
    memory_slots,  # (B, F) int32, or None: identity
    numbers,  # (B, H, G, K) int32: which block of which batch element and key head
    slot_stride,
    entries,  # G * K
    frames,
    physical_frames,
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
    if memory_slots is not None:
        memory_slots += batch.to(tl.int64) * slot_stride
    frame = index // blocks_per_frame
    inside = (index >= 0) & (frame < frames)
    slot = physical_frame(memory_slots, frame, inside, physical_frames)
    kv_heads = tl.num_programs(1) // HEADS_PER_KV_HEAD
    blocks = physical_frames * blocks_per_frame
    number = (batch * kv_heads + head // HEADS_PER_KV_HEAD) * blocks + slot * blocks_per_frame
    number += index - frame * blocks_per_frame
    unused = tl.num_programs(2) * kv_heads * blocks
    tl.store(numbers + first + places, tl.where(inside, number, unused), mask=mask)


# Bytes: the places once, in place; bound by memory.
@triton.jit
def members_kernel(
    members,  # (B * H * G * K) int64: places in the selection, replaced by what stands there, see Inverse
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
    """Between launches: torch's own stable sort of the block numbers, and where each block's entries begin."""

    numbers: torch.Tensor  # (N,) int32
    ascending: torch.Tensor  # (N,) int32
    places: torch.Tensor  # (N,) int64
    blocks: torch.Tensor  # 0, 1, ..., the number of blocks
    starts: torch.Tensor  # as many

    def run(self) -> None:
        """On the device of the tensors, without waiting."""
        torch.sort(self.numbers, stable=True, out=(self.ascending, self.places))
        torch.searchsorted(self.ascending, self.blocks, out_int32=True, out=self.starts)


@dataclass(frozen=True)
class Inverse:
    """Who chose block j of key head h in batch b: members[starts[n]] up to starts[n + 1], n = (b * Hkv + h) * N + j.

    members int64: query head * 2^32 + the group's first query; starts int32, of the B * Hkv * N blocks of the memory.
    """

    members: torch.Tensor
    starts: torch.Tensor


def plan_inverse(
    indices: torch.Tensor,
    memory_slots: torch.Tensor | None,
    *,
    kv_heads: int,
    query_group: int,
    physical_frames: int,
    blocks_per_frame: int,
) -> tuple[list[Launch | Sort], Inverse]:
    """The steps that turn a selection (B, H, G, K) around, in order, and the index that they fill."""
    indices = indices.contiguous()
    batch, heads, groups, entries = indices.shape
    count, blocks = indices.numel(), batch * kv_heads * physical_frames * blocks_per_frame
    numbers, ascending = torch.empty((2, count), dtype=torch.int32, device=indices.device)
    members = torch.empty(count, dtype=torch.int64, device=indices.device)
    starts = torch.empty(blocks + 1, dtype=torch.int32, device=indices.device)
    size = 1024
    number = Launch(
        block_numbers_kernel,
        (triton.cdiv(groups * entries, size), heads, batch),
        dict(
            indices=indices,
            memory_slots=memory_slots,
            numbers=numbers,
            slot_stride=0 if memory_slots is None else memory_slots.stride(0),
            entries=groups * entries,
            frames=physical_frames if memory_slots is None else memory_slots.shape[1],
            physical_frames=physical_frames,
            blocks_per_frame=blocks_per_frame,
            HEADS_PER_KV_HEAD=heads // kv_heads,
            SIZE=size,
        ),
        dict(num_warps=4, num_stages=2),
    )
    sort = Sort(numbers, ascending, members, torch.arange(blocks + 1, dtype=torch.int32, device=indices.device), starts)
    member = Launch(
        members_kernel,
        (triton.cdiv(count, size), 1, 1),
        dict(
            members=members,
            count=count,
            heads=heads,
            group_entries=entries,
            groups=groups,
            query_group=query_group,
            SIZE=size,
        ),
        dict(num_warps=4, num_stages=2),
    )
    return [number, sort, member], Inverse(members, starts)
