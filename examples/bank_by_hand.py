"""A frame cache, a memory bank and attention by hand, without any model: what the streaming loop does for one layer.

Run it with `python examples/bank_by_hand.py`.
"""

import torch

from memflow_ops import memory_attention
from memflow_ops.cache import CacheLayout, FrameCache, Relevance
from memflow_ops.rotary import apply_rotation, rope_rotation

ROWS, COLUMNS, HEADS, HEAD_DIM = 4, 6, 2, 16


def main() -> list[int]:
    """Streams eight chunks; returns the frames that the last one retrieved."""
    torch.manual_seed(0)
    layout = CacheLayout(
        layers=1,
        batch=1,
        frame_tokens=ROWS * COLUMNS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        chunk_frames=3,
        window_frames=6,
        sink_frames=3,
        bank_frames=2,
        device_frames=16,
        block_size=8,
    )
    cache, policy = FrameCache(layout), Relevance(layout.bank_frames)
    print(f"the cache takes {layout.device_bytes / 2**20:.2f} MiB, all of it allocated now")

    topics = torch.randn(3, HEADS, HEAD_DIM)  # what the chunks are about: 0, 1, 2, 0, 1, 2, ...
    retrieved: list[int] = []
    for chunk in range(8):
        topic = topics[chunk % len(topics)]
        text_keys = [topic[None, None]]  # per layer (B, text tokens, H, D): this prompt has one word
        if cache.candidate_frames()[0]:
            chosen = policy.choose(cache.candidates(), text_keys, torch.tensor([1], dtype=torch.int32))
            cache.set_bank(chosen.frames)
            retrieved = chosen.frames[0]

        first = cache.begin_chunk()
        q, k, v = topic + 0.5 * torch.randn(3, 1, layout.chunk_tokens, HEADS, HEAD_DIM)
        places = torch.arange(first, first + layout.chunk_frames), torch.arange(ROWS), torch.arange(COLUMNS)
        rotation = rope_rotation(HEAD_DIM, *places)
        # A model makes several passes over a chunk, each of which writes; here the only one is also the clean one.
        cache.write(0, apply_rotation(k, *rotation), v)
        cache.remember(0, k)
        memory = cache.memory(0)
        memory_attention(
            apply_rotation(q, *rotation),
            *cache.window(0),
            memory.keys,
            memory.values,
            memory_descriptors=memory.descriptors,
            memory_slots=memory.slots,
            memory_frames=memory.frames,
            top_k=4,
            block_size=layout.block_size,
            frame_tokens=layout.frame_tokens,
            query_group=None,
        )
        cache.commit()
        print(f"chunk {chunk}, topic {chunk % len(topics)}, frames {first} to {first + 2}: retrieved {retrieved}")
    return retrieved


if __name__ == "__main__":
    main()
