"""Our attention under the name "memflow" in models of transformers; importing this module registers it.

    from memflow_ops.integrations.transformers import set_memory

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="memflow")
    set_memory(model, window=1024, top_k=24)  # tokens in full, and blocks of the older ones; both have defaults
    model.generate(**inputs)

A pass over one token, as `generate` makes for every token after the prompt, attends to the newest `window` keys and to
the `top_k` most relevant blocks of the older ones. Any other pass, such as that over a prompt or that of an encoder, is
dense and masked as the model asks.

transformers looks masks up under the name of the attention, and a name that it does not find there means no mask at
all: padding would be attended to. So attention and mask function are registered together. What one of them cannot do
is refused: padding and other masks where blocks are chosen, a softcap, attention sinks that are learned, and options
that are not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from memflow_ops.ops.attention import memory_attention

NAME = "memflow"
"""What a model is given as `attn_implementation`."""

# What a call may state without changing what is attended to, which is in the mask already.
_NEUTRAL = frozenset({"position_ids", "cache_position", "use_cache", "sliding_window", "return_dict", "is_causal"})


@dataclass(frozen=True)
class MemoryOptions:
    """How a pass over one token attends to the keys before it."""

    window: int = 1024
    """The newest keys, attended to in full."""
    top_k: int = 24
    """Blocks of the older keys that each head attends to."""
    block_size: int = 64
    """Keys of a block."""
    impl: str = "auto"
    """Implementation of `memory_attention`."""

    def __post_init__(self) -> None:
        for name in ("window", "top_k", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


_OPTIONS: WeakKeyDictionary[nn.Module, MemoryOptions] = WeakKeyDictionary()
_DEFAULTS = MemoryOptions()


def set_memory(
    model: nn.Module, *, window: int = 1024, top_k: int = 24, block_size: int = 64, impl: str = "auto"
) -> None:
    """Sets the options of `MemoryOptions` for all attention in a model of transformers, and chooses this attention.

    A ValueError, before anything is changed, for impossible options.
    """
    options = MemoryOptions(window, top_k, block_size, impl)
    cast(Any, model).set_attn_implementation(NAME)
    for module in model.modules():
        _OPTIONS[module] = options


def memory_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What a model of transformers calls: query (B, H, Lq, D), key and value (B, Hkv, Lk, D) -> (B, Lq, H, D).

    attention_mask: from `memory_mask`; None: nothing is masked. A ValueError or NotImplementedError names what cannot
    be done.
    """
    if options.pop("output_attentions", None):
        raise NotImplementedError('attention "memflow" never holds the weights; leave output_attentions out')
    unknown = sorted(name for name, value in options.items() if value is not None and name not in _NEUTRAL)
    if unknown:
        raise NotImplementedError(
            f'attention "memflow" does not know what these options of {type(module).__name__} mean: '
            f"{', '.join(unknown)}. Load the model with another attn_implementation"
        )
    memory = _OPTIONS.get(module, _DEFAULTS)
    past = key.shape[2] - memory.window
    if query.shape[2] > 1 or past <= 0:
        dense = {name: options[name] for name in ("is_causal",) if name in options}
        return cast(
            tuple[Tensor, None],
            sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **dense
            ),
        )
    if attention_mask is not None:
        raise ValueError(
            f'attention "memflow" cannot mask keys where it chooses blocks of them: {key.shape[2]} keys are more than '
            f"the window of {memory.window}. Prompts of unequal length (padding), a sliding window and a static cache "
            "need such a mask: give prompts of one length, or a window that holds all keys (set_memory)"
        )
    if dropout and module.training:
        raise ValueError(f'attention "memflow" has no dropout where it chooses blocks, got {dropout}')
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = memory_attention(
        q,
        k[:, past:],
        v[:, past:],
        k[:, :past],
        v[:, :past],
        top_k=memory.top_k,
        block_size=memory.block_size,
        softmax_scale=scaling,
        impl=memory.impl,
    )
    return cast(Tensor, out), None


def memory_mask(batch_size: int, q_length: int, kv_length: int, **options: Any) -> Tensor | None:
    """The mask of a pass, (B, 1, Lq, Lk), True where a query attends; None where every query attends to every key.

    The arguments are those of transformers' `sdpa_mask`. A causal mask is written out, so that None has one meaning.
    """
    mask = sdpa_mask(batch_size, q_length, kv_length, **{**options, "allow_is_causal_skip": q_length == 1})
    if mask is None or q_length > 1:
        return cast("Tensor | None", mask)
    return None if bool(torch.all(mask)) else cast(Tensor, mask)  # one look for all layers


AttentionInterface.register(NAME, memory_attention_forward)
AttentionMaskInterface.register(NAME, memory_mask)
