"""What is measured: each case is one call, what it is compared with, and the floating-point operations of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memflow_ops import describe_blocks, memory_attention, select_blocks
from memflow_ops.bench import inputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention layer with memory; defaults are Wan 2.1 1.3B at 480 x 832, a third of a chunk per call."""

    queries: int = 1560
    heads: int = 12
    head_dim: int = 128
    frame_tokens: int = 1560
    window_frames: int = 9
    bank_frames: int = 32
    block_size: int = 64
    top_k: int = 24
    query_group: int = 120

    @property
    def dense_flops(self) -> int:
        """Two products over the window."""
        return 4 * self.queries * self.window_frames * self.frame_tokens * self.heads * self.head_dim

    @property
    def memory_flops(self) -> int:
        """Two products over the selected blocks, counted as full; scores of the descriptors."""
        blocks = -(-self.frame_tokens // self.block_size) * self.bank_frames
        groups = -(-self.queries // self.query_group)
        chosen = min(self.top_k, blocks) * self.block_size
        return (4 * self.queries * chosen + 2 * groups * blocks) * self.heads * self.head_dim

    def gathered_bytes(self, dtype: torch.dtype) -> int:
        """Keys and values of all selections, each counted once per query group and head."""
        groups = -(-self.queries // self.query_group)
        return 2 * groups * self.heads * self.top_k * self.block_size * self.head_dim * dtype.itemsize


@dataclass(frozen=True)
class Case:
    """`ours` and the `baseline` it is timed against, in turn."""

    name: str
    ours: Callable[[], object]
    baseline: Callable[[], object]
    flops_ratio: float
    notes: dict[str, object]


def attention_case(shape: Shape, dtype: torch.dtype, kind: str, layout: str, device: torch.device) -> Case:
    """memory_attention with stored descriptors over the same local window without memory.

    kind: `correlated` or `random` inputs. layout: `tokens` for plain (B, L, H, D) tensors, `heads` where a head's
    tokens are adjacent.
    """
    make = inputs.correlated_tokens if kind == "correlated" else inputs.random_tokens
    tokens = {
        "q": shape.queries,
        "k": shape.window_frames * shape.frame_tokens,
        "v": shape.window_frames * shape.frame_tokens,
        "memory_k": shape.bank_frames * shape.frame_tokens,
        "memory_v": shape.bank_frames * shape.frame_tokens,
    }
    tensors = {}
    for seed, (name, count) in enumerate(tokens.items()):
        x = make(1, count, shape.heads, shape.head_dim, dtype, seed + 1).to(device)
        tensors[name] = x.transpose(1, 2).contiguous().transpose(1, 2) if layout == "heads" and name != "q" else x
    q, k, v, memory_k, memory_v = tensors.values()
    descriptors = describe_blocks(memory_k, shape.block_size, shape.frame_tokens)
    indices = select_blocks(
        q, descriptors, shape.top_k, query_group=shape.query_group,
        blocks_per_frame=-(-shape.frame_tokens // shape.block_size),
    )  # fmt: skip

    def ours() -> object:
        return memory_attention(
            q, k, v, memory_k, memory_v, memory_descriptors=descriptors, top_k=shape.top_k,
            block_size=shape.block_size, frame_tokens=shape.frame_tokens, query_group=shape.query_group,
        )  # fmt: skip

    groups = indices.shape[2]
    notes: dict[str, object] = {
        "union_of_all_groups": inputs.union_size(indices, groups),
        "blocks_chosen": groups * indices.shape[3],
        "gathered_bytes": shape.gathered_bytes(dtype),
    }
    name = f"attention {str(dtype).removeprefix('torch.')} {kind} {layout}"
    # the local window alone, through torch's own attention
    window_q, window_k, window_v = (x.transpose(1, 2) for x in (q, k, v))
    return Case(
        name,
        ours,
        lambda: torch.nn.functional.scaled_dot_product_attention(window_q, window_k, window_v),
        1 + shape.memory_flops / shape.dense_flops,
        notes,
    )
