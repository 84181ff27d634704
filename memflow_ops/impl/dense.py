"""Dense attention to the local window by the best backend there is, with the LSE that our kernels continue from."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

# With fewer keys than this the window costs less inside our own launch than a backend's launch and the state it hands
# over (out and LSE, written and read once). An estimate for sm_90: no GPU has measured it.
OWN_BELOW_KEYS = 512
# Queries whose scores are looked at again at a time.
_ROWS = 256

FLASH_ATTENTION = ("flash_attn.cute", "flash_attn_interface", "flash_attn")
"""Where flash-attn 4, 3 and 2 have their `flash_attn_func`; the first that can be imported is used."""


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return out, lse


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out, lse


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Torch's fused attention for CPUs: out (B, H, Lq, D), LSE (B, H, Lq); bias (B, H, 1 or Lq, Lk) of 0 and -inf."""
    if any(s == 1 and n > 1 for s, n in zip(q.stride()[:3], q.shape[:3], strict=True)):
        q = q.contiguous()  # the kernel lays its output out like q, and takes another stride of 1 for the last
    if bias is not None:
        bias = bias.expand(-1, -1, q.shape[2], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    # it gives 0 as the LSE of a query whose scores are all -inf
    for b, h in (lse == 0).any(-1).nonzero().tolist():
        for rows in (lse[b, h] == 0).nonzero()[:, 0].split(_ROWS):
            scores = q[b, h, rows].to(lse.dtype) @ k[b, h].to(lse.dtype).T * scale
            if bias is not None:
                scores += bias[b, h, rows]
            lse[b, h, rows] = lse[b, h, rows].masked_fill(scores.amax(-1) == -torch.inf, -torch.inf)
    return out, lse


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    function = _flash_attn_func()
    keywords = inspect.signature(function).parameters
    wants_lse = {name: True for name in ("return_attn_probs", "return_lse") if name in keywords}
    result = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, **wants_lse)
    if not isinstance(result, tuple) or not isinstance(result[1], Tensor):
        raise RuntimeError(f"{function.__module__}.flash_attn_func returned no LSE: use another dense_backend")
    return result[0].transpose(1, 2), result[1]


def _flash_attn_func() -> Callable[..., object]:
    return importlib.import_module(flash_attn_module()).flash_attn_func


def flash_attn_module() -> str:
    """The module whose `flash_attn_func` the backend `flash_attn` calls; "" where there is none."""
    for name in FLASH_ATTENTION:
        try:
            if importlib.util.find_spec(name) is not None:
                return name
        except ModuleNotFoundError:  # of a parent package
            continue
    return ""


# Each takes q (B, H, Lq, D) and k, v (B, H, Lk, D) -> out like q, and the natural-log LSE (B, H, Lq or more); cuDNN's
# has a last dimension of 1 in some versions of torch, and some of flash-attn round the length up.
_BACKENDS = {"cudnn": _cudnn, "flash": _flash, "flash_attn": _flash_attn, "cpu": cpu_attention}
NAMES = ("auto", "own", *_BACKENDS)


def why_not(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why this backend cannot attend from q to k, v (B, L, H, D); "" if it can. Reads no values."""
    if backend == "own":
        return ""
    if backend == "cpu":
        return "" if q.device.type == "cpu" else f"it is for CPUs, the tensors are on {q.device}"
    if q.device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, got {q.dtype}"
    if q.shape[-1] % 8:
        return f"it needs a head size that is a multiple of 8, got {q.shape[-1]}"
    if backend == "flash_attn" and not flash_attn_module():
        return f"none of {', '.join(FLASH_ATTENTION)} is installed"
    if not all(_aligned(x) for x in (q, k, v)):
        return "it needs keys, values and queries that lie at multiples of 16 bytes"
    if backend == "flash_attn":
        return ""
    # It asks for shapes and types alone: as many query heads as key heads stand for the folded ones.
    by_head = q[:, :, : k.shape[2]].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    parameters = torch.backends.cuda.SDPAParams(*by_head, None, 0.0, False, False)
    can_use = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "flash": torch.backends.cuda.can_use_flash_attention,
    }[backend]
    return "" if can_use(parameters) else f"torch cannot use it for head size {q.shape[-1]} on this device"


def _aligned(x: Tensor) -> bool:
    """Whether every row of x can be read 16 bytes at a time."""
    steps = (x.stride(i) for i in range(x.dim() - 1) if x.shape[i] > 1)
    return x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in steps)


def resolve(backend: str, impl: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """What `auto` stands for, by implementation, device, dtype and length; a ValueError for one that cannot."""
    if k.shape[1] == 0:
        return "own"
    if backend != "auto":
        reason = why_not(backend, q, k, v)
        if reason:
            raise ValueError(f"dense_backend={backend!r} cannot attend here: {reason}")
        return backend
    if impl != "triton" or (q.device.type == "cuda" and k.shape[1] < OWN_BELOW_KEYS):
        return "own"
    for name in _preferred(q):
        if not why_not(name, q, k, v):
            return name
    return "own"


def _preferred(q: Tensor) -> tuple[str, ...]:
    """Best first. torch's flash attention is version 2, which does not use what Hopper added."""
    if q.device.type != "cuda":
        return ("cpu",)
    if torch.cuda.get_device_capability(q.device) >= (9, 0):
        return ("cudnn", "flash_attn", "flash")
    return ("flash", "flash_attn", "cudnn")


def _folded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, H, D) -> q (B, Hkv, H/Hkv * Lq, D), k and v (B, Hkv, Lk, D).

    The query heads that share a key head become more queries of it: a view where there is one per key head.
    """
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    folded = q.transpose(1, 2).reshape(batch, kv_heads, heads // kv_heads * queries, size)
    return folded, k.transpose(1, 2), v.transpose(1, 2)


def attend(backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention from q (B, Lq, H, D) to k, v (B, Lk, Hkv, D): out (B, Lq, H, D), LSE (B, H, Lq) float32."""
    batch, queries, heads, size = q.shape
    q, k, v = _folded(q, k, v)
    out, lse = _BACKENDS[backend](q, k, v, scale)
    out = out.reshape(batch, heads, queries, size).transpose(1, 2)
    lse = lse.reshape(batch, q.shape[1], -1)[..., : q.shape[2]]
    return out.contiguous(), lse.reshape(batch, heads, queries).contiguous()
