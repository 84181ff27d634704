"""The parts of attention with memory, each beside the plainest way to do as much."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops import attend_selected, describe_blocks, frame_relevance, memory_attention, select_blocks
from memflow_ops.bench import inputs
from memflow_ops.bench.baselines import Inputs, attention_contender, sampled
from memflow_ops.bench.contest import OURS, Contender
from memflow_ops.bench.sizes import Size
from memflow_ops.cache import FrameCache
from memflow_ops.cache_layout import CacheLayout


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
            rows = slice(group * size.query_group, (group + 1) * size.query_group)
            scores = given.descriptors[0, :, head].double() @ given.q[0, rows, head].double().mean(0)
            best, found = scores.sort(descending=True).values, scores[indices[0, head, group].long()]
            off = (found.sort(descending=True).values - best[: len(found)]).abs().max()
            assert len(set(indices[0, head, group].tolist())) == len(found), "a block is listed twice"
            assert off <= 1e-4 * scores.abs().max(), f"head {head}, group {group}: not the best blocks"

    flops = (size.queries + 2 * groups * blocks) * size.dim
    moved = (size.queries + blocks) * size.dim * dtype.itemsize
    ways = {OURS: ours, "topk": plain}
    return {n: Contender(way, lambda way=way: check(way()), flops=flops, bytes=moved) for n, way in ways.items()}  # type: ignore[misc]


def attend(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Contender]:
    """The selected blocks, going on from the window's state; against dense attention to as many adjacent keys, and to
    the window, with its LSE."""
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

    def check() -> None:
        last = (size.blocks_per_frame - 1) * size.block_size
        for block, tokens in ((0, slice(0, size.block_size)), (-1, slice(last, size.frame_tokens))):
            off = (ours()[0, block].double() - k[0, tokens].double().mean(0)).abs().max()
            assert off <= max(1e-5, 2 * torch.finfo(dtype).eps), f"block {block}: off by {off:.2e}"

    moved = k.numel() * dtype.itemsize
    return {
        OURS: Contender(ours, check, flops=k.numel(), bytes=moved + moved // size.block_size),
        "copy": Contender(lambda: kept.copy_(k), lambda: None, bytes=2 * moved),
    }


def backward(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Contender]:
    """Forward and backward; against those of dense attention to the window, and beside the forward alone."""
    given = Inputs.make(size, size.bank_frames, dtype, device, seed)
    above = inputs.random_tokens(1, size.queries, size.heads, size.head_dim, dtype, seed + 1, str(device))
    leaves = [x.detach().clone().requires_grad_() for x in (given.q, *given.window, *given.bank)]
    q, k, v, *bank = leaves

    def grad(out: Tensor, of: list[Tensor]) -> Tensor:
        return torch.autograd.grad(out, of, above)[0]

    def attended() -> Tensor:
        out = memory_attention(
            q, k, v, *bank, memory_descriptors=given.descriptors, top_k=size.top_k, block_size=size.block_size,
            frame_tokens=size.frame_tokens, query_group=size.query_group,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    @torch.enable_grad()
    def ours() -> Tensor:
        return grad(attended(), leaves)

    @torch.enable_grad()
    def window() -> Tensor:
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return grad(out, leaves[:3])

    @torch.enable_grad()
    def check(found: Tensor, selected: bool) -> None:
        for head, group in sampled(size.heads, size.groups):
            rows = slice(group * size.query_group, (group + 1) * size.query_group)
            window_k, window_v = (x[0, :, head] for x in given.window)
            keys, values = given.keys_of_ours(head, group) if selected else (window_k, window_v)
            few = q[0, rows, head].detach().double().requires_grad_()
            out = F.scaled_dot_product_attention(few[None], keys[None].double(), values[None].double())[0]
            (exact,) = torch.autograd.grad(out, few, above[0, rows, head].double())
            off = float((found[0, rows, head].double() - exact).abs().max() / exact.abs().max())
            allowed = 1e-4 if dtype == torch.float32 else 0.05
            assert off <= allowed, f"head {head}, group {group}: dq off by {off:.2e} of its largest value"

    def contender(call: Callable[[], Tensor], keys: int, selected: bool) -> Contender:
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
        assert off <= 1e-2 * exact.abs().max(), f"off by {off:.2e}"

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
        assert not cache.committed  # before anything else, so that the window is this chunk
        cache.begin_chunk()
        cache.write(0, k, v)
        found = cache.window(0)
        cache.abort()
        for name, x, given in zip("kv", found, (k, v), strict=True):
            assert torch.equal(x, given), f"the window does not hold the chunk's {name}"

    moved = 4 * k.numel() * dtype.itemsize
    # the prototype is read and written once more
    more = 4 * (size.frame_tokens + size.blocks_per_frame) * size.dim * dtype.itemsize
    return {
        OURS: Contender(ours, check, bytes=moved + more, graph=False),
        "copy": Contender(plain, lambda: None, bytes=moved, graph=False),
    }
