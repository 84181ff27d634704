"""Which self-attention modules can be swapped, told by the signature of their forward.

An option that is not known here may mean anything, so a forward with such an option is refused and never called with
the option left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_SHARED = frozenset({"x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start"})
_REFUSED = {
    frozenset({"kv_bank", "update_bank", "is_recache"}): "MemFlow's own attention, which has a memory bank of its own "
    "that a swap would leave out; stream its checkpoint with memory='released' (`memflow generate`) instead",
    frozenset(
        {"t_scale", "use_relative_rope", "method", "original_seq_len", "temporal_offset"}
    ): "LongLive 2's attention, which moves positions from shot to shot; a swap cannot follow that",
}
"""Modules that are known and cannot be swapped, by the options that tell them."""


@dataclass(frozen=True)
class CallForm:
    """Self-attention modules that are called in the same way."""

    name: str
    options: frozenset[str]
    """Of the forward, beside those that all kinds have."""
    returns_end: bool = False
    """Whether the forward also returns where the cache ends, which the model stores after all layers."""


CALL_FORMS = (
    CallForm("Self-Forcing", frozenset({"cache_start"})),
    CallForm("LongLive 1", frozenset({"cache_start", "sink_recache_after_switch"}), returns_end=True),
    CallForm("CausVid", frozenset({"current_end"})),
)


class Signature:
    """The parameters of a forward, and the form of call that they tell."""

    def __init__(self, forward: Callable[..., Any]):
        parameters = inspect.signature(forward).parameters
        self.names = tuple(parameters)
        self.defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}

    @property
    def has_cache(self) -> bool:
        """Whether this is the forward of a self-attention with a cache, of whatever kind."""
        return {"kv_cache", "current_start"} <= set(self.names)

    def call_form(self) -> CallForm:
        """The kind of module; a ValueError for one that cannot be swapped, with the reason."""
        further = frozenset(self.names) - _SHARED
        for form in CALL_FORMS:
            if further == form.options:
                return form
        for options, what in _REFUSED.items():
            if options <= further:
                raise ValueError(f"this is {what}. Nothing has been changed")
        known = set().union(*(form.options for form in CALL_FORMS))
        unknown = sorted(further - known) or sorted(further) or ["none beside those that all kinds have"]
        expected = "; ".join(f"{form.name}: {', '.join(sorted(form.options))}" for form in CALL_FORMS)
        raise ValueError(
            f"the self-attention's forward takes options that are not known here: {', '.join(unknown)}. Known are the "
            f"forwards with these ({expected}). Nothing has been changed; `attend_with_cache` can be called from a "
            "forward of your own"
        )

    def bind(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name, defaults included; a TypeError as a call of the forward would raise it."""
        if len(arguments) > len(self.names):
            raise TypeError(f"the self-attention takes {len(self.names)} arguments, got {len(arguments)}")
        positional = dict(zip(self.names, arguments, strict=False))
        twice, unknown = sorted(positional.keys() & named.keys()), sorted(named.keys() - set(self.names))
        call = {**self.defaults, **positional, **named}
        missing = [name for name in self.names if name not in call]
        for problem, names in (("given twice", twice), ("not known", unknown), ("missing", missing)):
            if names:
                raise TypeError(f"the self-attention takes {', '.join(self.names)}; {problem}: {', '.join(names)}")
        return call
