"""Checks of arguments. Each raises a TypeError or a ValueError that says what was given and what is expected."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memflow_ops.geometry import SCORES, Score, descriptor_width
from memflow_ops.impl import dense
from memflow_ops.impl.precision import wide_dtype
from memflow_ops.ops.registration import dispatch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IMPLEMENTATIONS = ("auto", "reference", "torch", "triton")


def check_tensor(name: str, x: object, dims: str, like: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
    """x is a floating tensor with a dimension per word of `dims`, contiguous in the last, and is like `like`.

    That means that it has the dtype and the device of `like`, which is q (None: any). dtype: what it has instead of a
    floating dtype, and of that of `like`.
    """
    _check_dense_tensor(name, x, dims)
    assert isinstance(x, Tensor)
    if x.dim() != dims.count(" ") + 1:
        words = dims.split()
        raise ValueError(f"{name} must have {len(words)} dimensions ({', '.join(words)}), got shape {tuple(x.shape)}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')} like the rest of the bank, got {x.dtype}")
    if dtype is None and x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    size = x.shape[-1]
    if size == 0:
        raise ValueError(f"{name} must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if x.stride(-1) != 1 and size > 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {x.stride()}")
    if like is not None:
        if dtype is None and x.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of q, {like.dtype}, got {x.dtype}")
        check_device(name, x, like)


def _check_dense_tensor(name: str, x: object, dims: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor ({dims.replace(' ', ', ')}), got {type(x).__name__}")
    if x.is_nested or x.layout != torch.strided:
        kind = "a nested tensor" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}: call to_dense() or to_padded_tensor() first")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}, got {x.device}")


def check_integers(name: str, x: object, shape: tuple[int, ...], like: Tensor) -> None:
    """x is an int32 tensor of `shape` (-1: any size) on `like`'s device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be an int32 tensor of shape {_words(shape)}, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}")
    if x.dim() != len(shape) or any(want not in (-1, got) for want, got in zip(shape, x.shape, strict=True)):
        raise ValueError(f"{name} must have shape {_words(shape)}, got {tuple(x.shape)}")
    check_device(name, x, like)


def _words(shape: tuple[int, ...]) -> str:
    """The shape as messages have it. Only for them: torch.compile cannot trace `str` of a size that is symbolic."""
    return f"({', '.join('any' if n < 0 else str(n) for n in shape)})"


def check_frame_counts(memory_frames: object, q: Tensor, groups: int) -> None:
    """How many leading frames of the bank are valid: int32, (B,) for all query groups, or (B, G) for each."""
    if isinstance(memory_frames, Tensor) and memory_frames.dim() not in (1, 2):
        shapes = f"({q.shape[0]}) or, for every query group, ({q.shape[0]}, {groups})"
        raise ValueError(f"memory_frames must have shape {shapes}, got {tuple(memory_frames.shape)}")
    by_group = isinstance(memory_frames, Tensor) and memory_frames.dim() == 2
    check_integers("memory_frames", memory_frames, (q.shape[0], groups) if by_group else (q.shape[0],), q)


def check_shape(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")


def check_positive(name: str, value: object) -> int:
    """The value, which is an int of at least 1. Integers of numpy and symbolic ints of torch.compile are ints too."""
    if not isinstance(value, (int, torch.SymInt)) and isinstance(value, numbers.Integral):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value  # type: ignore[return-value]


def check_flag(name: str, value: object) -> bool:
    """The value, which is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def check_moments(moments: object) -> int:
    """How many moments of a block's keys a descriptor has: 1, means, or 2, means and variances."""
    moments = check_positive("moments", moments)
    if moments > 2:
        raise ValueError(f"moments must be 1 (means) or 2 (means and variances), got {moments}")
    return moments


def check_score(score: object) -> None:
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")


def check_descriptor_heads(q: Tensor, descriptors: Tensor, score: Score) -> None:
    """descriptors (B, N, Hkv, width) have the width that the score takes, and otherwise fit q (B, Lq, H, D)."""
    width = descriptor_width(q.shape[-1], score)
    if descriptors.shape[-1] != width:
        raise ValueError(
            f"descriptors for score={score!r} and queries of head size {q.shape[-1]} must have {width} numbers, got "
            f"{descriptors.shape[-1]} (describe_blocks gives means alone, and with moments=2 means and variances)"
        )
    check_heads(q, descriptors[..., : q.shape[-1]], "descriptors")


def sizes_of_blocks(
    block_size: int | None, frame_tokens: int | None, blocks_per_frame: int | None, blocks: int
) -> tuple[int, int]:
    """Tokens per block and per frame of a bank of so many blocks; where tokens are not given, a block counts as one."""
    if (block_size is None) != (frame_tokens is None):
        raise ValueError(
            f"block_size and frame_tokens are given together or not at all, got {block_size} and {frame_tokens}"
        )
    if block_size is None or frame_tokens is None:
        return 1, max(blocks, 1) if blocks_per_frame is None else check_positive("blocks_per_frame", blocks_per_frame)
    frame = check_positive("frame_tokens", frame_tokens)
    size = min(check_positive("block_size", block_size), frame)
    if blocks_per_frame not in (None, -(-frame // size)):
        raise ValueError(
            f"blocks_per_frame must be {-(-frame // size)}, as block_size={size} and frame_tokens={frame} say, or "
            f"None, got {blocks_per_frame}"
        )
    return size, frame


def check_heads(q: Tensor, k: Tensor, name: str) -> None:
    """k (B, ..., Hkv, D) has the batch and head size of q (B, Lq, H, D), and H is a multiple of Hkv."""
    batch, *_, heads, size = q.shape
    kv_batch, *_, kv_heads, kv_size = k.shape
    if kv_batch != batch:
        raise ValueError(f"{name} must have the batch size of q, {batch}, got {kv_batch}")
    if kv_size != size:
        raise ValueError(f"{name} must have the head size of q, {size}, got {kv_size}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} heads of q must be a multiple of the heads of {name}, got {kv_heads}")


def check_pair(k_name: str, k: object, v_name: str, v: object, q: Tensor, dtype: torch.dtype | None = None) -> None:
    """Keys and values are (B, L, Hkv, D), of one shape, and fit the queries. dtype: see `check_tensor`."""
    check_tensor(k_name, k, "B L Hkv D", like=q, dtype=dtype)
    check_tensor(v_name, v, "B L Hkv D", like=q, dtype=dtype)
    assert isinstance(k, Tensor) and isinstance(v, Tensor)
    check_heads(q, k, k_name)
    check_shape(v_name, v, k.shape)


def check_bank(
    k_name: str,
    k: object,
    v_name: str,
    v: object,
    descriptors: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    q: Tensor,
) -> bool:
    """Keys and values of the bank fit the queries, and are of their dtype or, with all that reads them, int8.

    Returns whether they are int8; `check_scales` does the rest then.
    """
    is_int8 = torch.int8 in (getattr(k, "dtype", None), getattr(v, "dtype", None))
    check_pair(k_name, k, v_name, v, q, torch.int8 if is_int8 else None)
    if not is_int8 and k_scale is None and v_scale is None:
        return False
    scales = {"memory_k_scale": k_scale, "memory_v_scale": v_scale}
    for name, x in scales.items():
        if x is not None and not is_int8:
            raise ValueError(f"{name} is given, but {k_name} is {q.dtype}: only an int8 bank has scales")
    missing = [name for name, x in {"memory_descriptors": descriptors, **scales}.items() if x is None]
    if is_int8 and missing:
        raise ValueError(f"an int8 bank is read with {', '.join(missing)} too: see describe_blocks and quantise_memory")
    return is_int8


def check_scales(
    memory_k: Tensor, frame: int, block_size: int, descriptors: Tensor, k_scale: Tensor, v_scale: Tensor, q: Tensor
) -> None:
    """The scales of an int8 bank are those of its blocks and values, in the dtype of q."""
    batch, tokens, heads, size = memory_k.shape
    check_tensor("memory_k_scale", k_scale, "B N Hkv D", like=q)
    check_shape("memory_k_scale", k_scale, (batch, descriptors.shape[1], heads, size))
    _check_dense_tensor("memory_v_scale", v_scale, "B Lm Hkv")
    if v_scale.dtype != q.dtype:
        raise TypeError(f"memory_v_scale must have the dtype of q, {q.dtype}, got {v_scale.dtype}")
    check_shape("memory_v_scale", v_scale, (batch, tokens, heads))
    check_device("memory_v_scale", v_scale, q)


def check_no_gradient(*tensors: Tensor | None) -> None:
    """What attention to an int8 bank is made from needs no gradient."""
    if dispatch.needs_grad(*tensors):
        raise NotImplementedError(
            "attention to an int8 bank has no backward: call it under torch.no_grad(), or keep the bank in the dtype "
            "of q"
        )


def check_state(name: str, out: Tensor, lse: Tensor) -> None:
    """An attention state: out (B, Lq, H, D) and LSE (B, H, Lq) belong together, and carry gradients together."""
    check_tensor(f"the out of {name}", out, "B Lq H D")
    wide = wide_dtype(out.dtype)
    if not isinstance(lse, Tensor) or lse.dtype != wide:
        raise TypeError(f"the LSE of {name} must be a {wide} tensor, got {getattr(lse, 'dtype', type(lse).__name__)}")
    check_shape(f"the LSE of {name}", lse, (out.shape[0], out.shape[2], out.shape[1]))
    check_device(f"the LSE of {name}", lse, out)
    if dispatch.needs_grad(out) and not lse.requires_grad:
        raise ValueError(
            f"the out of {name} needs a gradient, but its LSE carries none (its backend does not differentiate it), so "
            f"gradients would be wrong: use memory_attention, which is one autograd node, or detach both"
        )


def check_query(q: object) -> None:
    """q is a floating tensor (B, Lq, H, D) that is not empty."""
    check_tensor("q", q, "B Lq H D")
    assert isinstance(q, Tensor)
    if 0 in q.shape:
        raise ValueError(f"q must not be empty, got shape {tuple(q.shape)}")


def check_impl(impl: object) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def check_dense_backend(dense_backend: object) -> None:
    if dense_backend not in dense.NAMES:
        raise ValueError(f"dense_backend must be one of {', '.join(dense.NAMES)}, got {dense_backend!r}")


def group_size(query_group: int | None, queries: int) -> int:
    """The number of queries that share a selection. None stands for all queries."""
    return queries if query_group is None else min(check_positive("query_group", query_group), queries)


def frame_size(frame_tokens: int | None, tokens: int, name: str) -> int:
    """The number of tokens per frame, of which `tokens` is a multiple. None stands for one frame of all tokens."""
    size = tokens if frame_tokens is None else check_positive("frame_tokens", frame_tokens)
    if size and tokens % size:
        raise ValueError(f"{name} must hold whole frames of {size} tokens (frame_tokens), got {tokens} tokens")
    return max(size, 1)


def scale_of(softmax_scale: float | None, q: Tensor) -> float:
    """The factor of the scores, a finite number. None stands for 1/sqrt(D)."""
    if softmax_scale is None:
        return float(q.shape[-1]) ** -0.5
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float, numbers.Real)):
        raise TypeError(f"softmax_scale must be a number, got {type(softmax_scale).__name__}")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)


def check_descriptors(
    name: str,
    descriptors: Tensor,
    memory_k: Tensor,
    frame: int,
    block_size: int,
    scores: tuple[Score, ...],
    like: Tensor,
) -> None:
    """Descriptors (B, N, Hkv, width) are of the blocks of memory_k, and of the dtype and on the device of `like`.

    scores: of which one takes descriptors of their width.
    """
    check_tensor(name, descriptors, "B N Hkv D", like=like)
    batch, tokens, heads, size = memory_k.shape
    widths = [descriptor_width(size, score) for score in scores]
    width = descriptors.shape[-1] if descriptors.shape[-1] in widths else min(widths)
    check_shape(name, descriptors, (batch, tokens // frame * -(-frame // block_size), heads, width))


def check_slots(slots: Tensor, q: Tensor, frames: int, name: str = "memory_slots", of: str = "the memory") -> None:
    """The slot table is (B, F) int32, and what it is of holds frames that it can name."""
    check_integers(name, slots, (q.shape[0], -1), q)
    if slots.shape[1] and not frames:
        raise ValueError(f"{name} names {slots.shape[1]} frames, but {of} holds none")


def check_neutral(**given: Any) -> None:
    """Arguments of `flash_attn_func` for what memory_attention does not do: they may only say that they are off."""
    for name, value in given.items():
        is_off, off, instead = _NEUTRAL[name]
        if not is_off(value):
            got = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"{name} must be {off}, got {got}: {instead}")


def _is_zero(value: Any) -> bool:
    return (type(value) is float or isinstance(value, numbers.Real)) and value == 0


def _is_everything(window_size: Any) -> bool:
    sides = window_size if isinstance(window_size, (tuple, list)) else ()
    return len(sides) == 2 and all(side is None or side == -1 for side in sides)


# For each argument: whether a value is neutral, what is neutral, and what there is instead.
_NEUTRAL: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "dropout_p": (_is_zero, "0.0", "memory_attention has no dropout"),
    "window_size": (_is_everything, "(-1, -1)", "memory_attention attends to all of k, so pass the window itself as k"),
    "softcap": (_is_zero, "0.0", "memory_attention does not cap scores"),
    "alibi_slopes": (lambda slopes: slopes is None, "None", "memory_attention adds no bias to scores"),
    "return_attn_probs": (
        lambda wanted: wanted is False,
        "False",
        "memory_attention never holds probabilities; return_lse=True adds the LSE",
    ),
}
