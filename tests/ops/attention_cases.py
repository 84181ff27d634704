"""Random cases of memory_attention for hypothesis, and its tolerance, with torch's own dense attention as yardstick."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import memflow_ops


@dataclass
class Case:
    """Inputs (B, L, H, D) of memory_attention and its keyword arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    memory_k: Tensor | None
    memory_v: Tensor | None
    options: dict = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = {n: None if x is None else tuple(x.shape) for n, x in self.tensors().items()}
        return f"Case({self.q.dtype}, {shapes}, {self.options})"

    def tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in ("q", "k", "v", "memory_k", "memory_v")}

    def to(self, dtype: torch.dtype) -> Case:
        """The same values and strides in another dtype."""

        def convert(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)

        return replace(self, **{n: None if x is None else convert(x) for n, x in self.tensors().items()})

    def requires_grad(self) -> list[Tensor]:
        """Make every input that is not None a leaf of autograd, and return them."""
        for name, x in self.tensors().items():
            if x is not None:
                setattr(self, name, x.detach().clone().requires_grad_())
        return [x for x in self.tensors().values() if x is not None]

    def run(self, impl: str) -> tuple[Tensor, Tensor]:
        return memflow_ops.memory_attention(*self.tensors().values(), **self.options, return_lse=True, impl=impl)

    def indices(self, impl: str) -> Tensor | None:
        """The selection alone; None without a bank."""
        if self.memory_k is None or not self.memory_k.shape[1]:
            return None
        names = ("top_k", "query_group", "memory_frames", "memory_slots")
        size, frame = self.options["block_size"], self.options["frame_tokens"]
        descriptors = memflow_ops.describe_blocks(self.memory_k, size, frame, impl=impl)
        chosen = {name: self.options[name] for name in names}
        return memflow_ops.select_blocks(self.q, descriptors, blocks_per_frame=-(-frame // size), impl=impl, **chosen)


@st.composite
def cases(draw, integers: bool = False) -> Case:
    """Cases with odd sizes, GQA, ragged frames and groups, empty banks, slot tables and any strides."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    torch.manual_seed(number(0, 2**31))
    batch, kv_heads, head_dim = number(1, 2), number(1, 2), pick(4, 5, 8, 16, 24)
    heads, queries, dense = kv_heads * number(1, 3), number(1, 40), pick(0, 1, 7, 33)
    frames, frame_tokens = number(0, 5), number(1, 20)

    def tensor(tokens: int, count: int) -> Tensor:
        shape = (batch, tokens, count, head_dim)
        x = torch.randint(-2, 3, shape).double() if integers else torch.randn(shape, dtype=torch.float64)
        if draw(st.booleans()):
            return x
        # The same values have other strides here, and lie among NaN.
        pool = torch.full((batch, count, tokens + 3, head_dim + 2), torch.nan, dtype=torch.float64).transpose(1, 2)
        view = pool[:, 1 : tokens + 1, :, :head_dim]
        return view.copy_(x)

    options = dict(
        top_k=number(1, 12),
        block_size=number(1, 9),
        frame_tokens=frame_tokens,
        query_group=pick(None, 1, 2, 7, 16, 100),
        memory_frames=None,
        memory_slots=None,
        softmax_scale=pick(None, 0.3),
    )
    if frames and draw(st.booleans()):
        options["memory_slots"] = torch.randint(-1, frames + 1, (batch, number(1, 4)), dtype=torch.int32)
    if frames and draw(st.booleans()):
        options["memory_frames"] = torch.randint(-1, frames + 2, (batch,), dtype=torch.int32)
    bank = (tensor(frames * frame_tokens, kv_heads), tensor(frames * frame_tokens, kv_heads))
    if not frames and draw(st.booleans()):
        bank = (None, None)
    return Case(tensor(queries, heads), tensor(dense, kv_heads), tensor(dense, kv_heads), *bank, options)


def small_case(**options) -> Case:
    """A case with two ragged frames of 10 tokens, GQA, and 7 queries in groups of 3."""
    make = lambda tokens, heads: torch.randn(2, tokens, heads, 8, dtype=torch.float64)  # noqa: E731
    defaults = dict(top_k=3, block_size=4, frame_tokens=10, query_group=3, memory_frames=None, memory_slots=None)
    tensors = (make(7, 4), make(5, 2), make(5, 2), make(20, 2), make(20, 2))
    return Case(*tensors, {**defaults, "softmax_scale": None, **options})


def seen_of_window(case: Case) -> Tensor:
    """Which keys of the window each query sees, (B, Lq, Lk): the valid ones, with `causal` the first of them."""
    batch, queries, window = case.q.shape[0], case.q.shape[1], case.k.shape[1]
    used = case.options.get("seqused_k")
    valid = torch.full((batch,), window) if used is None else used.long().clamp(0, window)
    seen = valid.view(-1, 1).expand(-1, queries)
    if case.options.get("causal"):
        seen = (seen + torch.arange(1, queries + 1) - queries).clamp(max=valid.view(-1, 1))
    return torch.arange(window) < seen.unsqueeze(-1)


def visible(case: Case, indices: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """All keys and values (B, H, L, D) in a row, and how often each query attends to each of them (B, H, Lq, L)."""
    batch, queries, heads, _ = case.q.shape
    repeat = heads // case.k.shape[2]
    keys, values, masks = [case.k], [case.v], [seen_of_window(case).long().unsqueeze(1).expand(-1, heads, -1, -1)]
    if indices is not None:
        size, frame = case.options["block_size"], case.options["frame_tokens"]
        blocks, group = -(-frame // size), min(case.options["query_group"] or queries, queries)
        frames = case.memory_k.shape[1] // frame
        slots = case.options["memory_slots"]
        slots = torch.arange(frames).expand(batch, -1) if slots is None else slots.clamp(0, frames - 1)
        # From the tokens of each block and how often a group takes a block follows how often a query sees a token.
        token, place = torch.arange(frames * frame), torch.arange(slots.shape[1] * blocks)
        home = slots[:, place // blocks].unsqueeze(-1) * blocks + (place % blocks).unsqueeze(-1)  # [B, N, 1]
        covers = (token // frame * blocks + token % frame // size == home).long()  # [B, N, Lm]
        taken = (indices.long().unsqueeze(-1) == place).long().sum(-2)  # [B, H, G, N]
        mask = (taken.double() @ covers.double().unsqueeze(1)).long()  # [B, H, G, Lm]
        mask = mask[:, :, torch.arange(queries) // group]
        keys.append(case.memory_k)
        values.append(case.memory_v)
        masks.append(mask)
    k, v = (torch.cat(parts, 1).transpose(1, 2).repeat_interleave(repeat, 1) for parts in (keys, values))
    return k, v, torch.cat(masks, -1)


def dense_attention(case: Case, indices: Tensor | None) -> tuple[Tensor, Tensor]:
    """Plain masked attention in the case's dtype, without our code: out (B, Lq, H, D) and LSE (B, H, Lq).

    A key that is seen twice, because two frames of the bank lie in one slot, weighs twice: log 2 is added to its score.
    """
    k, v, count = visible(case, indices)
    scale = case.options["softmax_scale"] or case.q.shape[-1] ** -0.5
    q = case.q.transpose(1, 2)
    bias = count.to(q.dtype).log()
    empty = (count.sum(-1) == 0).unsqueeze(-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(empty, 0.0), scale=scale)
    scores = (q.double() @ k.double().mT) * scale + bias.double()
    return out.masked_fill(empty, 0.0).transpose(1, 2), scores.logsumexp(-1)


def assert_within_tolerance(ours: Tensor, dense: Tensor, exact: Tensor, name: str) -> None:
    """Our error against float64 is at most twice that of torch's dense attention in the same dtype, plus two roundings.

    In float32 an absolute error of 1e-5 is allowed in any case: inputs have unit variance.
    """
    error, yardstick = (float((x.double() - exact).abs().max()) if x.numel() else 0.0 for x in (ours, dense))
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    rounding = torch.finfo(ours.dtype).eps / 2 * largest
    limit = 2 * yardstick + 2 * rounding
    if ours.dtype == torch.float32:
        limit = max(limit, 1e-5)
    assert error <= limit, f"{name}: error {error:.2e}, dense attention's {yardstick:.2e}, limit {limit:.2e}"
