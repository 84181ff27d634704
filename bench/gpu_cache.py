"""Cases of `make gpu-bench` around the attention: the cache write, and retrieval for all layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from memflow_ops import QKNorm, retrieve_frames, write_projections

if TYPE_CHECKING:
    from memflow_ops.bench.gpu import Bench, Call

# So many layers one after the other, as in a pass: what a layer reads has left the L2 cache when its turn comes again.
WRITTEN_LAYERS = 8
COPIED_BYTES = 1 << 30


def cache_write(bench: Bench) -> list[dict[str, object]]:
    """Time per layer over that of copying as many bytes: q, k and v read once and written once."""
    s, device = bench.sizes, bench.device
    frames = s.queries // s.frame_tokens
    tokens, blocks, pool_frames = frames * s.frame_tokens, s.blocks_per_frame, 4 * frames
    make = lambda *shape: torch.randn(shape, device=device).to(s.dtype)  # noqa: E731
    vectors = (s.heads, s.head_dim)
    inputs = [[make(1, tokens, *vectors) for _ in range(3)] for _ in range(WRITTEN_LAYERS)]
    pools = [[bench.cached(pool_frames * s.frame_tokens) for _ in range(2)] for _ in range(WRITTEN_LAYERS)]
    descriptors, means = make(1, pool_frames * blocks, *vectors), make(1, 1, 1, *vectors)
    norm = QKNorm(make(s.heads * s.head_dim), make(s.heads * s.head_dim), 1e-6)
    angles = torch.rand(1, tokens, 1, s.head_dim // 2, device=device)
    rotation = (angles.cos(), angles.sin())
    places = torch.arange(frames, dtype=torch.int32, device=device)[None] + frames

    def passed(clean: bool) -> Call:
        outputs: dict[str, Any] = dict(descriptors=descriptors, means=means, block_size=s.block_size) if clean else {}

        def run() -> None:
            for (q, k, v), (memory_k, memory_v) in zip(inputs, pools, strict=True):
                write_projections(
                    q, k, v, rotation, memory_k, memory_v, places, frame_tokens=s.frame_tokens, norm=norm,
                    impl="triton", **outputs,
                )  # fmt: skip

        return run

    copied = torch.empty(COPIED_BYTES if device.type == "cuda" else 1 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(copied)
    times = bench.times(noisy=passed(False), clean=passed(True), copy=lambda: target.copy_(copied))
    speed = 2 * copied.numel() / times["copy"]  # bytes per second, read and written
    bytes_of_layer = 2 * 3 * tokens * s.heads * s.head_dim * s.dtype.itemsize
    rows: list[dict[str, object]] = []
    for name, what in (("noisy", "cache write per layer"), ("clean", "the same with descriptors and means")):
        seconds = times[name] / WRITTEN_LAYERS
        rows.append({
            "what": f"{what}, over its bytes at copy speed", "measured": seconds * speed / bytes_of_layer,
            "reach": "<= 1.5", "then": "<= 1.15",
            "notes": f"{1e6 * seconds:.1f} us, {bytes_of_layer / seconds / 1e9:.0f} GB/s; copy {speed / 1e9:.0f} GB/s",
        })  # fmt: skip
    return rows


def retrieval(bench: Bench) -> list[dict[str, object]]:
    """Milliseconds per chunk, from stored frame means to the chosen frames' indices, all layers."""
    s, device = bench.sizes, bench.device
    layers, prototypes, words, valid = (30, 240, 512, 120) if s.frame_tokens > 1000 else (3, 20, 16, 7)
    generator = torch.Generator(device).manual_seed(0)
    make = lambda *n: torch.randn(*n, s.heads, s.head_dim, generator=generator, device=device).to(s.dtype)  # noqa: E731
    text, means = make(layers, 1, words), make(layers, 1, prototypes, 1)
    rows = torch.arange(prototypes, dtype=torch.int32, device=device)[None].flip(1).contiguous()
    lengths = torch.tensor([valid], dtype=torch.int32, device=device)

    def chosen(score: str, redundancy: float | None = None) -> Call:
        return lambda: retrieve_frames(
            text, means, 6, score=score, candidates=rows, text_lengths=lengths, redundancy=redundancy, impl="triton"
        )

    times = bench.times(
        linear=chosen("linear"),
        linear_without_near_copies=chosen("linear", 0.95),
        softmax=chosen("softmax"),
        coverage=chosen("coverage"),
    )
    notes = f"{layers} layers, {prototypes} prototypes, {valid} of {words} words, 6 frames taken"
    return [
        {
            "what": f"retrieval per chunk, {name.replace('_', ' ')}: ms", "measured": 1e3 * seconds, "reach": "<= 1",
            "then": "<= 0.3", "notes": notes,
        }
        for name, seconds in times.items()
    ]  # fmt: skip
