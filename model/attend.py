"""What a chunk attends to: the `attend` that the streaming loop hands to the model, over a cache of the past."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from memflow_ops import memory_attention
from memflow_ops.cache import Memory
from memflow_ops.cache_released import ReleasedCache
from memflow_ops.model.transformer import Attend, apply_rotation

Observer = Callable[[int, Tensor, Memory], None]
"""observe(layer, q, memory): a chunk's rotated queries, (B, tokens, heads, head_dim), and what they choose from."""


def attend_as_released(
    cache: ReleasedCache,
    rotation: tuple[Tensor, Tensor],
    top_frames: int | None,
    *,
    impl: str = "auto",
    observe: Observer | None = None,
) -> Attend:
    """Sink, bank and local window as the released MemFlow attends to them; writes the chunk's keys and values.

    rotation: of `rope_rotation`, for the chunk's tokens.
    top_frames: frames of sink and bank that each head of a chunk keeps (sparse memory activation); None: all.
    observe: is shown what each layer selects from; only with `top_frames`.
    """
    frame_tokens = cache.layout.frame_tokens

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = apply_rotation(q, *rotation)
        cache.write(layer, apply_rotation(k, *rotation), v)
        if top_frames is None:
            return cast(Tensor, memory_attention(q, *cache.dense(layer), impl=impl))
        memory = cache.memory(layer)
        if observe is not None:
            observe(layer, q, memory)
        attended = memory_attention(
            q,
            *cache.window(layer),
            memory.keys,
            memory.values,
            memory_descriptors=memory.descriptors,
            top_k=top_frames,
            block_size=frame_tokens,
            frame_tokens=frame_tokens,
            query_group=None,
            memory_frames=memory.frames,
            memory_slots=memory.slots,
            impl=impl,
        )
        return cast(Tensor, attended)

    return attend
