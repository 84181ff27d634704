"""What the layers of an open chunk have chosen from the bank, for later passes over it."""

import torch
from torch import Tensor

from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.views import Memory
from memflow_ops.ops import registration
from memflow_ops.rotary import move_frames


class ChosenBlocks:
    """The blocks that every layer attends to: a pass that chooses writes them, one that reuses a choice reads them.

    All tensors stay where they are, so that one CUDA graph can choose and another reuse. A choice is that of the open
    chunk and so no part of a saved state.

    indices: (layers, B, H, G, K) int32, of `select_blocks`, K = min(top_k, blocks of sink and bank).
    hidden: (layers, B, H, copied_tokens) bool, which of the copies beside the window count for nothing.
    copied_tokens: how many tokens of each layer the cache keeps as copies right before its window, K blocks where one
        selection serves the whole chunk, the layout has places for them, and the device is a CPU; else 0.
    """

    def __init__(
        self,
        layout: CacheLayout,
        top_k: int,
        query_group: int | None,
        device: torch.device | str = "cpu",
        heads: int | None = None,
    ):
        """top_k, query_group: of `BlockSelection`. heads: of the queries; None: as many as the keys have."""
        self.layout, self.top_k, self.query_group = layout, top_k, query_group
        heads = heads or layout.kv_heads
        sizes = (layout.layers, layout.batch, heads)
        groups, entries = chosen_size(layout, top_k, query_group)
        self.indices = torch.full((*sizes, groups, entries), -1, dtype=torch.int32, device=device)
        tokens = entries * min(layout.block_size, layout.frame_tokens)
        fits = heads == layout.kv_heads and tokens <= layout.copied_frames * layout.frame_tokens
        # Copying reads the choice on the host, which on a GPU would have to wait for it.
        self.copied_tokens = tokens if groups == 1 and fits and self.indices.device.type == "cpu" else 0
        self.hidden = torch.zeros((*sizes, self.copied_tokens), dtype=torch.bool, device=device)

    def take(
        self, layer: int, indices: Tensor, memory: Memory, copies: tuple[Tensor, Tensor], turn: Tensor | None = None
    ) -> None:
        """Keeps a layer's choice (B, H, G, K), and copies its blocks of the bank where there is room for copies.

        copies: where to, keys and values (B, copied_tokens, Hkv, D).
        turn: what moves queries to where they stand for the bank (None: nothing). The copied keys move the other way,
            because the queries attend to them as to the window.
        """
        self.indices[layer].copy_(indices)
        if self.copied_tokens:
            registration.copy_selected(
                memory.keys.detach(),
                memory.values.detach(),
                self.indices[layer],
                memory.descriptors,
                memory.k_scale,
                memory.v_scale,
                memory.slots,
                *copies,
                self.hidden[layer],
                min(self.layout.block_size, self.layout.frame_tokens),
                self.layout.frame_tokens,
            )
            if turn is not None:
                moving = copies[0][..., : 2 * len(turn)]
                moving.copy_(move_frames(moving, turn.conj()))


def chosen_size(layout: CacheLayout, top_k: int, query_group: int | None) -> tuple[int, int]:
    """G and K of a choice: the query groups of a chunk, and the blocks that each of them takes."""
    tokens = layout.chunk_tokens
    blocks = (layout.sink_frames + layout.bank_frames) * layout.blocks_per_frame
    return -(-tokens // min(query_group or tokens, tokens)), min(top_k, blocks)


def choice_bytes(layout: CacheLayout, top_k: int, query_group: int | None) -> int:
    """What the indices of `ChosenBlocks` take, with as many query heads as key heads."""
    groups, entries = chosen_size(layout, top_k, query_group)
    return layout.layers * layout.batch * layout.kv_heads * groups * entries * torch.int32.itemsize


def frames_for_copies(layout: CacheLayout, top_k: int, query_group: int | None) -> int:
    """The frame places that the copies of a choice take; 0 where query groups of a chunk choose for themselves."""
    groups, entries = chosen_size(layout, top_k, query_group)
    return -(-entries * min(layout.block_size, layout.frame_tokens) // layout.frame_tokens) if groups == 1 else 0
