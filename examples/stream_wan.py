"""Streaming with a tiny Wan model of random weights: the loop that a real checkpoint goes through, in seconds on a CPU.

Run it with `python examples/stream_wan.py`. With a real checkpoint the model comes from `load_pretrained` in
memflow_ops.model.checkpoints.pretrained, and `encode` is UMT5; the command `memflow generate` does both, and decodes
the latents to a video.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CONFIG = ModelConfig(
    dim=64, ffn_dim=128, num_heads=2, num_layers=2, in_dim=16, out_dim=16, text_dim=32, text_len=16, freq_dim=32
)
SETTINGS = StreamSettings(
    memory="memflow",
    height=8,  # of a latent frame; the VAE makes 8 pixels of each
    width=12,
    window_frames=6,
    bank_frames=3,
    top_k=4,
    block_size=8,
    query_group=16,
    steps=2,
)


def encode(prompts: Sequence[str]) -> Tensor:
    """Stands in for UMT5: one random embedding per word, (B, words, text_dim), zero where a prompt is shorter."""
    longest = max(len(prompt.split()) for prompt in prompts)
    out = torch.zeros(len(prompts), longest, CONFIG.text_dim)
    for row, prompt in zip(out, prompts, strict=True):
        for i, word in enumerate(prompt.split()):
            row[i] = torch.randn(CONFIG.text_dim, generator=torch.Generator().manual_seed(sum(word.encode())))
    return out


def main() -> list[Chunk]:
    torch.manual_seed(0)
    model = CausalVideoModel(CONFIG).eval()
    streamer = Streamer(model, 1, SETTINGS, seed=0, encode=encode)
    story = ["a fox in the snow"] * 3 + ["a harbour at dusk"] * 3 + ["the fox in the snow"] * 2
    chunks = []
    for prompt in story:
        chunk = streamer.next_chunk([prompt])
        print(f"frames {chunk.first_frame:2} to {chunk.first_frame + 2:2}, {prompt!r}: retrieved {chunk.retrieved[0]}")
        chunks.append(chunk)
    return chunks


if __name__ == "__main__":
    main()
