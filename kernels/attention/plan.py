"""Attention to a dense segment and to selected blocks of a memory bank: what is launched, and the entry point."""

import torch

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.blocks import Segment, bank_of, frames_of, plan_unions, valid_keys_of, window_of
from memflow_ops.kernels.attention.forward import attend_kernel
from memflow_ops.kernels.attention.hopper_plan import plan_hopper_attend
from memflow_ops.kernels.attention.split import plan_merge_splits
from memflow_ops.kernels.configs import (
    attend_config,
    capability_of,
    multiprocessors_of,
    splits_config,
)
from memflow_ops.kernels.integers import cdiv
from memflow_ops.kernels.launch import Launch, run_all
from memflow_ops.kernels.primitives import strided


def plan_attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor | None,
    memory_v: torch.Tensor | None,
    indices: torch.Tensor | None,
    geometry: Geometry,
    resume: tuple[torch.Tensor, torch.Tensor] | None = None,
    memory_q: torch.Tensor | None = None,
    *,
    capability: int | None = None,
    multiprocessors: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches that fill out and lse, in order, and these two tensors. See `attend`.

    capability: of the device, 90 for sm_90 (None: that of q's device). multiprocessors: how many the last wave of tiles
    is to fill (None: those of q's device; 0, and without a GPU: no tile is split). out_dtype: None: that of q.
    """
    batch, queries, heads, head_dim = q.shape
    window, memory = window_of(k, v, geometry), bank_of(memory_k, memory_v, geometry)
    if memory.k is None or indices is None or not indices.shape[-1]:
        memory, frames, indices = Segment(), None, None
        entries = blocks = 0
        query_group = max(queries, 1)  # Without a selection groups mean nothing, and one group makes full tiles.
    else:
        frames = frames_of(memory.k, geometry)
        indices = indices if indices.stride(-1) == 1 else indices.contiguous()
        entries, blocks = indices.shape[-1], geometry.bank_blocks(frames.stored)
        query_group = geometry.query_group
    kv_heads = next((part.k.shape[2] for part in (window, memory) if part.k is not None), heads)
    is_int8 = memory.scales is not None
    tiles, options, by_row = attend_config(
        capability or capability_of(q), q.dtype, head_dim, query_group, queries,
        int8_block=geometry.block_size if is_int8 else None,
    )  # fmt: skip
    short_blocks = by_row and geometry.block_size < tiles["BLOCK_N"]
    both = window.k is not None and memory.k is not None
    if both and (short_blocks or is_int8 or geometry.window_keys(window.k) == 1):
        # In one launch ptxas for sm_90 lets every product wait for the one before (C7515). The state between two
        # launches is float32: rounded to a half precision it would break the tolerance.
        first, *state = plan_attend(
            q if memory_q is None else memory_q, None, None, memory_k, memory_v, indices, geometry, resume,
            capability=capability, multiprocessors=multiprocessors, out_dtype=torch.float32,
        )  # fmt: skip
        then, out, lse = plan_attend(q, k, v, None, None, None, geometry, (state[0], state[1]), capability=capability)
        return [*first, *then], out, lse
    window_q = q if both and memory_q is not None else None
    q = q if memory_q is None or memory.k is None else memory_q
    out = torch.empty((batch, queries, heads, head_dim), dtype=out_dtype or q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    if not both and out.dtype == q.dtype and (window.k is not None or memory.k is not None):
        segment = memory if window.k is None else window
        hopper = plan_hopper_attend(
            q, segment, frames if window.k is None else None, indices, geometry, resume, query_group, out, lse,
            capability or capability_of(q),
        )  # fmt: skip
        if hopper is not None:
            return [hopper], out, lse
    launches, unions = [], None
    if by_row and indices is not None:
        launch, unions = plan_unions(indices, queries, query_group, blocks, tiles["BLOCK_M"])
        launches.append(launch)
    groups = 1 if by_row else cdiv(queries, query_group)
    row_tiles = groups * cdiv(queries if by_row else query_group, tiles["BLOCK_M"])
    grid, partial, merge, splits = (row_tiles, heads, batch), None, None, 1
    if window.k is None and not by_row:
        multiprocessors = multiprocessors_of(q) if multiprocessors is None else multiprocessors
        all_tiles = row_tiles * heads * batch
        whole, splits = splits_config(all_tiles, entries * geometry.block_size, tiles["BLOCK_M"], multiprocessors)
        if splits > 1:
            merge, partial = plan_merge_splits(out, lse, whole, row_tiles, splits, query_group, tiles)
            grid = (whole + splits * (all_tiles - whole), 1, 1)
    arguments = dict(
        q=strided(q),
        window_q=None if window_q is None else strided(window_q),
        window=window,
        seqused=None if window.k is None else valid_keys_of(geometry),
        memory=memory,
        frames=frames,
        indices=None if indices is None else strided(indices),
        unions=unions,
        resume=None if resume is None else (strided(resume[0]), strided(resume[1])),
        out=strided(out),
        lse=strided(lse),
        partial=partial,
        queries=queries,
        keys=0 if window.k is None else geometry.window_keys(window.k),
        query_group=query_group,
        entries=entries,
        heads=heads,
        softmax_scale=float(geometry.softmax_scale),
        NEGATIVE_SCALE=geometry.softmax_scale < 0,
        HEADS_PER_KV_HEAD=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=geometry.block_size,
        SPLITS=splits,
        CAUSAL=geometry.causal,
        **tiles,
    )
    launches.append(Launch(attend_kernel, grid, arguments, options))
    return launches if merge is None else [*launches, merge], out, lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor | None,
    memory_v: torch.Tensor | None,
    indices: torch.Tensor | None,
    geometry: Geometry,
    resume: tuple[torch.Tensor, torch.Tensor] | None = None,
    memory_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over what the queries see of k and the keys of the selected blocks, and over what `resume` has seen.

    q (B, Lq, H, D); k, v (B, Lk, Hkv, D), or None: no dense segment; memory_k, memory_v (B, stored frames *
    frame_tokens, Hkv, D) and indices (B, H, G, K) int32 with G = ceil(Lq / query_group), or None: no bank. One dtype
    (float32, bfloat16, float16), last dimensions contiguous, D up to 256, H a multiple of Hkv; memory_k and memory_v
    may be int8, see `Geometry.int8`. resume: the state to continue, out (B, Lq, H, D) of any float dtype and lse
    (B, H, Lq) float32. memory_q: like q, what attends to the bank; None: q.
    -> out (B, Lq, H, D) in q's dtype, lse (B, H, Lq) float32, the natural logarithm of the sum of exp(scaled score);
    0 and -inf where a query has no key. Scores, softmax and accumulation are float32; the weights, and the numbers that
    int8 keys and values stand for, are rounded to q's dtype for the products. Indices outside of 0..N-1 are skipped.
    What is not selected is not read.
    """
    launches, out, lse = plan_attend(q, k, v, memory_k, memory_v, indices, geometry, resume, memory_q)
    run_all(launches)
    return out, lse
