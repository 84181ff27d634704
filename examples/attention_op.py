"""The attention op in a module of your own: self-attention over a local window and a memory bank.

Run it with `python examples/attention_op.py`.
"""

import torch
from torch import Tensor, nn

from memflow_ops import describe_blocks, memory_attention

FRAME_TOKENS, BLOCK_SIZE = 96, 32


class MemorySelfAttention(nn.Module):
    """Multi-head self-attention whose queries also see the best blocks of a memory bank."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L, dim) -> queries, keys and values, each (B, L, heads, head_dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return q, k, v

    def forward(self, x: Tensor, bank: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """x (B, L, dim) and the bank's keys, values and descriptors -> (B, L, dim)."""
        q, k, v = self.project(x)
        keys, values, descriptors = bank
        out = memory_attention(
            q,
            k,
            v,
            keys,
            values,
            memory_descriptors=descriptors,
            top_k=8,
            block_size=BLOCK_SIZE,
            frame_tokens=FRAME_TOKENS,
            query_group=FRAME_TOKENS,
        )
        return self.out(out.flatten(2))


def main() -> Tensor:
    torch.manual_seed(0)
    attention = MemorySelfAttention(dim=128, heads=4)
    past = torch.randn(1, 20 * FRAME_TOKENS, 128)  # 20 frames that have been generated before
    with torch.no_grad():
        _, keys, values = attention.project(past)
        descriptors = describe_blocks(keys, BLOCK_SIZE, FRAME_TOKENS)  # once per frame, then kept

    chunk = torch.randn(1, 3 * FRAME_TOKENS, 128)
    out = attention(chunk, (keys, values, descriptors))
    out.square().mean().backward()  # the op is differentiable

    blocks = descriptors.shape[1]
    print(f"{chunk.shape[1]} queries attended to their own chunk and to 8 of {blocks} memory blocks")
    return out


if __name__ == "__main__":
    main()
