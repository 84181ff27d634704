"""Dense attention to the local window by backends of others, with the LSE from which our implementations continue."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from memflow_ops.geometry import Geometry
from memflow_ops.impl import NOT_INSTALLED, why_not_import

OWN_BELOW_KEYS = 512
"""With fewer keys than this, `auto` leaves the window to our own launch.

A backend costs a launch more, and its state (out and LSE) is written and read once. This is an estimate for sm_90: no
GPU has measured it.
"""
# `cpu_attention` looks again at the scores of so many queries at a time.
_QUERIES_AT_ONCE = 256

FLASH_ATTENTION = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""The modules in which flash-attn 4, 3 and 2 have their `flash_attn_func`. The first that can be imported is used."""


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = attention(q, k, v, None, True, is_causal=causal, scale=scale)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)
    return out, lse


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Torch's fused attention for CPUs, with its LSE.

    q (B, H, Lq, D), k and v (B, H, Lk, D); bias (B, H, 1 or Lq, Lk) holds 0 and -inf. Returns out (B, H, Lq, D) and the
    natural-log LSE (B, H, Lq), 0 and -inf where a query has no key.
    """
    if any(s == 1 and n > 1 for s, n in zip(q.stride()[:3], q.shape[:3], strict=True)):
        # The kernel lays its output out like q, and would take this stride of 1 for that of the last dimension.
        q = q.contiguous()
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[2], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    # The kernel gives 0 as the out and the LSE of a query whose scores are all -inf, or all NaN.
    for b, h in (lse == 0).any(-1).nonzero().tolist():
        for rows in (lse[b, h] == 0).nonzero()[:, 0].split(_QUERIES_AT_ONCE):
            scores = q[b, h, rows].to(lse.dtype) @ k[b, h].to(lse.dtype).T * scale
            if bias is not None:
                scores += bias[b, h, rows]
            best = scores.amax(-1)
            lse[b, h, rows] = torch.where(best.abs() < torch.inf, lse[b, h, rows], best)
            out[b, h, rows] = out[b, h, rows].masked_fill(best.isnan().unsqueeze(-1), torch.nan)
    return out, lse


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    function = _flash_attn_func()
    keywords = inspect.signature(function).parameters
    options = {name: True for name in ("return_attn_probs", "return_lse") if name in keywords}
    if causal:
        options["causal"] = True
    result = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, **options)
    if not isinstance(result, tuple) or not isinstance(result[1], Tensor):
        raise RuntimeError(f"{function.__module__}.flash_attn_func returned no LSE: use another dense_backend")
    return result[0].transpose(1, 2), result[1]


def _flash_attn_func() -> Callable[..., object]:
    return importlib.import_module(flash_attn_module()).flash_attn_func


def flash_attn_module() -> str:
    """The name of the module whose `flash_attn_func` the backend `flash_attn` calls; "" if none can be imported."""
    return next((name for name in FLASH_ATTENTION if not why_not_import(name)), "")


def why_no_flash_attn() -> str:
    """The reason why flash-attn cannot be imported; "" if it can."""
    if flash_attn_module():
        return ""
    broken = (reason for name in FLASH_ATTENTION if (reason := why_not_import(name)) != NOT_INSTALLED)
    return next(broken, f"{NOT_INSTALLED} (pip install 'memflow-ops[flash]')")


# Each takes q (B, H, Lq, D) and k, v (B, H, Lk, D), and returns out like q and the natural-log LSE (B, H, Lq or more).
# The LSE of cuDNN has a last dimension of 1 in some versions of torch, and some of flash-attn round its length up.
_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "cudnn": _cudnn,
    "flash": _flash,
    "flash_attn": _flash_attn,
    "cpu": cpu_attention,
}
NAMES = ("auto", "own", *_BACKENDS)
"""What `dense_backend` of memory_attention can be."""


def why_not(backend: str, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry | None = None) -> str:
    """The reason why this backend cannot attend from q to k, v (B, L, heads, D); "" if it can. Reads no values.

    geometry: says which keys the queries see; None: they see all.
    """
    if backend == "own":
        return ""
    if geometry is not None and geometry.seqused_k is not None:
        return "it takes no seqused_k, use own"
    if geometry is not None and geometry.window_slots is not None:
        return "it takes no window_slots, use own"
    if geometry is not None and geometry.causal:
        if backend == "cpu":
            return "it takes no causal mask, use own"
        # Torch aligns its mask to the top left, and the heads that share a key head are folded into queries.
        if q.shape[1:3] != k.shape[1:3]:
            lengths = f"{q.shape[1]} and {k.shape[1]} tokens and {q.shape[2]} and {k.shape[2]} heads"
            return f"with causal=True it needs q and k of one length and as many heads, got {lengths}, use own"
    if backend == "cpu":
        return "" if q.device.type == "cpu" else f"it is for CPUs, the tensors are on {q.device}"
    if q.device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] % 8:
        return f"it needs a head size that is a multiple of 8, got {q.shape[-1]}"
    if backend == "flash_attn" and (reason := why_no_flash_attn()):
        return reason
    if not all(is_aligned(x) for x in (q, k, v)):
        return "it needs keys, values and queries that lie at multiples of 16 bytes"
    if backend == "flash_attn":
        return ""
    # Torch asks for shapes and dtypes alone, so as many query heads as key heads can stand for the folded ones.
    q = q if q.shape[2] == k.shape[2] else q[:, :, : k.shape[2]]
    by_head = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    parameters = torch.backends.cuda.SDPAParams(*by_head, None, 0.0, False, False)
    can_use = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "flash": torch.backends.cuda.can_use_flash_attention,
    }[backend]
    return "" if can_use(parameters) else f"torch cannot use it for head size {q.shape[-1]} on this device"


def is_aligned(x: Tensor) -> bool:
    """Whether every vector of the last dimension of x starts at a multiple of 16 bytes."""
    steps = (x.stride(i) for i in range(x.dim() - 1) if x.shape[i] > 1)
    return x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in steps)


def resolve(backend: str, impl: str, q: Tensor, k: Tensor, v: Tensor, geometry: Geometry | None = None) -> str:
    """The name of the backend that attends; `auto` is chosen by implementation, device, dtype and length of the window.

    geometry: as in `why_not`. Raises a ValueError, with the reason, if `backend` cannot attend here.
    """
    if k.shape[1] == 0:
        return "own"
    if backend != "auto":
        reason = why_not(backend, q, k, v, geometry)
        if reason:
            raise ValueError(f"dense_backend={backend!r} cannot attend here: {reason}")
        return backend
    if impl != "triton" or (q.device.type == "cuda" and k.shape[1] < OWN_BELOW_KEYS):
        return "own"
    for name in _preferred(q):
        if not why_not(name, q, k, v, geometry):
            return name
    return "own"


def _preferred(q: Tensor) -> tuple[str, ...]:
    """The backends to try, best first. Torch's flash attention is version 2, which does not use what Hopper added."""
    if q.device.type != "cuda":
        return ("cpu",)
    if torch.cuda.get_device_capability(q.device) >= (9, 0):
        return ("cudnn", "flash_attn", "flash")
    return ("flash", "flash_attn", "cudnn")


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Dense attention from q (B, Lq, H, D) to k, v (B, Lk, Hkv, D): out (B, Lq, H, D) and LSE (B, H, Lq) float32.

    causal: query i sees the keys up to i; `why_not` says where a backend cannot do that.
    """
    attention = partial(_BACKENDS[backend], causal=True) if causal else _BACKENDS[backend]
    return attend_folded(attention, q, k, v, scale)


def attend_folded(
    attention: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention from q (B, Lq, H, D) to k, v (B, Lk, Hkv, D) by one of the signature of `_BACKENDS`: out and LSE.

    The query heads that share a key head become more queries of it: q becomes (B, Hkv, H / Hkv * Lq, D), which is a
    view where H is Hkv.
    """
    batch, queries, heads, size = q.shape
    kv_heads, rows = k.shape[2], heads // k.shape[2] * queries
    folded = q.transpose(1, 2).reshape(batch, kv_heads, rows, size)
    out, lse = attention(folded, k.transpose(1, 2), v.transpose(1, 2), scale)
    out = out.reshape(batch, heads, queries, size).transpose(1, 2)
    lse = lse.reshape(batch, kv_heads, -1)[..., :rows]
    return out.contiguous(), lse.reshape(batch, heads, queries).contiguous()
