"""What one would use in place of attention to a selection: dense attention, the released code's way, FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memflow_ops.bench.cases.attention_inputs import (
    AttentionInputs,
    KeysAndValues,
    all_of,
    attention_contender,
)
from memflow_ops.bench.harness.case import Contender
from memflow_ops.bench.harness.correctness import check_means, check_selection
from memflow_ops.impl import dense

# Bytes of scores that torch's unfused attention may hold at a time.
_UNFUSED_BYTES = 512 << 20

DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention from q (1, Lq, H, D) to k, v (1, Lk, H, D) -> (1, Lq, H, D); differentiable."""


# --------------------------------------------------------------------------------------------------- dense attention


def torch_attention(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None = None) -> Tensor:
    """Torch's attention through one of its backends; None: through the backend that torch chooses."""
    query, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    with nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)


def dense_ways(q: Tensor, keys: KeysAndValues) -> tuple[dict[str, DenseAttention], dict[str, str]]:
    """All of torch's dense attention and flash-attn, by name; and those that cannot attend to `keys`, with the reason.

    The first is what torch itself would choose.
    """
    if q.is_cuda:
        backends: dict[str, SDPBackend | None] = {
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "math": SDPBackend.MATH,
        }
    else:
        backends = {"flash for CPUs": None, "math": SDPBackend.MATH}
    found: dict[str, DenseAttention] = {}
    left_out: dict[str, str] = {}
    scores = q.shape[1] * q.shape[2] * keys[0].shape[1] * 4
    for name, backend in backends.items():
        if name == "math" and scores > _UNFUSED_BYTES:
            left_out[name] = f"its scores are {scores / 2**30:.1f} GiB"
            continue
        way = partial(torch_attention, backend=backend)
        try:
            way(q, *keys)
        except RuntimeError as error:
            left_out[name] = str(error).splitlines()[0][:200]
            continue
        found[name] = way
    why = dense.why_not("flash_attn", q, *keys) if q.is_cuda else "no CUDA device"
    if why:
        left_out["flash-attn"] = why
    else:
        scale = q.shape[-1] ** -0.5
        found["flash-attn"] = lambda q, k, v: dense.attend("flash_attn", q, k, v, scale)[0]
    return found, left_out


def dense_backends(given: AttentionInputs, keys: KeysAndValues) -> tuple[dict[str, Contender], dict[str, str]]:
    """Every way of `dense_ways` as a contender, and those that are left out."""
    ways, left_out = dense_ways(given.q, keys)
    found = {
        name: attention_contender(
            given,
            lambda way=way: way(given.q, *keys),  # type: ignore[misc]
            keys[0].shape[1],
            all_of(keys),
            every=4 if name == "math" else 1,
        )
        for name, way in ways.items()
    }
    return found, left_out


def whole_history(given: AttentionInputs, every: int = 1) -> Contender:
    """Dense attention to the window and every frame of the bank, through the backend that torch chooses."""
    keys = given.history
    return attention_contender(
        given, lambda: torch_attention(given.q, *keys), keys[0].shape[1], all_of(keys), every=every
    )


# ----------------------------------------------------------------------------------------------------- the released way


def released(given: AttentionInputs, window_in_place: bool = False) -> Contender:
    """What the released MemFlow does in its sparse activation, without its clones of the cache."""
    way = ReleasedWay(given, window_in_place)
    keys = given.size.window_keys + way.frames * given.size.frame_tokens
    return attention_contender(given, way.attend, keys, way.keys_of, way.check_before)


class ReleasedWay:
    """The released MemFlow's activation: whole frames, chosen once for all queries of a head, then dense attention.

    The mean of the chunk's queries scores every frame by the mean of its keys, which is stored as ours stores
    descriptors. The best frames are copied behind the window: as many as hold the tokens that ours selects, rounded up.
    The released code puts window and frames together anew on every call. window_in_place: the window is in the buffer
    already, as a cache made for that could have it.
    """

    def __init__(self, given: AttentionInputs, window_in_place: bool):
        size = given.size
        self.given, self.window_in_place = given, window_in_place
        self.frames = min(given.bank_frames, -(-given.selected_keys // size.frame_tokens))
        self.bank_k, self.bank_v = (x.unflatten(1, (-1, size.frame_tokens)) for x in given.bank)  # (1, F, T, H, D)
        self.means = self.bank_k.float().mean(2).to(self.bank_k.dtype)
        self.row = size.frame_tokens * size.head_dim  # The tokens of a head and frame lie behind one another.
        self.pools = [x.transpose(1, 2).view(-1, self.row) for x in (given.pool_k, given.pool_v)]  # (H * frames, row)
        self.before = size.sink_frames + size.window_frames
        device = given.q.device
        self.starts = len(self.pools[0]) // size.heads * torch.arange(size.heads, device=device)[:, None]
        self.window_rows = self.starts + torch.arange(size.sink_frames, self.before, device=device)
        shape = (1, size.heads, size.window_keys + self.frames * size.frame_tokens, size.head_dim)
        # The buffers are kept, because fresh memory would cost as much as the copy.
        self.k, self.v = given.q.new_empty(shape), given.q.new_empty(shape)
        self.places = [x[:, :, : size.window_keys].transpose(1, 2) for x in (self.k, self.v)]
        if window_in_place:
            for place, window in zip(self.places, given.window, strict=True):
                place.copy_(window)

    def best(self) -> Tensor:
        """The frames that each head takes, (H, frames)."""
        # A sum, because torch's mean over bfloat16 takes up to fifteen times as long on a CPU.
        mean = self.given.q[0].sum(0) / self.given.size.queries
        return torch.einsum("hd,fhd->hf", mean, self.means[0]).topk(self.frames).indices

    def attend(self) -> Tensor:
        size, rows = self.given.size, self.starts + self.before + self.best()
        for pool, kept in zip(self.pools, (self.k, self.v), strict=True):
            if self.window_in_place:
                for head in range(size.heads):
                    out = kept[0, head, size.window_keys :].view(-1, self.row)
                    torch.index_select(pool, 0, rows[head], out=out)
            else:
                all_rows = torch.cat([self.window_rows, rows], 1).flatten()
                torch.index_select(pool, 0, all_rows, out=kept.view(-1, self.row))
        return F.scaled_dot_product_attention(self.given.q.transpose(1, 2), self.k, self.v).transpose(1, 2)

    def keys_of(self, head: int, group: int) -> tuple[Tensor, Tensor]:
        chosen, means = self.best()[head], self.means
        alike = 2 * torch.finfo(means.dtype).eps  # Means and scores are rounded to the inputs' dtype.
        check_selection(
            self.given.q[0, :, head], means[0, :, head], chosen, self.frames, f"frames of head {head}", alike
        )
        pairs = zip(self.given.window, (self.bank_k, self.bank_v), strict=True)
        k, v = (torch.cat([window[0, :, head], bank[0, chosen, :, head].flatten(0, 1)]) for window, bank in pairs)
        return k, v

    def check_before(self) -> None:
        """Check the means and the window's copy, and overwrite what the call is to copy."""
        given, size = self.given, self.given.size
        for head in range(size.heads):
            means, keys = self.means[0, :, head], given.bank[0][0, :, head]
            check_means(means, keys, size.frame_tokens, size.frame_tokens, f"frame means of head {head}")
        if self.window_in_place:
            pairs = zip(self.places, given.window, strict=True)
            assert all(torch.equal(place, window) for place, window in pairs), "the buffer does not hold the window"
        for x in (self.k, self.v):
            x[:, :, size.window_keys if self.window_in_place else 0 :] = torch.nan


# -------------------------------------------------------------------------------------------------------- FlexAttention


def flex(given: AttentionInputs) -> Contender:
    """FlexAttention, compiled, with a BlockMask of the same selection.

    The window and every frame are padded to whole blocks beforehand, so that only ragged blocks need the mask's
    function. Neither the padding nor the making of the BlockMask is timed.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention  # It takes seconds to import.

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
        """Whether a position in a ragged block holds a key, and no padding."""
        in_window = key < size.window_keys
        in_bank = (key >= bank_start) & ((key - bank_start) % padded < size.frame_tokens)
        return in_window | in_bank

    # Per head and query group: the window's blocks, then the selected ones. Ragged blocks go into a table of their own.
    window_row = torch.arange(window_blocks, device=device).expand(*given.indices.shape[:3], -1)
    chosen = torch.cat([window_row, given.indices.long() + window_blocks], -1)
    unused = torch.cat([window_row < 0, given.indices < 0], -1)
    last = (chosen - window_blocks) % size.blocks_per_frame == size.blocks_per_frame - 1
    ragged = (chosen >= window_blocks) & last & (size.frame_tokens % block > 0)
    ragged |= (chosen == window_blocks - 1) & (size.window_keys % block > 0)

    def table(wanted: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the blocks are wanted, and the blocks in an order that has the wanted ones first."""
        order = (~wanted).to(torch.int8).argsort(dim=-1, stable=True)
        room = keys.shape[2] // block - order.shape[-1]
        return wanted.sum(-1, dtype=torch.int32), F.pad(chosen.gather(-1, order), (0, room)).to(torch.int32)

    mask = BlockMask.from_kv_blocks(
        *table(ragged & ~unused),
        *table(~ragged & ~unused),
        (size.query_group, block),
        inside,
        (size.queries, keys.shape[2]),
    )
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    q = given.q.transpose(1, 2)

    def call() -> Tensor:
        return compiled(q, keys, values, block_mask=mask).transpose(1, 2)

    return attention_contender(given, call, size.window_keys + given.selected_keys, given.window_and_selection())
