"""Memory behind the attention of diffusers' `WanTransformer3DModel`, tiny and with random weights.

Run it with `python examples/diffusers_memory.py`. It needs diffusers (pip install 'memflow-ops[wan]'). A real
transformer must have been trained to generate causally, chunk by chunk: memory does not make a bidirectional model
causal.
"""

from itertools import pairwise

import torch
from diffusers import WanTransformer3DModel

from memflow_ops.integrations.diffusers import attach_memory

HEIGHT, WIDTH, TEXT_DIM = 4, 6, 32
SIGMAS = (1.0, 0.5, 0.0)


@torch.no_grad()
def main() -> list[list[int]]:
    """Streams six chunks; returns the frames that each retrieved."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
        rope_max_seq_len=64,
    ).eval()
    memory = attach_memory(
        transformer, height=HEIGHT, width=WIDTH, window_frames=6, bank_frames=2, top_k=3, block_size=4
    )
    texts = torch.randn(2, 1, 8, TEXT_DIM)  # embeddings of two prompts
    retrieved = []
    for chunk in range(6):
        text = texts[chunk // 2 % 2]
        frames = memory.begin_chunk(text).frames[0]
        latents = torch.randn(1, 16, 3, HEIGHT, WIDTH)
        for sigma, following in pairwise(SIGMAS):
            velocity = transformer(latents, torch.tensor([1000 * sigma]), text).sample
            latents = latents + (following - sigma) * velocity
        with memory.clean():  # the pass that leaves the keys which later chunks see
            transformer(latents, torch.zeros(1), text)
        memory.commit()
        print(f"chunk {chunk}: retrieved frames {frames}")
        retrieved.append(frames)
    memory.detach()
    return retrieved


if __name__ == "__main__":
    main()
