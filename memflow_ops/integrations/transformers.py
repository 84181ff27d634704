"""Our attention under the name "memflow" in models of transformers; importing this module registers it.

    from memflow_ops.integrations.transformers import set_memory

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="memflow")
    set_memory(model, window=1024, top_k=24)  # tokens in full, and blocks of the older ones; both have defaults
    model.generate(**inputs)

A pass over one token, as `generate` makes for every token after the prompt, attends to the newest `window` keys and to
the `top_k` most relevant blocks of the older ones. A pass over several tokens, such as a prompt, is dense, and with
`set_memory(..., sparse_prompts=True)` attends to blocks too. What is not causal, as in an encoder or from a decoder to
an encoder, is always dense.

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
from transformers.masking_utils import causal_mask_function, sdpa_mask

from memflow_ops.ops.attention import memory_attention
from memflow_ops.ops.checks import check_impl, check_positive

NAME = "memflow"
"""What a model is given as `attn_implementation`."""

# What a call may state without changing what is attended to: that is in the mask already. Models also hand on to every
# attention what was asked of their outputs and of their loss.
_NEUTRAL = frozenset(
    {"position_ids", "cache_position", "use_cache", "sliding_window", "return_dict", "is_causal"}
    | {"output_hidden_states", "output_router_logits", "num_items_in_batch"}
)


@dataclass(frozen=True)
class MemoryOptions:
    """How a token attends to the keys before it."""

    window: int = 1024
    """The newest keys, attended to in full."""
    top_k: int = 24
    """Blocks of the older keys that each head attends to."""
    block_size: int = 64
    """Keys of a block."""
    sparse_prompts: bool = False
    """Whether causal passes over several tokens attend to blocks too. They are cut into pieces of `window` tokens: a
    token then sees the keys of its piece and of the `window` before it in full."""
    query_group: int = 128
    """Tokens of such a pass that choose their blocks together."""
    impl: str = "auto"
    """Implementation of `memory_attention`."""

    def __post_init__(self) -> None:
        for name in ("window", "top_k", "block_size", "query_group"):
            check_positive(name, getattr(self, name))
        check_impl(self.impl)


_OPTIONS: WeakKeyDictionary[nn.Module, MemoryOptions] = WeakKeyDictionary()
_DEFAULTS = MemoryOptions()


def set_memory(
    model: nn.Module,
    *,
    window: int = 1024,
    top_k: int = 24,
    block_size: int = 64,
    sparse_prompts: bool = False,
    query_group: int = 128,
    impl: str = "auto",
) -> None:
    """Sets the options of `MemoryOptions` for all attention in a model of transformers, and chooses this attention.

    A ValueError or TypeError, before anything is changed, for impossible options.
    """
    options = MemoryOptions(window, top_k, block_size, sparse_prompts, query_group, impl)
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

    attention_mask: from `memory_mask`; None: where the attention is causal, a query sees the keys up to its own, the
        last query being that of the last key; elsewhere it sees all.

    A ValueError or NotImplementedError names what cannot be done.
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
    queries, keys = query.shape[2], key.shape[2]
    is_causal = options.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    sparse = is_causal and (queries == 1 or memory.sparse_prompts)
    if keys > memory.window and sparse:
        if attention_mask is not None:
            raise ValueError(
                f'attention "memflow" cannot mask keys where it chooses blocks of them: {keys} keys are more than the '
                f"window of {memory.window}. Prompts of unequal length (padding), a sliding window and a static cache "
                "need such a mask: give prompts of one length, or a window that holds all keys (set_memory)"
            )
        if dropout and module.training:
            raise ValueError(f'attention "memflow" has no dropout where it chooses blocks, got {dropout}')
        return _over_blocks(query, key, value, memory, scaling), None
    if is_causal and attention_mask is None and 1 < queries < keys:
        # torch's own causal mask is aligned to the first key, not to the last.
        attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    return cast(
        tuple[Tensor, None],
        sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal
        ),
    )


def _over_blocks(query: Tensor, key: Tensor, value: Tensor, memory: MemoryOptions, scaling: float | None) -> Tensor:
    """Causal attention of the last tokens to the newest keys and to blocks of the older ones: (B, Lq, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    first, pieces = k.shape[1] - q.shape[1], []
    for start in range(0, q.shape[1], memory.window):
        piece = q[:, start : start + memory.window]
        end = first + start + piece.shape[1]
        past = max(0, first + start + 1 - memory.window)  # so that the piece's first token sees its window in full
        pieces.append(
            memory_attention(
                piece,
                k[:, past:end],
                v[:, past:end],
                k[:, :past],
                v[:, :past],
                top_k=memory.top_k,
                block_size=memory.block_size,
                query_group=memory.query_group,
                causal=piece.shape[1] > 1,
                softmax_scale=scaling,
                impl=memory.impl,
            )
        )
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def memory_mask(batch_size: int, q_length: int, kv_length: int, **options: Any) -> Tensor | None:
    """The mask of a pass, (B, 1, Lq, Lk), True where a query attends; None where `memory_attention_forward` knows it.

    The arguments are those of transformers' `sdpa_mask`, whose own None can mean a causal mask aligned to the first
    key.
    """
    if _is_plainly_causal(q_length, kv_length, **options):
        return None
    mask = sdpa_mask(batch_size, q_length, kv_length, **{**options, "allow_is_causal_skip": False})
    if mask is None or q_length > 1:
        return cast("Tensor | None", mask)
    return None if bool(torch.all(mask)) else cast(Tensor, mask)  # one look for all layers


def _is_plainly_causal(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> bool:
    """Whether queries see all keys up to their own, and the last query is that of the last key.

    A static cache has its offset in a tensor and keys that nothing has written, so it is none of these.
    """
    return (
        mask_function is causal_mask_function
        and local_size is None
        and not isinstance(q_offset, Tensor)
        and q_offset + q_length == kv_offset + kv_length
        and (attention_mask is None or bool(torch.all(attention_mask)))
    )


AttentionInterface.register(NAME, memory_attention_forward)
AttentionMaskInterface.register(NAME, memory_mask)
