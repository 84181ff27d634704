"""Attention to a dense segment and to selected blocks of a memory bank: what is launched, and the two entry points."""

from dataclasses import dataclass

import torch
import triton

from memflow_ops.geometry import Geometry
from memflow_ops.kernels.attention.blocks import Segment, frames_of, plan_unions, segment_of, valid_keys_of
from memflow_ops.kernels.attention.forward import LastRound, attend_kernel
from memflow_ops.kernels.attention.split import plan_merge_splits
from memflow_ops.kernels.configs import (
    ONE_LAUNCH_BYTES,
    attend_config,
    capability_of,
    merge_config,
    multiprocessors_of,
    splits_config,
)
from memflow_ops.kernels.launch import Launch, run_all
from memflow_ops.kernels.primitives import strided
from memflow_ops.kernels.selection.groups import plan_select, plan_shortlist
from memflow_ops.kernels.selection.scores import strides_of_counts


@dataclass(frozen=True)
class BlockSource:
    """Where attend_kernel gets the blocks from: a selection that is given, or what it needs to make one itself."""

    indices: torch.Tensor
    """(B, H, G, K) int32: the selection; attend_kernel writes it where descriptors are given."""
    descriptors: torch.Tensor | None = None
    """(B, stored blocks, Hkv, D); None: the selection is given."""
    candidates: torch.Tensor | None = None
    """(B, H, G, C) int32, contiguous: what is left for the last round; None: all blocks of the bank."""
    means: torch.Tensor | None = None
    """The group means (B, G, H, D) float32; None: a tile is a whole group, whose mean the kernel computes."""
    memory_frames: torch.Tensor | None = None
    """(B,) or (B, G) int32: how many leading frames of the bank are valid, where all blocks are scored; None: all."""

    def last_round(self) -> LastRound:
        """The argument tuple for attend_kernel."""
        if self.descriptors is None:
            return LastRound()
        return LastRound(
            descriptors=strided(self.descriptors),
            candidates=self.candidates,
            candidate_count=0 if self.candidates is None else self.candidates.shape[-1],
            means=None if self.means is None else strided(self.means),
            valid_frames=self.memory_frames,
            valid_strides=strides_of_counts(self.memory_frames),
        )


def plan_attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor | None,
    memory_v: torch.Tensor | None,
    source: BlockSource | None,
    geometry: Geometry,
    resume: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    capability: int | None = None,
    multiprocessors: int | None = None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor]:
    """The launches that fill out and lse, in order, and these two tensors. See `attend`.

    capability: of the device, 90 for sm_90 (None: that of q's device). multiprocessors: how many the last wave of tiles
    is to fill (None: those of q's device; 0, and without a GPU: no tile is split).
    """
    batch, queries, heads, head_dim = q.shape
    window, memory = segment_of(k, v), segment_of(memory_k, memory_v)
    if memory.k is None or source is None or not source.indices.shape[-1]:
        memory, last_round = Segment(), LastRound()
        frames = indices = None
        entries = blocks = 0
        query_group = max(queries, 1)  # Without a selection groups mean nothing, and one group makes full tiles.
    else:
        frames, last_round = frames_of(memory.k, geometry), source.last_round()
        indices = source.indices if source.indices.stride(-1) == 1 else source.indices.contiguous()
        entries, blocks = indices.shape[-1], geometry.bank_blocks(frames.stored)
        query_group = geometry.query_group
    kv_heads = next((part.k.shape[2] for part in (window, memory) if part.k is not None), heads)
    out = torch.empty((batch, queries, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    tiles, options, by_row = attend_config(capability or capability_of(q), q.dtype, head_dim, query_group, queries)
    launches, unions = [], None
    if by_row and indices is not None:
        launch, unions = plan_unions(indices, queries, query_group, blocks, tiles["BLOCK_M"])
        launches.append(launch)
    rounds = dict(CHUNKS=1, COLUMNS=1)
    if last_round.descriptors is not None:
        rounds, _ = merge_config(last_round.candidate_count or blocks) or (rounds, {})
    groups = 1 if by_row else triton.cdiv(queries, query_group)
    row_tiles = groups * triton.cdiv(queries if by_row else query_group, tiles["BLOCK_M"])
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
        window=window,
        seqused=None if window.k is None else valid_keys_of(geometry),
        memory=memory,
        frames=frames,
        indices=None if indices is None else strided(indices),
        unions=unions,
        last_round=last_round,
        resume=None if resume is None else (strided(resume[0]), strided(resume[1])),
        out=strided(out),
        lse=strided(lse),
        partial=partial,
        queries=queries,
        keys=0 if window.k is None else window.k.shape[1],
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
        **rounds,
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over what the queries see of k and the keys of the selected blocks, and over what `resume` has seen.

    q (B, Lq, H, D); k, v (B, Lk, Hkv, D), or None: no dense segment; memory_k, memory_v (B, stored frames *
    frame_tokens, Hkv, D) and indices (B, H, G, K) int32 with G = ceil(Lq / query_group), or None: no bank. One dtype
    (float32, bfloat16, float16), last dimensions contiguous, D up to 256, H a multiple of Hkv. resume: the state to
    continue, out (B, Lq, H, D) of any float dtype and lse (B, H, Lq) float32.
    -> out (B, Lq, H, D) in q's dtype, lse (B, H, Lq) float32, the natural logarithm of the sum of exp(scaled score);
    0 and -inf where a query has no key. Scores, softmax and accumulation are float32; the weights are rounded to v's
    dtype for the product with v. Indices outside of 0..N-1 are skipped. What is not selected is not read.
    """
    source = None if indices is None else BlockSource(indices)
    launches, out, lse = plan_attend(q, k, v, memory_k, memory_v, source, geometry, resume)
    run_all(launches)
    return out, lse


def plan_select_and_attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor,
    memory_v: torch.Tensor,
    descriptors: torch.Tensor,
    top_k: int,
    geometry: Geometry,
    resume: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    launches: int | None = None,
    capability: int | None = None,
    multiprocessors: int | None = None,
) -> tuple[list[Launch], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The launches that fill out, lse and indices, in order, and these tensors. See `select_and_attend`.

    launches: 1 to select in the launch that attends, 2 to play all rounds of the selection but the last one before it
    (None: `choose_launches` decides). capability, multiprocessors: as in `plan_attend`.
    """
    capability = capability or capability_of(q)
    blocks = geometry.bank_blocks(geometry.stored_frames(memory_k))
    launches = choose_launches(q, descriptors, blocks, geometry, capability, launches)
    _, _, by_row = attend_config(capability, q.dtype, q.shape[3], geometry.query_group, q.shape[1])
    before: list[Launch] = []
    shape = (q.shape[0], q.shape[2], geometry.query_groups(q.shape[1]), min(top_k, blocks))
    if launches == 1:
        indices = torch.empty(shape, dtype=torch.int32, device=q.device)
        source = BlockSource(indices, descriptors, memory_frames=geometry.memory_frames)
    elif by_row:
        before, indices = plan_select(q, descriptors, top_k, geometry)
        source = BlockSource(indices)
    else:
        first = plan_shortlist(q, descriptors, top_k, geometry)
        before, source = first.launches, BlockSource(first.indices)
        if not first.final:
            indices = torch.empty(shape, dtype=torch.int32, device=q.device)
            source = BlockSource(indices, descriptors, first.indices, first.means)
    attending, out, lse = plan_attend(
        q, k, v, memory_k, memory_v, source, geometry, resume, capability=capability, multiprocessors=multiprocessors
    )
    return [*before, *attending], out, lse, source.indices


def choose_launches(
    q: torch.Tensor, descriptors: torch.Tensor, blocks: int, geometry: Geometry, capability: int, wanted: int | None
) -> int:
    """1 where attend_kernel selects by itself, else 2. wanted: 1 or 2, or None: 1 where the bank is small.

    One launch needs groups that fit in a tile and a bank that fits in registers. A ValueError if 1 is wanted where
    that is not so.
    """
    batch, queries, heads, head_dim = q.shape
    tiles, _, by_row = attend_config(capability, q.dtype, head_dim, geometry.query_group, queries)
    possible = not by_row and geometry.query_group <= tiles["BLOCK_M"] and merge_config(blocks) is not None
    if wanted == 1 and not possible:
        raise ValueError(
            f"groups of {geometry.query_group} queries over {blocks} blocks cannot be selected where they attend"
        )
    if wanted is not None:
        return wanted
    rows = batch * heads * geometry.query_groups(queries)
    read = rows * blocks * head_dim * descriptors.element_size()
    return 1 if possible and read <= ONE_LAUNCH_BYTES else 2


def select_and_attend(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    memory_k: torch.Tensor,
    memory_v: torch.Tensor,
    descriptors: torch.Tensor,
    top_k: int,
    geometry: Geometry,
    resume: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`select_blocks`, then `attend` over its blocks; in one launch where that is possible and the bank is small.

    The arguments are those of both. -> out, lse, indices.
    """
    launches, out, lse, indices = plan_select_and_attend(
        q, k, v, memory_k, memory_v, descriptors, top_k, geometry, resume
    )
    run_all(launches)
    return out, lse, indices
