"""`swap_attention` and `restore_attention`: the forwards of a model's self-attention modules, replaced and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memflow_ops.geometry import Score
from memflow_ops.integrations.self_forcing.comparison import Attended, copy_cache, difference
from memflow_ops.integrations.self_forcing.signatures import Signature
from memflow_ops.integrations.self_forcing.their_cache import CacheAttention, DescribedCache, attend_with_cache
from memflow_ops.rotary import apply_rotation, rope_rotation
from memflow_ops.token_order import TokenOrderName
from memflow_ops.token_order import token_order as make_token_order

_ORIGINAL = "_memflow_original_forward"
_PARTS = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads")


def swap_attention(
    model: nn.Module,
    *,
    window_frames: int = 9,
    top_k: int = 24,
    block_size: int = 64,
    query_group: int | None = 128,
    dense_sink: bool = True,
    score: Score = "mean",
    token_order: TokenOrderName = "raster",
    impl: str = "auto",
    compare: bool = True,
) -> int:
    """Makes every self-attention module in `model` (itself included) attend with ours; returns how many there are.

    The options are those of `CacheAttention`. Calls without a cache, as in training, are left to the original forward.
    `restore_attention` undoes the swap.

    compare: every module's first call, and its first one past the first chunk, is also made by the original forward,
        and by ours with the whole cache attended to, each on a copy of the cache. Where outputs or written keys differ,
        the call is a ValueError that says by how much, and nothing has been written. False: no such comparison, for a
        place where the original forward cannot run.

    A ValueError, before anything is changed, where there is no such module, where one is swapped already, and where a
    forward takes options that a swap could not follow, as in LongLive 2 and MemFlow.
    """
    modules = [(module, signature) for module, signature in _self_attention(model) if signature.has_cache]
    if not modules:
        raise ValueError(
            "no self-attention of the Self-Forcing kind in this model: expected modules with q, k, v, o, norm_q, "
            "norm_k, num_heads, and a forward that takes kv_cache and current_start"
        )
    if any(_ORIGINAL in vars(module) for module, _ in modules):
        raise ValueError("attention has been swapped already; restore_attention(model) first")
    attention = CacheAttention(window_frames, top_k, block_size, query_group, dense_sink, score, impl, token_order)
    forwards = [_Forward(module, signature, attention, compare) for module, signature in modules]
    for forward in forwards:
        vars(forward.module)[_ORIGINAL] = forward.original
        forward.module.forward = forward
    return len(forwards)


def restore_attention(model: nn.Module) -> None:
    """Gives every module that `swap_attention` has changed its own forward back."""
    for module in model.modules():
        if _ORIGINAL in vars(module):
            del vars(module)[_ORIGINAL], vars(module)["forward"]


def _self_attention(model: nn.Module) -> Iterator[tuple[nn.Module, Signature]]:
    for module in model.modules():
        if all(hasattr(module, name) for name in _PARTS):
            yield module, Signature(vars(module).get(_ORIGINAL, module.forward))


class _Forward:
    """The forward of a swapped module."""

    def __init__(self, module: Any, signature: Signature, attention: CacheAttention, compare: bool):
        self.module, self.signature, self.attention = module, signature, attention
        self.original: Callable[..., Any] = module.forward
        self.call_form = signature.call_form()
        self._to_compare = {"first chunk", "later chunk"} if compare else set()

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """x (B, F * T, dim), grid_sizes (B, 3) frames, rows, columns -> (B, F * T, dim), called as theirs is."""
        call = self.signature.bind(arguments, named)
        if call["kv_cache"] is None:
            return self.original(*arguments, **named)
        if self._to_compare:
            self._compare(call)
        attended = self._attend(call, self.attention)
        return (attended.out, (*attended.ends, None)) if self.call_form.returns_end else attended.out

    def _attend(self, call: dict[str, Any], attention: CacheAttention) -> Attended:
        """Our attention over the cache of a call."""
        module, x, start = self.module, call["x"], int(call["current_start"])
        frames, rows, columns = (int(n) for n in call["grid_sizes"][0])
        tokens, size = rows * columns, x.shape[1]
        order = make_token_order(attention.token_order, rows, columns, x.device)
        stated = call.get("current_end", start + size)
        if int(stated) != start + size:
            raise ValueError(f"current_end must be current_start + {size} tokens = {start + size}, got {stated}")
        if order is not None:
            x = order.apply(x)
        heads = (module.num_heads, -1)
        v = module.v(x).unflatten(2, heads)
        q, k = (
            norm(linear(x)).unflatten(2, heads)
            for norm, linear in ((module.norm_q, module.q), (module.norm_k, module.k))
        )
        first = start // tokens
        ranges = ((first, first + frames), (0, rows), (0, columns))
        places = (torch.arange(*ends, dtype=torch.int64, device=x.device) for ends in ranges)
        rotation = rope_rotation(q.shape[-1], *places)
        if order is not None:
            rotation = order.apply(rotation[0]), order.apply(rotation[1])
        out, end = attend_with_cache(
            apply_rotation(q, *rotation).to(v.dtype),
            apply_rotation(k, *rotation).to(v.dtype),
            v,
            call["kv_cache"],
            start,
            attention,
            frame_tokens=tokens,
            sink_frames=getattr(module, "sink_size", 0),
            keep_sink=self.call_form.returns_end and not call["sink_recache_after_switch"],
        )
        out, keys = module.o(out.flatten(2)), call["kv_cache"]["k"][:, end - size : end]
        if order is not None:
            out, keys = order.undo(out), order.undo(keys)
        return Attended(out, keys, (start + size, end))

    # ------------------------------------------------------------------------------------------------- the comparison

    @torch.compiler.disable
    @torch.no_grad()
    def _compare(self, call: dict[str, Any]) -> None:
        """A ValueError where their attention and ours are not the same on this call; nothing is written."""
        seen = {"later chunk"} if int(call["current_start"]) > 0 else {"first chunk"}
        if not seen & self._to_compare:
            return
        capacity = call["kv_cache"]["k"].shape[1]
        theirs = self._their_attention({**call, "kv_cache": DescribedCache.without(copy_cache(call["kv_cache"]))})
        own_cache = DescribedCache.without(copy_cache(call["kv_cache"]))
        ours = self._attend({**call, "kv_cache": own_cache}, replace(self.attention, window_frames=capacity))
        found = difference(theirs, ours)
        if found:
            raise ValueError(
                f"{type(self.module).__module__}.{type(self.module).__qualname__} is called as {self.call_form.name}'s "
                f"attention is, but computes something else: at token {call['current_start']}, {found}. Expected were "
                "keys that are cached after RoPE at their absolute frames, and attention to the whole cache; LongLive "
                "with use_infinite_attention caches them before RoPE, for one. The cache has not been changed; "
                "restore_attention(model) gives the model its own attention back"
            )
        self._to_compare -= seen

    def _their_attention(self, call: dict[str, Any]) -> Attended:
        """Their attention over the cache of a call, with no limit on what it attends to."""
        cache, size = call["kv_cache"], call["x"].shape[1]
        limit = getattr(self.module, "max_attention_size", None)
        try:
            if limit is not None:
                self.module.max_attention_size = max(limit, cache["k"].shape[1])
            result = self.original(**call)
        except Exception as error:
            raise RuntimeError(
                f"{type(self.module).__qualname__}'s own forward fails here, so that ours cannot be compared with it: "
                f"{type(error).__name__}: {error}. The cache has not been changed; swap_attention(..., compare=False) "
                "does without the comparison"
            ) from error
        finally:
            if limit is not None:
                self.module.max_attention_size = limit
        if self.call_form.returns_end:
            out, (global_end, local_end, update) = result
            keys = None if update is None else update["new_k"]
        else:
            out, keys = result, None
            global_end = local_end = int(call["current_start"]) + size
            if "global_end_index" in cache:
                global_end, local_end = int(cache["global_end_index"]), int(cache["local_end_index"])
        if keys is None:
            keys = cache["k"][:, int(local_end) - size : int(local_end)]
        return Attended(out, keys, (int(global_end), int(local_end)))
