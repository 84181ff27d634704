"""Attaching memory to a transformer: sizes, checks, and the processors."""

from __future__ import annotations

from typing import Any

import torch

from memflow_ops.cache.attend import BlockSelection
from memflow_ops.cache.chosen import ChosenBlocks
from memflow_ops.cache.layout import CacheLayout, Positions
from memflow_ops.cache.policies import Policy, Relevance
from memflow_ops.geometry import Score
from memflow_ops.impl import implementation_of
from memflow_ops.integrations.diffusers.checks import check_attention, check_structure, device_of, uncompiled
from memflow_ops.integrations.diffusers.memory import WanMemory
from memflow_ops.integrations.diffusers.processor import WanMemoryProcessor
from memflow_ops.ops.checks import check_impl, check_positive
from memflow_ops.token_order import TokenOrderName
from memflow_ops.token_order import token_order as make_token_order


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
    score: Score = "mean",
    positions: Positions = "absolute",
    reselect: str = "step",
    token_order: TokenOrderName = "raster",
    policy: Policy | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> WanMemory:
    """Puts our processor into the self-attention of every block, and returns the memory that the processors share.

    transformer: diffusers' WanTransformer3DModel, or a model that is built alike, on the device and in the dtype that
        it will run with.
    height, width: rows and columns of the latents.
    batch: stories that advance together.
    chunk_frames, window_frames, sink_frames, bank_frames, device_frames, host_frames, block_size, score,
        positions: of `CacheLayout`.
    top_k, query_group: blocks that each query group attends to, see `BlockSelection`.
    reselect: which passes over a chunk choose blocks: all ("step"), or the first one and those in `WanMemory.clean`,
        and the others attend to what the first chose ("chunk"). A pass that needs gradients always chooses for itself.
    token_order: how the tokens of a frame lie in memory, and so what a block covers: row by row ("raster"), or as
        compact patches ("strips", see `strip_order`). The model's own order stays as it is.
    policy: chooses the bank; None: `Relevance(bank_frames)`.
    dtype: of the cache, and so of attention; None: that of autocast where it is on, else that of the weights.
    impl: implementation of the operators: auto, reference, torch or triton.

    A transformer has one memory at a time: an earlier one is detached. `WanMemory.reset` begins another video in the
    same memory, and `WanMemory.detach` puts the old processors back.

    A ValueError or TypeError where the sizes do not fit, or where the model's own attention and RoPE are not what ours
    would take the place of (both are called once with small random input), and a RuntimeError while an earlier memory
    has a chunk open; in each case before anything is changed.
    """
    transformer = uncompiled(transformer)
    check_structure(transformer)
    config = transformer.config
    _, patch_height, patch_width = config.patch_size
    for name, size, patch in (("height", height, patch_height), ("width", width, patch_width)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or size % patch:
            raise ValueError(
                f"{name} is that of the latents, a positive multiple of the patch size: {height} x {width} latents do "
                f"not divide into patches of {patch_height} x {patch_width}"
            )
    earlier = {
        id(found.memory): found.memory
        for found in (block.attn1.processor for block in transformer.blocks)
        if isinstance(found, WanMemoryProcessor)
    }.values()
    if any(memory.is_open or memory.passes.are_awaited for memory in earlier):
        raise RuntimeError(
            "attach_memory: a memory of this transformer has a chunk open or awaits a backward pass; commit or abort "
            "the chunk, and run the backward pass or delete its loss, first"
        )
    grid = height // patch_height, width // patch_width
    device = device_of(transformer)
    check_impl(impl)
    implementation_of("torch" if impl == "auto" else impl, device)  # a ValueError where it cannot run there
    check_positive("top_k", top_k)
    if query_group is not None:
        check_positive("query_group", query_group)
    if reselect not in ("step", "chunk"):
        raise ValueError(f"reselect must be step or chunk, got {reselect!r}")
    order = make_token_order(token_order, *grid, device)
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
        dtype=dtype or _attention_dtype(transformer, device),
        score=score,
        positions=positions,
    )
    if policy is None and bank_frames:
        policy = Relevance(bank_frames)
    check_attention(transformer, (height, width), grid, chunk_frames, device)
    selection = BlockSelection(top_k, query_group)
    chosen = ChosenBlocks(layout, top_k, query_group, device) if reselect == "chunk" else None
    memory = WanMemory(transformer, layout, grid, selection, policy, impl, device, chosen, order)
    for before in earlier:
        before.detach()
    for layer, block in enumerate(transformer.blocks):
        block.attn1.set_processor(WanMemoryProcessor(memory, layer, block.attn1.processor))
    return memory


def _attention_dtype(transformer: Any, device: torch.device) -> torch.dtype:
    """The dtype in which the model itself would attend, if it were called now."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return transformer.patch_embedding.weight.dtype
