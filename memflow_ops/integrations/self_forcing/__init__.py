"""Our attention in causal models of the Self-Forcing kind (Self-Forcing, LongLive 1, CausVid), over their own cache.

    from memflow_ops.integrations.self_forcing import swap_attention, restore_attention

    swap_attention(model, window_frames=9, top_k=24)  # every self-attention module of the loaded model
    video = pipeline.inference(noise, prompts)        # their own code, with a cache of as many frames as you like
    restore_attention(model)

Their self-attention modules hold q, k, v, o, norm_q, norm_k, num_heads, and optionally sink_size (frames that are never
evicted). A call hands over a cache of one layer, see `their_cache`. There, every query attends to all of the cache.
Here, it attends to the newest frames and the sink in full and only to the `top_k` most relevant blocks of the older
ones, so that the cache can be made much longer.

What cannot be swapped is refused: by `swap_attention` where the signature of the forward tells (`signatures`), and
otherwise on the first calls, on which their attention and ours are compared (`comparison`).
"""

from memflow_ops.integrations.self_forcing.swap import restore_attention, swap_attention
from memflow_ops.integrations.self_forcing.their_cache import CacheAttention, attend_with_cache

__all__ = ["CacheAttention", "attend_with_cache", "restore_attention", "swap_attention"]
