"""Attention with memory and what one would otherwise use, over the same inputs, each checked the same way.

Layout of the inputs: sink, window and bank lie behind one another in one pool, so that "sink and window" and "the whole
history" are views, and no baseline pays for putting them together. As in the frame cache, a head's tokens lie behind
one another, which all of them gain from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memflow_ops import describe_blocks, memory_attention, select_blocks
from memflow_ops.bench import inputs
from memflow_ops.bench.harness.case import Contender
from memflow_ops.bench.harness.correctness import (
    KeysOf,
    check_attention,
    check_means,
    check_selection,
    rows_of,
    sampled,
    selected_tokens,
)
from memflow_ops.bench.sizes import Size
from memflow_ops.impl import dense

# Scores that torch's unfused attention may hold at a time, bytes.
_UNFUSED_BYTES = 512 << 20
# Frames of a bank that are made at a time.
_MADE_FRAMES = 40


@dataclass(frozen=True)
class Inputs:
    """A chunk's queries (1, Lq, H, D), the pool of keys and values, and the selection that all share."""

    size: Size
    bank_frames: int
    q: Tensor
    pool_k: Tensor
    """(1, (sink + window + bank frames) * T, H, D)."""
    pool_v: Tensor
    descriptors: Tensor
    indices: Tensor

    @classmethod
    def make(cls, size: Size, bank_frames: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
        """Seeded; neighbouring queries agree about the keys, as in a video."""

        def tokens(count: int, number: int) -> Tensor:
            return inputs.correlated_tokens(1, count, size.heads, size.head_dim, dtype, number, str(device))

        frames, seed = size.sink_frames + size.window_frames + bank_frames, 100_000 * seed
        shape = (1, size.heads, frames * size.frame_tokens, size.head_dim)
        pools = pool_k, pool_v = (
            torch.empty(shape, dtype=dtype, device=device).transpose(1, 2),
            torch.empty(shape, dtype=dtype, device=device).transpose(1, 2),
        )
        for first in range(0, frames, _MADE_FRAMES):
            rows = slice(first * size.frame_tokens, min(first + _MADE_FRAMES, frames) * size.frame_tokens)
            for offset, pool in enumerate(pools):
                pool[:, rows] = tokens(rows.stop - rows.start, seed + 2 * first + offset + 2)
        q = tokens(size.queries, seed + 1)
        bank_k = pool_k[:, (size.sink_frames + size.window_frames) * size.frame_tokens :]
        descriptors = describe_blocks(bank_k, size.block_size, size.frame_tokens)
        indices = select_blocks(
            q, descriptors, size.top_k, query_group=size.query_group, blocks_per_frame=size.blocks_per_frame
        )
        return cls(size, bank_frames, q, pool_k, pool_v, descriptors, indices)

    def per_chunk(self) -> Inputs:
        """The same with one selection for all queries of a head, as coarse as the released way's."""
        size = replace(self.size, query_group=self.size.queries)
        indices = select_blocks(
            self.q, self.descriptors, size.top_k, query_group=None, blocks_per_frame=size.blocks_per_frame
        )
        return replace(self, size=size, indices=indices)

    def part(self, first: int, end: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values of some frames of the pool."""
        tokens = slice(first * self.size.frame_tokens, None if end is None else end * self.size.frame_tokens)
        return self.pool_k[:, tokens], self.pool_v[:, tokens]

    @property
    def window(self) -> tuple[Tensor, Tensor]:
        return self.part(self.size.sink_frames, self.size.sink_frames + self.size.window_frames)

    @property
    def sink_and_window(self) -> tuple[Tensor, Tensor]:
        return self.part(0, self.size.sink_frames + self.size.window_frames)

    @property
    def history(self) -> tuple[Tensor, Tensor]:
        """The window and every frame of the bank."""
        return self.part(self.size.sink_frames, None)

    @property
    def bank(self) -> tuple[Tensor, Tensor]:
        return self.part(self.size.sink_frames + self.size.window_frames, None)

    def keys_of_ours(self, head: int, group: int) -> tuple[Tensor, Tensor]:
        """The window, then what is selected."""
        tokens = selected_tokens(self.size, self.selection(head, group))
        pairs = zip(self.window, self.bank, strict=True)
        near, far = ((window[0, :, head], bank[0, tokens, head]) for window, bank in pairs)
        return torch.cat(near), torch.cat(far)

    def selection(self, head: int, group: int) -> Tensor:
        """The blocks of a query group, checked."""
        tile, table, chosen = self.q[0, rows_of(self.size, group), head], self.descriptors[0, :, head], self.indices
        check_selection(tile, table, chosen[0, head, group], self.size.top_k, f"selection, head {head}, group {group}")
        return chosen[0, head, group]

    def check_descriptors(self) -> None:
        """All of them, of the sampled heads."""
        size, (bank_k, _) = self.size, self.bank
        for head, _ in sampled(size.heads, 1):
            table, keys = self.descriptors[0, :, head], bank_k[0, :, head]
            check_means(table, keys, size.block_size, size.frame_tokens, f"descriptors of head {head}")

    @property
    def selected_keys(self) -> int:
        """Per query, blocks counted as full."""
        return self.indices.shape[-1] * self.size.block_size


# ---------------------------------------------------------------------------------------------------------- contenders


def attention_contender(
    given: Inputs,
    call: Callable[[], Tensor],
    keys: int,
    keys_of: KeysOf,
    check_kept: Callable[[], None] = lambda: None,
    **more: Any,
) -> Contender:
    """A way to attend, with the work of attending to `keys` keys per query. check_kept: of what it has beforehand."""
    size = given.size

    def check() -> None:
        check_kept()
        check_attention(size, given.q, call(), keys_of)

    return Contender(
        call,
        check,
        flops=size.attention_flops(keys),
        bytes=size.attention_bytes(keys, given.q.element_size()),
        **more,
    )


# -------------------------------------------------------------------------------------------------------------- ours


def ours(given: Inputs, **options: Any) -> Contender:
    """memory_attention with stored descriptors."""
    size = given.size

    def call() -> Tensor:
        out = memory_attention(
            given.q, *given.window, *given.bank, memory_descriptors=given.descriptors, top_k=size.top_k,
            block_size=size.block_size, frame_tokens=size.frame_tokens, query_group=size.query_group, **options,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    keys = size.window_keys + given.selected_keys
    own: dict[str, object] = {"query_group": size.query_group}
    return attention_contender(given, call, keys, given.keys_of_ours, given.check_descriptors, settings=own)


# --------------------------------------------------------------------------------------------------- dense attention


def dense_backends(given: Inputs, keys: tuple[Tensor, Tensor]) -> tuple[dict[str, Contender], dict[str, str]]:
    """Dense attention to `keys` through everything torch has, and flash-attn; and those that cannot, with why."""
    on_cuda = given.q.is_cuda
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = (
        {
            name: functools.partial(sdpa_kernel, backend)
            for name, backend in (
                ("cuDNN", SDPBackend.CUDNN_ATTENTION),
                ("flash", SDPBackend.FLASH_ATTENTION),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION),
                ("math", SDPBackend.MATH),
            )
        }
        if on_cuda
        else {"flash for CPUs": nullcontext, "math": functools.partial(sdpa_kernel, SDPBackend.MATH)}
    )
    q, k, v = (x.transpose(1, 2) for x in (given.q, *keys))
    found: dict[str, Contender] = {}
    left_out: dict[str, str] = {}
    scores = given.q.shape[1] * given.q.shape[2] * keys[0].shape[1] * 4
    for name, way in ways.items():
        if name == "math" and scores > _UNFUSED_BYTES:
            left_out[name] = f"its scores are {scores / 2**30:.1f} GiB"
            continue

        def call(way: Callable[[], AbstractContextManager[Any]] = way) -> Tensor:
            with way():
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        try:
            call()
        except RuntimeError as error:
            left_out[name] = str(error).splitlines()[0][:200]
            continue
        found[name] = attention_contender(
            given, call, keys[0].shape[1], _dense_keys(keys), every=4 if name == "math" else 1
        )
    why = "no CUDA device" if not on_cuda else dense.why_not("flash_attn", given.q, *keys)
    if why:
        left_out["flash-attn"] = why
    else:
        scale = given.size.head_dim**-0.5
        found["flash-attn"] = attention_contender(
            given, lambda: dense.attend("flash_attn", given.q, *keys, scale)[0], keys[0].shape[1], _dense_keys(keys)
        )
    return found, left_out


def _dense_keys(keys: tuple[Tensor, Tensor]) -> KeysOf:
    return lambda head, group: (keys[0][0, :, head], keys[1][0, :, head])


def whole_history(given: Inputs, every: int = 1) -> Contender:
    """Dense attention to the window and every frame of the bank, through the backend that torch chooses."""
    q, k, v = (x.transpose(1, 2) for x in (given.q, *given.history))

    def call() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return attention_contender(given, call, k.shape[2], _dense_keys(given.history), every=every)


# ----------------------------------------------------------------------------------------------------- the released way


def released(given: Inputs, window_in_place: bool = False) -> Contender:
    """What the released MemFlow does in its sparse activation, without its clones of the cache: one mean over the
    chunk's queries, whole frames scored by the means of their keys (kept, as ours keeps descriptors), the best
    copied behind the window, dense attention. As many frames as hold the tokens that ours selects, rounded up.

    The released code puts window and frames together anew on every call. window_in_place: the window is in the kept
    buffer already, as a cache made for that could have it.
    """
    size = given.size
    frames = min(given.bank_frames, -(-given.selected_keys // size.frame_tokens))
    bank_k, bank_v = (x.unflatten(1, (-1, size.frame_tokens)) for x in given.bank)  # (1, F, T, H, D)
    means = bank_k.float().mean(2).to(bank_k.dtype)
    row = size.frame_tokens * size.head_dim  # a head's tokens of a frame lie behind one another
    pools = [x.transpose(1, 2).view(-1, row) for x in (given.pool_k, given.pool_v)]  # (H * all frames, T * D)
    all_frames, before = len(pools[0]) // size.heads, size.sink_frames + size.window_frames
    starts = all_frames * torch.arange(size.heads, device=given.q.device)[:, None]
    window_rows = starts + torch.arange(size.sink_frames, before, device=given.q.device)
    shape = (1, size.heads, size.window_keys + frames * size.frame_tokens, size.head_dim)
    k, v = given.q.new_empty(shape), given.q.new_empty(shape)  # fresh memory would cost as much as the copy
    places = [x[:, :, : size.window_keys].transpose(1, 2) for x in (k, v)]
    if window_in_place:
        for place, window in zip(places, given.window, strict=True):
            place.copy_(window)

    def best() -> Tensor:
        """(H, frames): each head's frames."""
        mean = given.q[0].sum(0) / size.queries  # torch's mean over bfloat16 takes up to fifteen times as long on a CPU
        return torch.einsum("hd,fhd->hf", mean, means[0]).topk(frames).indices

    def call() -> Tensor:
        rows = starts + before + best()
        for pool, kept in zip(pools, (k, v), strict=True):
            if window_in_place:
                for head in range(size.heads):
                    out = kept[0, head, size.window_keys :].view(-1, row)
                    torch.index_select(pool, 0, rows[head], out=out)
            else:
                torch.index_select(pool, 0, torch.cat([window_rows, rows], 1).flatten(), out=kept.view(-1, row))
        return F.scaled_dot_product_attention(given.q.transpose(1, 2), k, v).transpose(1, 2)

    def keys_of(head: int, group: int) -> tuple[Tensor, Tensor]:
        chosen = best()[head]
        alike = 2 * torch.finfo(means.dtype).eps  # means and scores are rounded to the inputs' dtype
        check_selection(given.q[0, :, head], means[0, :, head], chosen, frames, f"frames of head {head}", alike)
        pairs = zip(given.window, (bank_k, bank_v), strict=True)
        near, far = ((window[0, :, head], bank[0, chosen, :, head].flatten(0, 1)) for window, bank in pairs)
        return torch.cat(near), torch.cat(far)

    def check_kept() -> None:
        for head in range(size.heads):
            keys = given.bank[0][0, :, head]
            check_means(means[0, :, head], keys, size.frame_tokens, size.frame_tokens, f"frame means of head {head}")
        if window_in_place:
            same = all(torch.equal(place, window) for place, window in zip(places, given.window, strict=True))
            assert same, "the buffer does not hold the window"
        for x in (k, v):  # what the call is to copy over
            x[:, :, size.window_keys if window_in_place else 0 :] = torch.nan

    return attention_contender(given, call, size.window_keys + frames * size.frame_tokens, keys_of, check_kept)


# -------------------------------------------------------------------------------------------------------- FlexAttention


def flex(given: Inputs) -> Contender:
    """FlexAttention, compiled, with a BlockMask of the same selection. The window and every frame are padded to whole
    blocks beforehand, so that only ragged blocks need its mask; neither that nor making the BlockMask is timed."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    size, device = given.size, given.q.device
    block, padded = size.block_size, size.blocks_per_frame * size.block_size
    window_blocks = -(-size.window_keys // block)
    bank_start = window_blocks * block

    def padded_keys(window: Tensor, bank: Tensor) -> Tensor:
        frames = F.pad(bank.unflatten(1, (-1, size.frame_tokens)), (0, 0, 0, 0, 0, padded - size.frame_tokens))
        window = F.pad(window, (0, 0, 0, 0, 0, bank_start - size.window_keys))
        return torch.cat([window, frames.flatten(1, 2)], 1).transpose(1, 2).contiguous()

    keys, values = (padded_keys(window, bank) for window, bank in zip(given.window, given.bank, strict=True))

    def inside(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether a key of a ragged block is one."""
        in_window = key < size.window_keys
        in_bank = (key >= bank_start) & ((key - bank_start) % padded < size.frame_tokens)
        return in_window | in_bank

    # per head and query group: the window's blocks, then the selected; the ragged ones apart
    window_row = torch.arange(window_blocks, device=device).expand(*given.indices.shape[:3], -1)
    chosen = torch.cat([window_row, given.indices.long() + window_blocks], -1)
    unused = torch.cat([window_row < 0, given.indices < 0], -1)
    last = (chosen - window_blocks) % size.blocks_per_frame == size.blocks_per_frame - 1
    ragged = (chosen >= window_blocks) & last & (size.frame_tokens % block > 0)
    ragged |= (chosen == window_blocks - 1) & (size.window_keys % block > 0)

    def table(wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the blocks are wanted, and these first."""
        order = (~wanted).to(torch.int8).argsort(dim=-1, stable=True)
        room = keys.shape[2] // block - order.shape[-1]
        return wanted.sum(-1, dtype=torch.int32), F.pad(chosen.gather(-1, order), (0, room)).to(torch.int32)

    mask = BlockMask.from_kv_blocks(
        *table(ragged & ~unused), *table(~ragged & ~unused), (size.query_group, block), inside,
        (size.queries, keys.shape[2]),
    )  # fmt: skip
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    q = given.q.transpose(1, 2)

    def call() -> Tensor:
        return compiled(q, keys, values, block_mask=mask).transpose(1, 2)

    return attention_contender(given, call, size.window_keys + given.selected_keys, given.keys_of_ours)
