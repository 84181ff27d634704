"""A layer, and a stream's chunk, under every kind of memory, over a past that was there before."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from memflow_ops.bench.cases.checked_cache import CheckedCache, MemoryVariant
from memflow_ops.bench.harness.case import Built, Contender
from memflow_ops.bench.sizes import Size
from memflow_ops.cache.attend import Attend, BlockSelection, attend_to_memory
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.model.streaming.factory import make_chosen
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

_VIDEO_FRAMES = 4  # What Wan's VAE makes of a latent frame.
_TEXT_TOKENS = 512
# Calls of a stream before the first that is timed: the one that is checked, and one that records its CUDA graphs.
_CHECKED = {"cpu": 1, "cuda": 2}
GROWING = "full"
"""The contender whose history grows with every chunk."""
HISTORY_ROUNDS = 4
"""A `full` stream reserves room in its history for this many times its case's timed rounds."""


def random_model(size: Size, dtype: torch.dtype, device: torch.device) -> CausalVideoModel:
    """A model of Wan's architecture with seeded random weights."""
    config = ModelConfig(
        dim=size.dim,
        ffn_dim=size.ffn_dim,
        num_heads=size.heads,
        num_layers=size.layers,
        in_dim=16,
        out_dim=16,
        text_dim=size.text_dim,
        text_len=_TEXT_TOKENS,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return CausalVideoModel(config).to(dtype).eval()


def stream_settings(size: Size, variant: MemoryVariant, prototypes: int) -> StreamSettings:
    """The settings of a stream with room for so many prototypes. size: with the variant's budget."""
    return StreamSettings(
        memory=variant.memory,  # type: ignore[arg-type]
        height=size.height,
        width=size.width,
        chunk_frames=size.chunk_frames,
        window_frames=size.window_frames,
        sink_frames=size.sink_frames,
        bank_frames=variant.bank_frames,
        device_frames=prototypes,
        top_k=size.top_k,
        block_size=size.block_size,
        query_group=size.query_group,
        reselect=variant.reselect,
        score=variant.score,
        steps=size.steps,
        shift=5.0,
        stochastic=True,
    )


def pass_work(size: Size, keys: int, dtype: torch.dtype) -> tuple[int, int]:
    """The operations of one pass, and the bytes that it must read.

    Of the layers' products, and of their weights and the keys and values that are attended to. keys: per query.
    """
    weights = 6 * size.dim**2 + 2 * size.dim * size.ffn_dim  # q, k, v, o; q, o of the text; feed-forward
    flops = 2 * size.queries * weights + size.attention_flops(keys + _TEXT_TOKENS)
    return size.layers * flops, size.layers * (weights + 2 * keys * size.dim) * dtype.itemsize


# ------------------------------------------------------------------------------------------------------------ one layer


def layer(size: Size, dtype: torch.dtype, device: torch.device, seed: int, variants: dict[str, MemoryVariant]) -> Built:
    """A transformer block with random weights: projections, attention over a cache, text and feed-forward.

    Every kind of memory, `none` too, has our cache, its write, and our memory_attention, which hands dense keys to a
    backend: what is compared is the memory alone.
    """
    size = replace(size, layers=1)
    model = random_model(size, dtype, device)
    torch.manual_seed(seed)
    x = torch.randn(1, size.queries, size.dim).to(device, dtype)
    (text,) = model.encode_text(torch.randn(1, _TEXT_TOKENS, size.text_dim).to(device))
    _, time = model.encode_time(torch.full((1, 1), 500.0, device=device))
    chunks = size.bank_frames + size.window_frames // size.chunk_frames

    def contender(variant: MemoryVariant) -> Contender:
        own = variant.of(size)
        settings = stream_settings(own, variant, chunks)
        cache = FrameCache(settings.cache_layout(model, 1), device)
        past = CheckedCache(cache, own, variant)
        past.fill(chunks)
        if variant.memory == "memflow":
            cache.set_bank([cache.candidate_frames()[0][: variant.bank_frames]])
        cache.begin_chunk()
        rotation = past.rotation(chunks)
        selection = BlockSelection(own.top_k, own.query_group) if variant.memory == "memflow" else None
        attend = attend_to_memory(cache, rotation, selection, chosen=make_chosen(settings, cache.layout, device))

        def call(how: Attend = attend) -> Tensor:
            return cast(Tensor, model.blocks[0](x, time, text, 0, how))

        def check() -> None:
            if selection is not None:
                past.check_descriptors()
            call(past.checked(attend, rotation))

        flops, moved = pass_work(own, past.attended_keys, dtype)
        return Contender(call, check, flops=flops, bytes=moved, settings=variant.settings(size))

    return Built({name: contender(variant) for name, variant in variants.items()})


# -------------------------------------------------------------------------------------------------------------- a chunk


def chunk(
    size: Size,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    *,
    variants: dict[str, MemoryVariant],
    history: int,
    rounds: int,
) -> Built:
    """`Streamer.next_chunk` over a history of so many prototypes, under every kind of memory.

    A model with random weights: the transformer alone, without VAE and text encoder, nothing reported. As for a layer,
    all kinds go through our cache and attention. The oldest prototype makes room for the newest, as in a long stream.
    Under `full`, which forgets nothing, every call finds one more: it starts with so many fewer that the middle one of
    the rounds finds `history` of them. The seed changes nothing, because nothing of a stream is taken in turn.
    """
    model = random_model(size, dtype, device)
    streams = {name: ChunkOfStream(model, size, variant, history, rounds) for name, variant in variants.items()}
    return Built({name: stream.contender() for name, stream in streams.items()})


class ChunkOfStream:
    """A stream under one kind of memory, whose next chunk is timed again and again."""

    def __init__(self, model: CausalVideoModel, size: Size, variant: MemoryVariant, history: int, rounds: int):
        self.model, self.settings, self.history = model, variant.settings(size), history
        self.reselects_once = variant.reselect == "chunk"
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        grows = variant.memory == GROWING
        self.early = _CHECKED[self.device.type] + rounds // 2 if grows else 0
        """Prototypes that the history lacks at first."""
        own, window = variant.of(size), size.window_frames // size.chunk_frames
        room = HISTORY_ROUNDS * rounds + 8 if grows else 0
        generator = torch.Generator().manual_seed(0)
        embedding = torch.randn(1, _TEXT_TOKENS, size.text_dim, generator=generator).to(self.device)
        settings = stream_settings(own, variant, history + window - 1 + room)
        self.streamer = Streamer(model, 1, settings, encode=lambda prompts: embedding, report=False)
        self.past = CheckedCache(cast(FrameCache, self.streamer.cache), own, variant)
        self.past.fill(history + window - self.early)

    def contender(self) -> Contender:
        size = self.past.size
        flops, moved = pass_work(size, self.past.attended_keys + self.early * size.frame_tokens, self.dtype)
        return Contender(
            self.call,
            self.check,
            flops=(size.steps + 1) * flops,
            bytes=(size.steps + 1) * moved,
            graph=False,
            video_frames=_VIDEO_FRAMES * size.chunk_frames,
            notes=self.notes,
            settings=self.settings,
        )

    def call(self) -> Tensor:
        return self.streamer.next_chunk(["a prompt"]).frames

    def check(self) -> None:
        """Stream a chunk whose attention is checked in every pass."""
        past, rotation, checked = self.past, self.past.rotation(self.past.cache.committed), []

        def hook(module: object, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x, t, text, attend, *rest = arguments
            checked.append(x)
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return arguments  # A recording cannot be looked into; the pass before it was checked.
            chosen = self.streamer.chosen if self.reselects_once and len(checked) > 1 else None
            reused = None if chosen is None else chosen.indices.clone()  # as they are before the pass
            return (x, t, text, past.checked(attend, rotation, reused), *rest)

        handle = self.model.register_forward_pre_hook(hook)
        try:
            frames = self.call()
        finally:
            handle.remove()
        assert checked, "no pass was checked"
        assert frames.isfinite().all(), "the frames are not finite"
        if past.variant.memory == "memflow":
            past.cache.begin_chunk()
            past.check_descriptors()
            past.cache.abort()
        if self.device.type == "cuda":
            self.call()  # CUDA graphs are recorded when a pass comes again, which must not be while the clock runs.

    def notes(self) -> dict[str, object]:
        """The histories that a growing stream was timed over, and what a chunk takes of the device."""
        found: dict[str, object] = {}
        if self.early:
            first = self.history - self.early + _CHECKED[self.device.type]
            found["history_timed"] = [first, len(self.past.cache.candidate_frames()[0]) - 1]
        return found | (self._on_gpu() if self.device.type == "cuda" else {})

    def _on_gpu(self) -> dict[str, object]:
        """Device memory at the peak of a chunk, weights and cache included, and how often the host waited in it."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with warnings.catch_warnings(record=True) as waited:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        held = weights + self.past.cache.layout.device_bytes
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) - before + held,
            "host_syncs": sum("synchroniz" in str(warning.message) for warning in waited),
        }
