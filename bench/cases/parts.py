"""The parts of attention with memory, each beside the plainest way to do as much."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops import attend_selected, describe_blocks, frame_relevance, memory_attention, select_blocks
from memflow_ops.bench import inputs
from memflow_ops.bench.cases.attention import Inputs, attention_contender
from memflow_ops.bench.harness.case import OURS, Contender
from memflow_ops.bench.harness.correctness import (
    attend_one_head,
    check_copy,
    check_means,
    check_selection,
    rows_of,
    sampled,
    selected_tokens,
)
from memflow_ops.bench.sizes import Size
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout


def select(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Contender]:
    """The blocks of every query group; against mean, product and torch.topk, which leaves ties to chance."""
    given = Inputs.make(size, size.bank_frames, dtype, device, seed)
    groups, blocks = size.groups, given.descriptors.shape[1]
    missing = groups * size.query_group - size.queries

    def ours() -> Tensor:
        return select_blocks(
            given.q, given.descriptors, size.top_k, query_group=size.query_group,
            blocks_per_frame=size.blocks_per_frame,
        )  # fmt: skip

    def plain() -> Tensor:
        padded = F.pad(given.q, (0, 0, 0, 0, 0, missing)).unflatten(1, (groups, size.query_group)).float().sum(2)
        scores = torch.einsum("bghd,bnhd->bhgn", padded, given.descriptors.float())
        return scores.topk(min(size.top_k, blocks), -1, sorted=False).indices

    def check(indices: Tensor) -> None:
        for head, group in sampled(size.heads, groups):
            tile, table = given.q[0, rows_of(size, group), head], given.descriptors[0, :, head]
            check_selection(tile, table, indices[0, head, group], size.top_k, f"head {head}, group {group}")

    flops = (size.queries + 2 * groups * blocks) * size.dim
    moved = (size.queries + blocks) * size.dim * dtype.itemsize
    ways = {OURS: ours, "topk": plain}
    return {n: Contender(way, lambda way=way: check(way()), flops=flops, bytes=moved) for n, way in ways.items()}  # type: ignore[misc]


def attend(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Contender]:
    """The selected blocks, going on from the window's state; against dense attention to as many adjacent keys, and to
    the window, through memory_attention without a bank: a dense backend of torch's or flash-attn, which gives the LSE
    too, and our call around it."""
    given = Inputs.make(size, size.bank_frames, dtype, device, seed)
    state = memory_attention(given.q, *given.window, return_lse=True)
    assert isinstance(state, tuple)

    def ours() -> Tensor:
        return attend_selected(
            given.q, *given.bank, given.indices, block_size=size.block_size, frame_tokens=size.frame_tokens,
            query_group=size.query_group, resume=state,
        )[0]  # fmt: skip

    def dense(k: Tensor, v: Tensor) -> Contender:
        def call() -> Tensor:
            out = memory_attention(given.q, k, v)
            assert isinstance(out, Tensor)
            return out

        return attention_contender(given, call, k.shape[1], lambda head, group: (k[0, :, head], v[0, :, head]))

    k, v = (x[:, : given.selected_keys] for x in given.bank)
    return {
        OURS: attention_contender(given, ours, given.selected_keys, given.keys_of_ours),
        "as many keys, dense": dense(k, v),
        "window, dense": dense(*given.window),
    }


def describe(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Contender]:
    """The descriptors of one frame; against a copy of its keys."""
    k = inputs.correlated_tokens(1, size.frame_tokens, size.heads, size.head_dim, dtype, seed, str(device))
    kept = torch.empty_like(k)

    def ours() -> Tensor:
        return describe_blocks(k, size.block_size, size.frame_tokens)

    def copy() -> Tensor:
        return kept.copy_(k)

    def check() -> None:
        check_means(ours()[0], k[0], size.block_size, size.frame_tokens, "descriptors")

    moved = k.numel() * dtype.itemsize
    return {
        OURS: Contender(ours, check, flops=k.numel(), bytes=moved + moved // size.block_size),
        "copy": Contender(copy, lambda: check_copy(copy, [kept], [k]), bytes=2 * moved),
    }


def backward(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Contender]:
    """Forward and backward; against those of dense attention to the window, and beside the forward alone."""
    given = Inputs.make(size, size.bank_frames, dtype, device, seed)
    above = inputs.random_tokens(1, size.queries, size.heads, size.head_dim, dtype, seed + 1, str(device))
    leaves = [x.detach().clone().requires_grad_() for x in (given.q, *given.window, *given.bank)]
    q, k, v, *bank = leaves

    def gradients(out: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, of, above)

    def attended() -> Tensor:
        out = memory_attention(
            q, k, v, *bank, memory_descriptors=given.descriptors, top_k=size.top_k, block_size=size.block_size,
            frame_tokens=size.frame_tokens, query_group=size.query_group,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    @torch.enable_grad()
    def ours() -> tuple[Tensor, ...]:
        return gradients(attended(), leaves)

    @torch.enable_grad()
    def window() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return gradients(out, leaves[:3])

    @torch.enable_grad()
    def exact(head: int, selected: bool) -> list[Tensor]:
        """Those of one head's queries, keys and values, and of its bank's, every query group for itself."""
        of = [x.detach()[0, :, head].double().requires_grad_() for x in leaves[: 5 if selected else 3]]
        total = [torch.zeros_like(x) for x in of]
        for group in range(size.groups):
            rows, keys, values = rows_of(size, group), of[1], of[2]
            if selected:
                tokens = selected_tokens(size, given.selection(head, group))
                keys, values = (torch.cat([near, far[tokens]]) for near, far in zip(of[1:3], of[3:], strict=True))
            out = attend_one_head(of[0][rows], keys, values)
            for sum_, part in zip(total, torch.autograd.grad(out, of, above[0, rows, head].double()), strict=True):
                sum_ += part
        return total

    def check(found: tuple[Tensor, ...], selected: bool) -> None:
        if selected:
            given.check_descriptors()
        allowed = 5e-5 if dtype == torch.float32 else 0.02
        names = ("dq", "dk", "dv", "the bank's dk", "the bank's dv")
        for head, _ in sampled(size.heads, 1):
            for name, gradient, right in zip(names, found, exact(head, selected), strict=False):
                off = gradient[0, :, head].double() - right
                errors = {"largest": off.abs().max() / right.abs().max(), "mean": off.norm() / right.norm()}
                for of, error in errors.items():
                    assert error <= allowed, f"head {head}: {name} off by {error:.2e} of its {of} size"

    def contender(call: Callable[[], tuple[Tensor, ...]], keys: int, selected: bool) -> Contender:
        return Contender(
            call,
            lambda: check(call(), selected),
            flops=size.attention_flops(keys) * 7 // 2,  # seven products of every query with its keys
            bytes=3 * size.attention_bytes(keys, dtype.itemsize),
            graph=False,
        )

    keys = size.window_keys + given.selected_keys
    return {
        OURS: contender(ours, keys, True),
        "window": contender(window, size.window_keys, False),
        "ours, forward alone": attention_contender(given, attended, keys, given.keys_of_ours, graph=False),
    }


def relevance(size: Size, dtype: torch.dtype, device: torch.device, seed: int, history: int) -> dict[str, Contender]:
    """Every remembered frame against a prompt of 512 tokens; against scoring every token and then averaging."""
    text = inputs.random_tokens(1, 512, size.heads, size.head_dim, dtype, seed, str(device))
    frames = inputs.random_tokens(1, history, size.heads, size.head_dim, dtype, seed + 1, str(device)).unsqueeze(2)

    def ours() -> Tensor:
        return frame_relevance(text, frames, softmax_scale=1.0)

    def plain() -> Tensor:
        return torch.einsum("bthd,bfhd->bfth", text, frames[:, :, 0]).float().mean((2, 3))

    def check(found: Tensor) -> None:
        exact = torch.einsum("hd,fhd->f", text[0].double().mean(0), frames[0, :, 0].double()) / size.heads
        off = (found[0].double() - exact).abs().max()
        allowed = (1e-5 if dtype == torch.float32 else 1e-2) * exact.abs().max()
        assert off <= allowed, f"off by {off:.2e}, at most {allowed:.2e} is allowed"

    moved = (512 + history) * size.dim * dtype.itemsize
    return {
        OURS: Contender(ours, lambda: check(ours()), flops=(512 + 2 * history) * size.dim, bytes=moved),
        "every word": Contender(plain, lambda: check(plain()), flops=2 * 512 * history * size.dim, bytes=moved),
    }


def frame_write(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Contender]:
    """What one layer keeps of a chunk: a pass writes its keys and values, the clean pass takes means, the commit copies
    the prototype and describes it; against a copy of the keys and values."""
    layout = CacheLayout(
        1, 1, size.frame_tokens, size.heads, size.head_dim, size.chunk_frames, size.window_frames, size.sink_frames, 3,
        max(16, size.window_frames), block_size=size.block_size, dtype=dtype,
    )  # fmt: skip
    cache = FrameCache(layout, device)
    k, v = (
        inputs.correlated_tokens(1, size.queries, size.heads, size.head_dim, dtype, seed + n, str(device))
        for n in range(2)
    )
    kept = [torch.empty_like(x) for x in (k, v)]

    def ours() -> None:
        cache.begin_chunk()
        cache.write(0, k, v)
        cache.remember(0, k)
        cache.commit()

    def plain() -> None:
        for target, source in zip(kept, (k, v), strict=True):
            target.copy_(source)

    def check() -> None:
        """The timed call on chunk after chunk, all different, until a bank of prototypes has left the window."""
        assert not cache.committed
        without = -(-layout.sink_frames // layout.chunk_frames)  # chunks that leave no prototype
        chunks = without + layout.bank_frames + layout.window_chunks - 1
        written: list[tuple[Tensor, ...]] = []
        for _ in range(chunks):
            for x in (k, v):
                x.copy_(x.roll(7, 1))
            ours()
            frames = (x[0].clone().unflatten(0, (layout.chunk_frames, -1)) for x in (k, v))
            written += zip(*frames, strict=True)
        candidates = cache.candidates()
        past = [chunk * layout.chunk_frames for chunk in range(without, without + layout.bank_frames)]
        assert candidates.frames == [past], f"candidates are {candidates.frames}, expected {past}"
        cache.set_bank([past])
        (bank,) = cache.bank()
        cache.begin_chunk()
        memory, window, ring = cache.memory(0), cache.window(0), cache.window_frames()
        assert bank == [*range(layout.sink_frames), *past], f"the bank is {bank}"
        begun = (chunks + 1) * layout.chunk_frames
        assert sorted(ring) == [*range(begun - layout.window_frames, begun)], f"the window is {ring}"
        for frame, mean in zip(past, candidates.means[0, 0], strict=True):
            check_means(mean, written[frame][0], size.frame_tokens, size.frame_tokens, f"mean of frame {frame}")
        pools = [pool[0].unflatten(0, (layout.pool_frames, -1)) for pool in memory[:3]]
        for frame, place in zip(bank, memory.slots[0].tolist(), strict=True):
            *kept, descriptors = (pool[place] for pool in pools)
            check_kept(f"the slot of frame {frame}", kept, written[frame])
            check_means(descriptors, written[frame][0], size.block_size, size.frame_tokens, f"descriptors of {frame}")
        for place, frame in enumerate(ring):
            if frame < len(written):  # not of the chunk that has been begun
                kept = [x[0].unflatten(0, (len(ring), -1))[place] for x in window]
                check_kept(f"the window's frame {frame}", kept, written[frame])
        cache.abort()

    def check_kept(where: str, kept: Sequence[Tensor], frame: Sequence[Tensor]) -> None:
        for name, x, of in zip(("keys", "values"), kept, frame, strict=True):
            assert torch.equal(x, of), f"{where} does not hold the {name} that were written"

    moved = 4 * k.numel() * dtype.itemsize
    # the prototype is read and written once more
    more = 4 * (size.frame_tokens + size.blocks_per_frame) * size.dim * dtype.itemsize
    return {
        OURS: Contender(ours, check, bytes=moved + more, graph=False),
        "copy": Contender(plain, lambda: check_copy(plain, kept, [k, v]), bytes=moved, graph=False),
    }
