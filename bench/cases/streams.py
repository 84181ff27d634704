"""A layer, and a stream's chunk, under every kind of memory, over a past that was there before."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from memflow_ops import QKNorm, select_blocks
from memflow_ops.bench import inputs
from memflow_ops.bench.harness.case import Contender
from memflow_ops.bench.harness.correctness import (
    KeysOf,
    check_attention,
    check_means,
    check_rounded,
    check_selection,
    exact_projection,
    rows_of,
    sampled,
    selected_tokens,
)
from memflow_ops.bench.sizes import Size
from memflow_ops.cache.attend import Attend, AttendProjections, BlockSelection, attend_to_memory
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.model.streaming.streamer import Streamer, StreamSettings
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig
from memflow_ops.rotary import rope_rotation

_VIDEO_FRAMES = 4  # that Wan's VAE makes of a latent frame
_TEXT_TOKENS = 512
# Calls of a stream before the first that is timed: the one that is checked, and one that records its graphs.
_CHECKED = {"cpu": 1, "cuda": 2}
ROOM = 4
"""Times a stream's rounds that its history under `full` has room for."""


@dataclass(frozen=True)
class Kind:
    """A kind of memory, and where its budget is not the size's."""

    memory: str
    bank_frames: int = 3
    top_k: int | None = None
    per_chunk: bool = False
    """One selection for all queries of a head."""

    def of(self, size: Size) -> Size:
        """The size with this kind's budget."""
        group = size.queries if self.per_chunk else size.query_group
        return replace(size, top_k=self.top_k or size.top_k, query_group=group)

    def settings(self, size: Size) -> dict[str, object]:
        """As a row of results states them; no budget without a bank to choose from."""
        own = self.of(size)
        budget = {"bank_frames": self.bank_frames, "top_k": own.top_k, "query_group": own.query_group}
        return {"memory": self.memory, **(budget if self.memory == "memflow" else dict.fromkeys(budget))}


def random_model(size: Size, dtype: torch.dtype, device: torch.device) -> CausalVideoModel:
    """Of Wan's architecture, seeded."""
    config = ModelConfig(
        dim=size.dim, ffn_dim=size.ffn_dim, num_heads=size.heads, num_layers=size.layers, in_dim=16, out_dim=16,
        text_dim=size.text_dim, text_len=_TEXT_TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return CausalVideoModel(config).to(dtype).eval()


def stream_settings(size: Size, kind: Kind, prototypes: int) -> StreamSettings:
    return StreamSettings(
        memory=kind.memory,  # type: ignore[arg-type]
        height=size.height, width=size.width, chunk_frames=size.chunk_frames, window_frames=size.window_frames,
        sink_frames=size.sink_frames, bank_frames=kind.bank_frames, device_frames=prototypes,
        top_k=size.top_k, block_size=size.block_size, query_group=size.query_group, steps=size.steps,
        shift=5.0, stochastic=True,
    )  # fmt: skip


def fill(cache: FrameCache, chunks: int) -> None:
    """A past of so many chunks, seeded, as if they had been streamed: one chunk of every layer, moved on by some tokens
    each time."""
    layout = cache.layout
    sizes = (layout.batch, layout.chunk_tokens, layout.kv_heads, layout.head_dim, layout.dtype)
    made = [inputs.correlated_tokens(*sizes, seed, str(cache.device)) for seed in range(2 * layout.layers)]
    for chunk in range(chunks):
        cache.begin_chunk()
        for layer in range(layout.layers):
            k, v = (x.roll(7 * chunk, 1) for x in made[2 * layer : 2 * layer + 2])
            cache.write(layer, k, v)
            cache.remember(layer, k)
        cache.commit()


def keys_of_cache(cache: FrameCache, layer: int, q: Tensor, size: Size, kind: Kind) -> KeysOf:
    """What a layer's rotated queries attend to by the definition of the kind of memory."""
    if kind.memory != "memflow":
        keys, values = cache.dense(layer)
        expected = attended_keys(size, cache, kind)
        assert keys.shape[1] == expected, f"{keys.shape[1]} keys, expected {expected}"
        return lambda head, group: (keys[0, :, head], values[0, :, head])
    memory, window = cache.memory(layer), cache.window(layer)
    expected = cache.visible_sink() + min(kind.bank_frames, len(cache.candidate_frames()[0]))
    assert memory.frames.tolist() == [expected], f"{memory.frames.tolist()} frames in the bank, expected {expected}"
    slots = memory.slots[0, :expected].long()
    assert len(slots.unique()) == expected, f"a frame is twice in the bank: {slots.tolist()}"
    descriptors = memory.descriptors[0].unflatten(0, (-1, size.blocks_per_frame))[slots].flatten(0, 1)
    indices = select_blocks(
        q, memory.descriptors, size.top_k, query_group=size.query_group, memory_frames=memory.frames,
        memory_slots=memory.slots, blocks_per_frame=size.blocks_per_frame,
    )  # fmt: skip

    def keys_of(head: int, group: int) -> tuple[Tensor, Tensor]:
        tile, chosen, where = q[0, rows_of(size, group), head], indices[0, head, group], f"head {head}, group {group}"
        check_selection(tile, descriptors[:, head], chosen, size.top_k, f"layer {layer}, selection, {where}")
        tokens = selected_tokens(size, chosen, slots)
        pairs = zip(window, (memory.keys, memory.values), strict=True)
        near, far = ((ring[0, :, head], pool[0, tokens, head]) for ring, pool in pairs)
        return torch.cat(near), torch.cat(far)

    return keys_of


def checked(attend: Attend, cache: FrameCache, size: Size, kind: Kind, rotation: tuple[Tensor, Tensor]) -> Attend:
    """The same `attend`, held against float64 in the first and the last layer: the keys and values that it writes, and
    its results."""
    projections = cast(AttendProjections, attend).projections

    def attend_and_check(layer: int, q: Tensor, k: Tensor, v: Tensor, norm: QKNorm | None) -> Tensor:
        out = projections(layer, q, k, v, norm)
        if layer in (0, cache.layout.layers - 1):
            weight_q, weight_k, eps = norm or (None, None, 0.0)
            chunk = [
                n for n, frame in enumerate(cache.window_frames()) if frame // size.chunk_frames == cache.committed
            ]
            keys, values = (
                x.unflatten(1, (-1, size.frame_tokens))[:, chunk].flatten(1, 2) for x in cache.window(layer)
            )
            check_rounded(keys, exact_projection(k, rotation, weight_k, eps), f"layer {layer}, keys in the window")
            assert torch.equal(values, v), f"layer {layer}: the window does not hold the chunk's values"
            rotated = exact_projection(q, rotation, weight_q, eps).to(q.dtype)
            check_attention(size, rotated, out, keys_of_cache(cache, layer, rotated, size, kind))
        return out

    return AttendProjections(attend_and_check)


def check_descriptors(cache: FrameCache, size: Size) -> None:
    """Those of the sink and of every prototype, in the first and the last layer, of the sampled heads, against the keys
    beside them; while a chunk is open."""
    layout = cache.layout
    prototypes = cache.committed - -(-layout.sink_frames // layout.chunk_frames)
    history = layout.sink_frames + layout.window_frames  # its slots are filled one after the other
    parts = {"the sink": (0, layout.sink_frames), "prototypes": (history, min(prototypes, layout.device_frames))}
    for layer in sorted({0, layout.layers - 1}):
        memory = cache.memory(layer)
        keys, descriptors = (x[0].unflatten(0, (layout.pool_frames, -1)) for x in (memory.keys, memory.descriptors))
        for what, (first, count) in parts.items():
            for head, _ in sampled(size.heads, 1):
                means, of = (x[first : first + count, :, head].flatten(0, 1) for x in (descriptors, keys))
                where = f"layer {layer}, head {head}, descriptors of {what}"
                check_means(means, of, size.block_size, size.frame_tokens, where)


def rotation_of(cache: FrameCache, size: Size, chunk: int) -> tuple[Tensor, Tensor]:
    frames = torch.arange(chunk * size.chunk_frames, (chunk + 1) * size.chunk_frames, device=cache.device)
    rows, columns = (torch.arange(n // 2, device=cache.device) for n in (size.height, size.width))
    return rope_rotation(size.head_dim, frames, rows, columns)


# ------------------------------------------------------------------------------------------------------------ one layer


def layer_contenders(
    size: Size, dtype: torch.dtype, device: torch.device, kinds: dict[str, Kind], seed: int = 0
) -> dict[str, Contender]:
    """A transformer block with random weights: projections, attention over a cache, text and feed-forward.

    Every kind of memory, none too, has our cache, its write, and our memory_attention, which hands dense keys to a
    backend: what is compared is the memory alone.
    """
    size = replace(size, layers=1)
    model = random_model(size, dtype, device)
    torch.manual_seed(seed)
    x = torch.randn(1, size.queries, size.dim).to(device, dtype)
    (text,) = model.encode_text(torch.randn(1, _TEXT_TOKENS, size.text_dim).to(device))
    _, time = model.encode_time(torch.full((1, 1), 500.0, device=device))
    chunks = size.bank_frames + size.window_frames // size.chunk_frames

    def contender(kind: Kind, size: Size) -> Contender:
        cache = FrameCache(stream_settings(size, kind, chunks).cache_layout(model, 1), device)
        fill(cache, chunks)
        if kind.memory == "memflow":
            cache.set_bank([cache.candidate_frames()[0][: kind.bank_frames]])
        cache.begin_chunk()
        rotation = rotation_of(cache, size, chunks)
        selection = BlockSelection(size.top_k, size.query_group) if kind.memory == "memflow" else None
        attend = attend_to_memory(cache, rotation, selection)

        def call(how: Attend = attend) -> Tensor:
            return cast(Tensor, model.blocks[0](x, time, text, 0, how))

        flops, moved = pass_work(size, attended_keys(size, cache, kind), dtype)

        def check() -> None:
            if kind.memory == "memflow":
                check_descriptors(cache, size)
            call(checked(attend, cache, size, kind, rotation))

        return Contender(call, check, flops=flops, bytes=moved, settings=kind.settings(size))

    return {name: contender(kind, kind.of(size)) for name, kind in kinds.items()}


def attended_keys(size: Size, cache: FrameCache, kind: Kind) -> int:
    """Per query, selected blocks counted as full; of a chunk that is open or about to be."""
    sink, candidates = cache.visible_sink(), len(cache.candidate_frames()[0])
    if kind.memory == "memflow":
        blocks = (sink + min(kind.bank_frames, candidates)) * size.blocks_per_frame
        return size.window_keys + min(size.top_k, blocks) * size.block_size
    return size.window_keys + (sink + candidates) * size.frame_tokens


def pass_work(size: Size, keys: int, dtype: torch.dtype) -> tuple[int, int]:
    """Operations of the layers' products in one pass, and bytes of their weights and of the keys and values that are
    attended to."""
    weights = 6 * size.dim**2 + 2 * size.dim * size.ffn_dim  # q, k, v, o; q, o of the text; feed-forward
    flops = 2 * size.queries * weights + size.attention_flops(keys + _TEXT_TOKENS)
    return size.layers * flops, size.layers * (weights + 2 * keys * size.dim) * dtype.itemsize


# -------------------------------------------------------------------------------------------------------------- a chunk


def stream_contenders(
    size: Size, dtype: torch.dtype, device: torch.device, kinds: dict[str, Kind], history: int, rounds: int
) -> dict[str, Contender]:
    """`Streamer.next_chunk` over a history of so many prototypes: a model with random weights, the transformer alone,
    without VAE and text encoder, nothing reported. As for a layer, all kinds go through our cache and attention.

    The oldest prototype makes room for the newest, as in a long stream. Under `full`, which forgets nothing, every call
    finds one more: it starts with so many fewer that the middle one of the rounds finds `history` of them.
    """
    model = random_model(size, dtype, device)
    window, checked_calls = size.window_frames // size.chunk_frames, _CHECKED[device.type]
    embedding = torch.randn(1, _TEXT_TOKENS, size.text_dim, generator=torch.Generator().manual_seed(0)).to(device)

    def contender(kind: Kind, size: Size) -> Contender:
        room = ROOM * rounds + 8 if kind.memory == "full" else 0
        settings = stream_settings(size, kind, history + window - 1 + room)
        streamer = Streamer(model, 1, settings, encode=lambda prompts: embedding, report=False)
        cache = cast(FrameCache, streamer.cache)
        early = checked_calls + rounds // 2 if kind.memory == "full" else 0
        fill(cache, history + window - early)

        def call() -> Tensor:
            return streamer.next_chunk(["a prompt"]).frames

        def check() -> None:
            rotation, seen = rotation_of(cache, size, cache.committed), []

            def hook(module: object, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
                x, t, text, attend, *rest = arguments
                seen.append(x)
                if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                    return arguments  # a recording cannot be looked into; the pass before it was
                return (x, t, text, checked(attend, cache, size, kind, rotation), *rest)

            handle = model.register_forward_pre_hook(hook)
            try:
                frames = call()
            finally:
                handle.remove()
            assert seen, "no pass was checked"
            assert frames.isfinite().all(), "the frames are not finite"
            if kind.memory == "memflow":  # of the chunk that was streamed too
                cache.begin_chunk()
                check_descriptors(cache, size)
                cache.abort()
            if device.type == "cuda":
                call()  # graphs are recorded when a pass comes again: not while the clock runs

        def notes() -> dict[str, object]:
            last = len(cache.candidate_frames()[0]) - 1
            seen: dict[str, object] = {"history_timed": [history - early + checked_calls, last]} if early else {}
            return seen | (on_gpu(call, model, cache, device) if device.type == "cuda" else {})

        keys = attended_keys(size, cache, kind) + early * size.frame_tokens
        flops, moved = pass_work(size, keys, dtype)
        return Contender(
            call, check, flops=(size.steps + 1) * flops, bytes=(size.steps + 1) * moved, graph=False,
            video_frames=_VIDEO_FRAMES * size.chunk_frames, notes=notes, settings=kind.settings(size),
        )  # fmt: skip

    return {name: contender(kind, kind.of(size)) for name, kind in kinds.items()}


def on_gpu(
    call: Callable[[], object], model: CausalVideoModel, cache: FrameCache, device: torch.device
) -> dict[str, object]:
    """Device memory at the peak of a chunk, weights and cache included, and how often the host waited in it."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with warnings.catch_warnings(record=True) as waited:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + cache.layout.device_bytes
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device) - before + held,
        "host_syncs": sum("synchroniz" in str(warning.message) for warning in waited),
    }
