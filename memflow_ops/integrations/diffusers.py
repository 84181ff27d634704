"""An attention processor that gives diffusers' `WanTransformer3DModel` a frame cache and long memory.

    memory = attach_memory(transformer, height=60, width=104)    # the size of its latents
    for text in prompts:                                         # text embeddings, for a chunk of 3 latent frames each
        memory.begin_chunk(text)                                 # retrieves the past frames that the prompt asks for
        for t in timesteps:
            velocity = transformer(latents, t, text).sample      # then a step of the sampler
        with memory.clean():
            transformer(latents, torch.zeros(1), text)           # leaves the keys that later chunks see
        memory.commit()

The transformer must have been trained to generate causally, chunk by chunk, as by Self-Forcing: memory does not make a
bidirectional model causal. Between `commit` and `begin_chunk` the transformer behaves as without memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memflow_ops.cache.attend import Attend, BlockSelection, attend_to_memory
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.policies import Policy, Relevance, Retrieved
from memflow_ops.rotary import rope_rotation


def attach_memory(
    transformer: Any,
    *,
    height: int,
    width: int,
    batch: int = 1,
    chunk_frames: int = 3,
    window_frames: int = 9,
    sink_frames: int = 3,
    bank_frames: int = 16,
    device_frames: int = 64,
    host_frames: int = 0,
    top_k: int = 24,
    block_size: int = 64,
    query_group: int | None = 128,
    policy: Policy | None = None,
    impl: str = "auto",
) -> WanMemory:
    """Puts our processor into the self-attention of every block, and returns the memory that the processors share.

    transformer: diffusers' WanTransformer3DModel, on the device and in the dtype that it will run with.
    height, width: rows and columns of the latents.
    batch: stories that advance together.
    chunk_frames, window_frames, sink_frames, bank_frames, device_frames, host_frames, block_size: of `CacheLayout`.
    top_k, query_group: blocks that each query group attends to, see `BlockSelection`.
    policy: chooses the bank; None: `Relevance(bank_frames)`.
    impl: implementation of the operators: auto, reference, torch or triton.

    `WanMemory.detach` puts the old processors back. A ValueError or TypeError where the sizes do not fit, before
    anything is changed.
    """
    config, weight = transformer.config, transformer.patch_embedding.weight
    patch_frames, patch_height, patch_width = config.patch_size
    if patch_frames != 1 or height % patch_height or width % patch_width:
        raise ValueError(
            f"{height} x {width} latents do not divide into patches of {patch_height} x {patch_width}, or a patch is "
            f"{patch_frames} frames deep (expected 1)"
        )
    grid = height // patch_height, width // patch_width
    layout = CacheLayout(
        len(transformer.blocks),
        batch,
        grid[0] * grid[1],
        config.num_attention_heads,
        config.attention_head_dim,
        chunk_frames,
        window_frames,
        sink_frames,
        bank_frames,
        device_frames,
        host_frames,
        block_size=block_size,
        dtype=weight.dtype,
    )
    selection = BlockSelection(top_k, query_group)
    memory = WanMemory(transformer, layout, grid, selection, policy or Relevance(bank_frames), impl)
    for layer, block in enumerate(transformer.blocks):
        block.attn1.set_processor(WanMemoryProcessor(memory, layer, block.attn1.processor))
    return memory


class WanMemory:
    """The memory of the stories that are streamed through one transformer; `attach_memory` makes it."""

    def __init__(
        self,
        transformer: Any,
        layout: CacheLayout,
        grid: tuple[int, int],
        selection: BlockSelection,
        policy: Policy,
        impl: str,
    ):
        self.transformer, self.layout, self.grid, self.policy = transformer, layout, grid, policy
        self.selection, self.impl = selection, impl
        self.device = transformer.patch_embedding.weight.device
        self.cache = FrameCache(layout, self.device)
        self._rotation: tuple[Tensor, Tensor] | None = None
        self.attend: Attend | None = None
        """What the processors call in the current pass; None between chunks."""

    @property
    def is_open(self) -> bool:
        """Whether a chunk has been begun and not committed."""
        return self.attend is not None

    @torch.no_grad()
    def begin_chunk(self, text: Tensor, text_lengths: Sequence[int] | None = None) -> Retrieved:
        """Opens the next chunk with the frames that its prompts retrieve, and returns those frames.

        text: embeddings (B, Lt, text_dim), as the transformer is given them.
        text_lengths: how many leading embeddings of each story are no padding; None: up to the last that is not zero.
        """
        retrieved = Retrieved.nothing(self.layout.batch)
        if self.layout.bank_frames and self.cache.candidate_frames()[0]:
            if text_lengths is None:
                positions = torch.arange(1, text.shape[1] + 1, device=text.device, dtype=torch.int32)
                lengths = ((text != 0).any(-1) * positions).amax(1).to(self.device, torch.int32)
            else:
                lengths = torch.tensor(text_lengths, dtype=torch.int32, device=self.device)
            text_keys = self._text_keys(text.to(self.device))
            retrieved = self.cache.choose_bank(self.policy, text_keys, lengths).read()
        first = self.cache.begin_chunk()
        frames = torch.arange(first, first + self.layout.chunk_frames, device=self.device)
        rows, columns = (torch.arange(n, device=self.device) for n in self.grid)
        self._rotation = rope_rotation(self.layout.head_dim, frames, rows, columns)
        self.attend = self._attend_to()
        return retrieved

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Encloses the last pass of a chunk, over its finished latents at timestep 0."""
        if not self.is_open:
            raise RuntimeError("clean: no chunk is open, call begin_chunk first")
        before, self.attend = self.attend, self._attend_to(remember=True)
        try:
            yield
        finally:
            self.attend = before

    def commit(self) -> None:
        """Closes the chunk after its clean pass."""
        self.cache.commit()
        self.attend = None

    def detach(self) -> None:
        """Puts the processors back that were there before."""
        for block in self.transformer.blocks:
            if isinstance(block.attn1.processor, WanMemoryProcessor):
                block.attn1.set_processor(block.attn1.processor.before)

    def _attend_to(self, remember: bool = False) -> Attend:
        assert self._rotation is not None
        return attend_to_memory(self.cache, self._rotation, self.selection, remember=remember, impl=self.impl)

    def _text_keys(self, text: Tensor) -> list[Tensor]:
        """Per layer the keys of the text cross-attention (B, Lt, heads, head_dim)."""
        context = self.transformer.condition_embedder.text_embedder(text.to(self.layout.dtype))
        cross = [block.attn2 for block in self.transformer.blocks]
        return [attn.norm_k(attn.to_k(context)).unflatten(2, (attn.heads, -1)) for attn in cross]


class WanMemoryProcessor:
    """The processor of one self-attention layer; `before` is the one that it replaced, which runs between chunks."""

    def __init__(self, memory: WanMemory, layer: int, before: Any):
        self.memory, self.layer, self.before = memory, layer, before

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Called by diffusers. rotary_emb begins at frame 0 in every chunk, so the cache's own rotation replaces it."""
        if self.memory.attend is None:
            return self.before(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **options)
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("memory is for self-attention without a mask")
        layout = self.memory.layout
        if hidden_states.shape[:2] != (layout.batch, layout.chunk_tokens):
            raise ValueError(
                f"the open chunk has {layout.batch} stories of {layout.chunk_frames} frames, which are "
                f"{layout.chunk_tokens} chunk tokens; got {tuple(hidden_states.shape[:2])}"
            )
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        out = self.memory.attend(self.layer, q, k.to(v.dtype), v).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))
