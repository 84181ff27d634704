"""Compares their attention and ours on the same inputs, before the first call of ours changes anything.

Some modules look like others and compute something else: LongLive with `use_infinite_attention` caches keys before
RoPE, for one. The output of a first chunk need not show it, so the keys that are written are compared too.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

EXACT, ROUNDED = 1e-3, 0.02
"""Differences that count as agreement, as shares of the largest absolute value: of keys in float32, and otherwise.

Half precisions differ by some of their rounding steps. So may the outputs of float32 modules, because some projects
compute their attention in bfloat16 whatever the model is in. What computes something else differs by tenths.
"""


class Attended(NamedTuple):
    """What a call of an attention left behind."""

    out: Tensor
    """(B, chunk tokens, dim), after the module's last projection."""
    keys: Tensor
    """The keys that were written, (B, up to chunk tokens, H, D): those of the chunk's last tokens."""
    ends: tuple[int, int]
    """Where the cache ends: in the whole video, and in the cache."""


def copy_cache(kv_cache: MutableMapping[str, Any]) -> dict[str, Any]:
    """A copy of a cache of theirs whose tensors can be written without changing the original."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in kv_cache.items()}


def difference(theirs: Attended, ours: Attended) -> str:
    """In words, how far ours is from theirs; "" where they agree."""
    if theirs.ends != ours.ends:
        return f"their cache then ends at token {theirs.ends[1]} ({theirs.ends[0]} of the video), ours at {ours.ends}"
    keys = ours.keys[:, ours.keys.shape[1] - theirs.keys.shape[1] :]
    limit = EXACT if theirs.keys.dtype == torch.float32 else ROUNDED
    found = []
    for name, a, b, share in (("cached keys", theirs.keys, keys, limit), ("outputs", theirs.out, ours.out, ROUNDED)):
        if a.numel():
            off, largest = (a.float() - b.float()).abs().max().item(), a.float().abs().max().item()
            if not off <= share * largest:  # a NaN is no agreement
                found.append(f"{name} differ by {off:.3g} (the largest of theirs is {largest:.3g})")
    return " and ".join(found)
