"""Saved states of a stream that several ranks make: whole in what is saved, each rank's heads in what is loaded.

So a stream that two ranks have saved can be continued by one or by four.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from memflow_ops.cache.attend import HeadShare
from memflow_ops.model.parallel.ranks import Ranks

HEADS_AT = {"pools": 4, "window": 4, "means": 4, "host": 2}
"""The entries of a cache's state that have heads, and the dimension of the heads: frame places are saved as (layers, B,
places, tokens or blocks, heads, ...), and a frame in host memory as (layers, tokens or blocks, heads, ...)."""

STORES_OF_RANKS = "stores of ranks"
"""The entry of a whole state that says what each rank has in its history folder."""


def whole_state(state: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The state of a cache with the heads of all ranks, from that of each rank's cache. All ranks get the whole."""

    def gathered(x: Tensor, at: int) -> Tensor:
        shape = [*x.shape[:at], x.shape[at] * ranks.count, *x.shape[at + 1 :]]
        whole = torch.empty(shape, dtype=x.dtype, device="cpu")
        # Layer by layer, because the device may have no room for more.
        for target, own in zip(whole, x, strict=True):
            parts = ranks.gather(own.to(ranks.device))
            target.copy_(torch.cat(list(parts), at - 1))
        return whole

    whole = _with_heads(state, gathered, state["layout"]["kv_heads"] * ranks.count)
    if state.get("stores"):
        whole[STORES_OF_RANKS] = [json.loads(stores) for stores in ranks.tell(json.dumps(state["stores"]))]
        whole["stores"] = []
    return whole


def own_state(state: Mapping[str, Any], heads: HeadShare) -> dict[str, Any]:
    """The state of the cache of one rank, from a whole one. A ValueError where the whole has other heads, or where its
    history lies in the folders of other ranks."""
    layout = state.get("layout")
    saved = layout.get("kv_heads") if isinstance(layout, Mapping) else None
    if saved != heads.whole:
        raise ValueError(f"the state is that of a cache with kv_heads={saved}, here {heads.whole}")
    check_stores(state, heads.whole // heads.own)
    own = _with_heads(state, lambda x, at: x.narrow(at, heads.first, heads.own), heads.own)
    if STORES_OF_RANKS in own:
        own["stores"] = own.pop(STORES_OF_RANKS)[heads.first // heads.own]
    return own


def check_stores(state: Mapping[str, Any], ranks: int) -> None:
    """A ValueError where the history of a state lies in the folders of another number of ranks than these."""
    count = len(state[STORES_OF_RANKS]) if STORES_OF_RANKS in state else 1 if state.get("stores") else ranks
    if count != ranks:
        raise ValueError(
            f"the state names a history on disk that {count} process(es) have kept, each its own heads, and as many "
            f"can go on from it, not {ranks}"
        )


def _with_heads(state: Mapping[str, Any], change: Callable[[Tensor, int], Tensor], heads: int) -> dict[str, Any]:
    def changed(value: Any, at: int) -> Any:
        if isinstance(value, Tensor):
            return change(value, at)
        return type(value)(changed(one, at) for one in value)  # lists and tuples of tensors

    new = {name: changed(state[name], at) for name, at in HEADS_AT.items() if name in state}
    return {**state, **new, "layout": {**state["layout"], "kv_heads": heads}}
