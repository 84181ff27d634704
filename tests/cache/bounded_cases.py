"""A cache with bounded positions, streamed with random numbers, and what its bank is, re-rotated in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memflow_ops.cache import CacheLayout, FrameCache, attend_to_memory
from memflow_ops.cache.attend import BlockSelection
from memflow_ops.ops.cache_write import QKNorm
from memflow_ops.rotary import rope_rotation

ROWS, COLUMNS, HEADS, SIZE, CHUNK = 2, 3, 2, 12, 3
TOKENS = ROWS * COLUMNS
NORM = QKNorm(torch.linspace(0.5, 1.5, HEADS * SIZE), torch.linspace(1.5, 0.5, HEADS * SIZE), 1e-6)


def rotation_of(first_frame: int) -> tuple[Tensor, Tensor]:
    frames = torch.arange(first_frame, first_frame + CHUNK)
    return rope_rotation(SIZE, frames, torch.arange(ROWS), torch.arange(COLUMNS))


def numbers(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Queries, keys and values (3, B, tokens, H, D) of a chunk, before norm and rotation."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(3, 2, CHUNK * TOKENS, HEADS, SIZE, generator=generator)).to(dtype)


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    """x (B, tokens, H, D) in float64 after the norm."""
    x = x.double()
    return x / (x.square().mean((2, 3), keepdim=True) + NORM.eps).sqrt() * weight.double().view(HEADS, SIZE)


def rotated(x: Tensor, frames: Tensor) -> Tensor:
    """x (B, frames * tokens, H, D) float64 at these frames, which may be no integers, by complex numbers in float64."""
    spatial = 2 * (SIZE // 6)
    angles = []
    for positions, channels in (
        (frames, SIZE - 2 * spatial),
        (torch.arange(ROWS), spatial),
        (torch.arange(COLUMNS), spatial),
    ):
        steps = 10_000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angles.append(positions.double()[:, None] * steps)
    time, row, column = angles
    shape = (len(frames), ROWS, COLUMNS, -1)
    every = [time[:, None, None].expand(shape), row[None, :, None].expand(shape), column[None, None].expand(shape)]
    turn = torch.polar(torch.ones(()).double(), torch.cat(every, -1).flatten(0, 2))[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)


@dataclass
class Streamed:
    """A cache whose open chunk has a bank, and the numbers of every layer and chunk that it was given."""

    cache: FrameCache
    given: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By chunk and layer."""

    def run(self, chunk: int, selection: BlockSelection, *, impl: str = "auto", norm: bool = True) -> None:
        """Opens chunk, retrieves its oldest candidates, and, before it is closed, passes it clean."""
        cache = self.cache
        cache.set_bank([frames[: cache.layout.bank_frames] for frames in cache.candidate_frames()])
        rotation = rotation_of(cache.begin_chunk())
        attend = attend_to_memory(cache, rotation, selection, remember=True, impl=impl)
        for layer in range(cache.layout.layers):
            x = numbers(100 * chunk + layer, cache.layout.dtype)
            self.given[cache.committed, layer] = x
            if norm:
                with torch.no_grad():
                    attend.projections(layer, *x, NORM)
            else:
                attend(layer, *x)
        cache.commit()

    def exact(self, layer: int, x: Tensor, norm: bool = True) -> Tensor:
        """Attention of x (3, B, tokens, H, D) to the window and all of the bank, in float64.

        The bank's keys are rotated to the distances in time that "bounded" states, and the queries stay where they are.
        """
        cache, chunk = self.cache, self.cache.committed
        layout = cache.layout
        first = chunk * CHUNK
        oldest = max(0, chunk + 1 - layout.window_chunks) * CHUNK
        away = oldest - min(oldest, max(layout.sink_frames, 1))  # of slot 0, in frames

        def frame_of(frame: int, at: int) -> tuple[Tensor, Tensor]:
            part = slice(frame % CHUNK * TOKENS, (frame % CHUNK + 1) * TOKENS)
            _, k, v = self.given[frame // CHUNK, layer] if frame < first else x
            k = normalised(k, NORM.weight_k)[:, part] if norm else k.double()[:, part]
            return rotated(k, torch.tensor([at])), v.double()[:, part]

        q = normalised(x[0], NORM.weight_q) if norm else x[0].double()
        q = rotated(q, torch.arange(first, first + CHUNK))
        window = [frame_of(frame, frame) for frame in sorted(cache.window_frames())]
        outs = []
        for story, frames in enumerate(cache.bank()):
            bank = [frame_of(f, f + away if f < layout.sink_frames else away) for f in frames]
            keys, values = (torch.cat(parts, 1)[story] for parts in zip(*window, *bank, strict=True))
            scores = torch.einsum("qhd,khd->hqk", q[story], keys) * SIZE**-0.5
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        return torch.stack(outs)


def make(dtype: torch.dtype = torch.float32, **changes) -> Streamed:
    sizes = dict(window_frames=6, sink_frames=2, bank_frames=3, device_frames=6, block_size=4, dtype=dtype)
    layout = CacheLayout(2, 2, TOKENS, HEADS, SIZE, **{**sizes, "positions": "bounded", **changes})
    cache = FrameCache(layout)
    for tensor in (cache._keys, cache._values, cache._descriptors, cache._staged_keys):
        tensor.fill_(torch.nan)  # whatever is read before it was written shows
    return Streamed(cache)


def opened(streamed: Streamed, chunks: int, selection: BlockSelection, **options) -> tuple[Tensor, Tensor]:
    """Streams so many chunks and opens the next with a bank; returns its rotation."""
    for chunk in range(chunks):
        streamed.run(chunk, selection, **options)
    cache = streamed.cache
    cache.set_bank([frames[: cache.layout.bank_frames] for frames in cache.candidate_frames()])
    return rotation_of(cache.begin_chunk())
