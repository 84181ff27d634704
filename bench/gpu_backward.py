"""The backward pass on a GPU, for `make gpu-bench`: over its forward, and over dense attention's at equal FLOPs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from memflow_ops import attend_selected
from memflow_ops.impl import dense
from memflow_ops.ops import registration

if TYPE_CHECKING:
    from memflow_ops.bench.gpu import Bank, Bench

Call = Callable[[], Any]

_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cpu": SDPBackend.FLASH_ATTENTION,
}


def dense_forward_and_backward(bench: Bench, backend: str, k: Tensor, v: Tensor) -> Call:
    """A dense backend's forward and backward for all three gradients, through autograd."""
    grad = torch.randn_like(bench.q)
    leaves = [x.detach().requires_grad_() for x in (bench.q, k, v)]

    def run() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            if backend == "flash_attn":
                out = importlib.import_module(dense.flash_attn_module()).flash_attn_func(*leaves)
                out = out[0] if isinstance(out, tuple) else out
            else:
                with sdpa_kernel(_SDPA[backend]):
                    q, keys, values = (x.transpose(1, 2) for x in leaves)
                    out = F.scaled_dot_product_attention(q, keys, values).transpose(1, 2)
            return torch.autograd.grad(out, leaves, grad)

    return run


def own_backward(bench: Bench, bank: Bank | None, group: int, wanted: tuple[bool, ...], window: bool = True) -> Call:
    """Our backward alone, over the window and a selection of the bank."""
    s = bench.sizes
    sizes = (s.block_size, s.frame_tokens, group, s.head_dim**-0.5, "triton")
    k, v = (bench.k, bench.v) if window else (bench.k[:, :0], bench.v[:, :0])
    memory = (None, None, None) if bank is None else (bank.k, bank.v, bank.descriptors)
    out, lse, indices = registration.memory_attention(bench.q, k, v, *memory, None, None, s.top_k, *sizes, "own")
    grad = torch.randn_like(out)
    inputs = (bench.q, k if window else None, v if window else None, *memory[:2])
    return lambda: registration.attend_backward(grad, None, *inputs, indices, None, out, lse, list(wanted), *sizes)


def backward_rows(bench: Bench) -> list[dict[str, object]]:
    """The figures of the backward pass: what, measured, reach, then, notes."""
    s, group = bench.sizes, bench.sizes.query_group
    bank = bench.bank(s.bank_frames)
    kept, tuned = (True, True, True, False, False), (True,) * 5
    indices = bench.selection(bank, group)()
    selected = min(s.top_k * s.block_size, bench.k.shape[1])
    options: dict[str, Any] = dict(block_size=s.block_size, frame_tokens=s.frame_tokens, impl="triton")
    calls: dict[str, Call] = {
        "forward": bench.attention(bank, dense_backend="own"),
        "forward, window": bench.attention(None, dense_backend="own"),
        "forward, bank": lambda: attend_selected(bench.q, bank.k, bank.v, indices, query_group=group, **options),
        "backward": own_backward(bench, bank, group, kept),
        "backward, bank tuned": own_backward(bench, bank, group, tuned),
        "backward, window": own_backward(bench, None, group, kept),
        "backward, bank": own_backward(bench, bank, group, (True, False, False, True, True), window=False),
        "backward, bank, queries": own_backward(bench, bank, group, (True, *(False,) * 4), window=False),
        "per query, forward": bench.attention(bank, query_group=1, dense_backend="own"),
        "per query, backward": own_backward(bench, bank, 1, kept),
        "per query, backward, bank tuned": own_backward(bench, bank, 1, tuned),
    }
    for name in bench.backends:
        for what, keys in (("window", bench.k.shape[1]), ("selected", selected)):
            k, v = bench.k[:, :keys], bench.v[:, :keys]
            calls[f"{name} {what}, forward"] = bench.dense(name, k, v)
            calls[f"{name} {what}, both"] = dense_forward_and_backward(bench, name, k, v)
    times = bench.times(**calls)
    # 5 products, where the forward has 2; those that our kernels repeat are not counted
    work = {"window": 2.5 * s.flops(bench.k.shape[1]), "selected": 2.5 * s.flops(selected)}
    rate = lambda what, seconds: work[what] / seconds / 1e12  # noqa: E731
    rows: list[tuple[str, float, str, str, str]] = [
        ("backward over forward, our kernels", times["backward"] / times["forward"], "<= 3.0", "<= 2.5",
         "by products 7 / 2 = 3.5: nothing is added to from two programs"),
        ("the same, gradients of the bank too", times["backward, bank tuned"] / times["forward"], "", "", ""),
        ("the same, bank alone", times["backward, bank"] / times["forward, bank"], "", "",
         f"queries alone {times['backward, bank, queries'] / times['forward, bank']:.2f}"),
        ("the same, window alone", times["backward, window"] / times["forward, window"], "", "", ""),
        ("the same, query_group 1", times["per query, backward"] / times["per query, forward"], "", "",
         f"gradients of the bank too {times['per query, backward, bank tuned'] / times['per query, forward']:.2f}"),
    ]  # fmt: skip
    ours = {"window": times["backward, window"], "selected": times["backward, bank"]}
    for name in bench.backends:
        for what in work:
            both, forward = (times[f"{name} {what}, {part}"] for part in ("both", "forward"))
            theirs = both - forward
            reach = (">= 0.6", ">= 0.85") if name.startswith("flash") else ("", "")
            rows.append((f"backward TFLOP/s over {name}'s, {what} keys", theirs / ours[what], *reach,
                         f"{rate(what, ours[what]):.0f} over {rate(what, theirs):.0f} TFLOP/s; its own backward over "
                         f"forward {theirs / forward:.2f}"))  # fmt: skip
    names = ("what", "measured", "reach", "then", "notes")
    return [{**dict(zip(names, row, strict=True))} for row in rows] + [{"what": "seconds", "times": times}]
