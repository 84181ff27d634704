"""Random cases of a window of which queries see a part, and plain attention in loops over what each query sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import memflow_ops

EMPTY, ALL = -3, 99
"""Values of seqused_k that are clamped to no key and to all keys."""


def make_window(queries: int, keys: int, used: tuple[int, ...] | None, *, heads=(2, 1), bank=False, seed=0, **options):
    """Inputs (B, L, H, D) by name in float64 and options, with NaN in every key of the window that is not valid."""
    generator = torch.Generator().manual_seed(seed)
    batch = 2 if used is None else len(used)
    make = lambda tokens, count: torch.randn(  # noqa: E731
        batch, tokens, count, 16, generator=generator, dtype=torch.float64
    )
    inputs = {"q": make(queries, heads[0]), "k": make(keys, heads[1]), "v": make(keys, heads[1])}
    if bank:
        inputs |= {"memory_k": make(24, heads[1]), "memory_v": make(24, heads[1])}
        options |= dict(top_k=2, block_size=5, frame_tokens=12)
    options = {"causal": True, "query_group": 16, **options}
    if used is not None:
        options["seqused_k"] = torch.tensor(used, dtype=torch.int32)
        for b, count in enumerate(used):
            for name in ("k", "v"):
                inputs[name][b, max(count, 0) :] = torch.nan
    return inputs, options


def narrowed(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs in another dtype, as leaves of autograd."""
    return {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}


def expected(inputs: dict[str, Tensor], options: dict, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Out and LSE of plain attention in `dtype`, query by query over the keys that it sees. Selects for itself."""
    given = {name: x.to(dtype) for name, x in inputs.items()}
    q, k = given["q"], given["k"]
    batch, queries, heads, size = q.shape
    used = options.get("seqused_k")
    indices = selection(inputs, options)
    rows, totals = [], []
    for b in range(batch):
        valid = k.shape[1] if used is None else min(max(int(used[b]), 0), k.shape[1])
        for h in range(heads):
            kv = h // (heads // k.shape[2])
            for i in range(queries):
                count = min(max(i + 1 + valid - queries, 0), valid) if options["causal"] else valid
                keys, values = given["k"][b, :count, kv], given["v"][b, :count, kv]
                if indices is not None:
                    tokens = tokens_of(indices[b, h, i // options["query_group"]], options)
                    keys = torch.cat([keys, given["memory_k"][b, tokens, kv]])
                    values = torch.cat([values, given["memory_v"][b, tokens, kv]])
                query = q[b, i : i + 1, h]
                total = (query.double() @ keys.double().T * size**-0.5).logsumexp(-1)
                # Without keys torch's attention gives NaN; ours is 0 and has no gradient.
                out = F.scaled_dot_product_attention(query, keys, values) if len(keys) else torch.zeros_like(query)
                rows.append(out[0])
                totals.append(total[0])
    out = torch.stack(rows).view(batch, heads, queries, size).transpose(1, 2)
    return out, torch.stack(totals).view(batch, heads, queries)


def selection(inputs: dict[str, Tensor], options: dict) -> Tensor | None:
    """The blocks that the reference selects; None without a bank."""
    if "memory_k" not in inputs:
        return None
    size, frame = options["block_size"], options["frame_tokens"]
    descriptors = memflow_ops.describe_blocks(inputs["memory_k"].detach().double(), size, frame, impl="reference")
    names = ("top_k", "query_group", "memory_frames")
    chosen = {name: options[name] for name in names if name in options}
    q = inputs["q"].detach().double()
    return memflow_ops.select_blocks(q, descriptors, blocks_per_frame=-(-frame // size), impl="reference", **chosen)


def tokens_of(blocks: Tensor, options: dict) -> list[int]:
    """The tokens of blocks of the bank, -1 is none."""
    size, frame = options["block_size"], options["frame_tokens"]
    per_frame = -(-frame // size)
    tokens: list[int] = []
    for block in blocks.tolist():
        if block >= 0:
            start = block // per_frame * frame + block % per_frame * size
            tokens += range(start, min(start + size, (block // per_frame + 1) * frame))
    return tokens


def with_gradients(run, inputs: dict[str, Tensor], weights: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Out, LSE (0 where it is -inf) and the gradients of all inputs of a loss of both."""
    out, lse = run(inputs)
    seen = torch.where(lse == -torch.inf, 0.0, lse)
    loss = (out * weights[0].to(out.dtype)).sum() + (seen * weights[1].to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    pairs = zip(grads, inputs.values(), strict=True)
    return [out.detach(), lse.detach(), *(torch.zeros_like(x) if g is None else g for g, x in pairs)]


def make_paged(queries: int, table: list[list[int]], used: tuple[int, ...] | None = None, *, page: int = 12, **options):
    """As make_window, with k and v in a pool of 6 frames of `page` tokens, which `window_slots` finds; it may name a
    frame twice. What is no valid key is NaN. Also returns a function: the window (B, Lk, Hkv, D) of a pool."""
    slots = torch.tensor(table, dtype=torch.int32)
    valid = (slots.shape[1] * page,) * len(table) if used is None else used
    inputs, options = make_window(queries, 6 * page, (6 * page,) * len(table), **options)
    options |= dict(window_slots=slots, frame_tokens=page)
    if used is None:
        del options["seqused_k"]
    else:
        options["seqused_k"] = torch.tensor(used, dtype=torch.int32)
    tokens = (slots.clamp(0, 5).long() * page).unsqueeze(-1) + torch.arange(page)
    for b, of_story in enumerate(tokens.flatten(1)):
        read = torch.zeros(6 * page, dtype=torch.bool)
        read[of_story[: max(valid[b], 0)]] = True
        for name in ("k", "v"):
            inputs[name][b, ~read] = torch.nan
    return inputs, options, lambda pool: pool[torch.arange(len(table))[:, None], tokens.flatten(1)]


def as_one(inputs: dict[str, Tensor], options: dict, window_of) -> tuple[dict[str, Tensor], dict]:
    """The same window as tensors of its own."""
    options = {name: value for name, value in options.items() if name != "window_slots"}
    return inputs | {name: window_of(inputs[name]) for name in ("k", "v")}, options
