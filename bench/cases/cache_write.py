"""The cache write: norm, rotation and copy in every pass, and what the frame cache keeps of a chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops import QKNorm, write_projections
from memflow_ops.bench import inputs
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.bench.harness.correctness import check_copy, check_means, check_rounded, exact_projection
from memflow_ops.bench.sizes import Size
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.rotary import rope_rotation

_EPS = 1e-6
# Frames of the history's bank in the case of a whole chunk.
_BANK_FRAMES = 3


def projections(size: Size, dtype: torch.dtype, device: torch.device, seed: int, clean: bool) -> Built:
    """One layer of a pass: write_projections, against torch's rms_norm, rotation of even and odd channels, and copies.

    clean: the write of a chunk's last pass, which also computes the descriptors of every frame and the mean of the
    first.
    """
    write = ProjectionsWrite(size, dtype, device, seed, clean)
    return Built({OURS: write.contender(write.ours), "torch": write.contender(write.plain)})


def several_layers(
    size: Size, dtype: torch.dtype, device: torch.device, seed: int, *, clean: bool, layers: int
) -> Built:
    """The write of so many layers, one after the other as in a pass, against a copy of as many bytes.

    There are so many layers that what one reads has left the L2 cache when its turn comes again.
    """
    writes = [ProjectionsWrite(size, dtype, device, layers * seed + n, clean, "triton") for n in range(layers)]
    each = [write.contender(write.ours) for write in writes]
    sources = [x for write in writes for x in (write.q, write.k, write.v)]
    targets = [torch.empty_like(x) for x in sources]

    def call() -> None:
        for layer in each:
            layer.call()

    def check() -> None:
        for layer in each:
            layer.check()

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    moved = 2 * sum(x.numel() for x in sources) * dtype.itemsize
    contenders = {
        OURS: Contender(call, check, bytes=sum(layer.bytes for layer in each)),
        "copy": Contender(copy, lambda: check_copy(copy, targets, sources), bytes=moved),
    }
    return Built(contenders)


class ProjectionsWrite:
    """A layer's projections of a chunk, and a pool like the frame cache's that they are written into."""

    def __init__(
        self, size: Size, dtype: torch.dtype, device: torch.device, seed: int, clean: bool, impl: str = "auto"
    ):
        self.size, self.clean, self.impl = size, clean, impl
        frames, pool_frames = size.chunk_frames, size.window_frames + size.chunk_frames
        self.q, self.k, self.v = (
            inputs.correlated_tokens(
                1, size.queries, size.heads, size.head_dim, dtype, seed + n, str(device)
            ).contiguous()
            for n in range(3)
        )
        generator = torch.Generator(device).manual_seed(seed)
        self.weight_q, self.weight_k = (
            (1 + torch.randn(size.dim, generator=generator, device=device) / 4).to(dtype) for _ in range(2)
        )
        self.norm = QKNorm(self.weight_q, self.weight_k, _EPS)
        self.rotation = rope_rotation(
            size.head_dim,
            torch.arange(90, 90 + frames, device=device),
            *(torch.arange(n // 2, device=device) for n in (size.height, size.width)),
        )
        shape = (1, size.heads, pool_frames * size.frame_tokens, size.head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=dtype, device=device).transpose(1, 2) for _ in range(2))
        self.descriptors = self.k.new_empty(1, pool_frames * size.blocks_per_frame, size.heads, size.head_dim)
        self.means = self.k.new_empty(1, 1, 1, size.heads, size.head_dim)
        first = pool_frames - frames
        self.places = torch.arange(first, pool_frames, dtype=torch.int32, device=device)[None]
        self.written = slice(first * size.frame_tokens, None)
        self.described = slice(first * size.blocks_per_frame, None)
        self.in_block = torch.full((size.blocks_per_frame,), float(size.block_size), device=device)
        self.in_block[-1] = size.frame_tokens - (size.blocks_per_frame - 1) * size.block_size

    def ours(self) -> Tensor:
        return write_projections(
            self.q,
            self.k,
            self.v,
            self.rotation,
            self.keys,
            self.values,
            self.places,
            frame_tokens=self.size.frame_tokens,
            norm=self.norm,
            block_size=self.size.block_size,
            descriptors=self.descriptors if self.clean else None,
            means=self.means if self.clean else None,
            impl=self.impl,
        )

    def plain(self) -> Tensor:
        size, tokens = self.size, self.size.frame_tokens
        upright = self._normalised(self.k, self.weight_k)
        turned = self._rotated(upright)
        self.keys[:, self.written].copy_(turned)
        self.values[:, self.written].copy_(self.v)
        if self.clean:
            missing = size.blocks_per_frame * size.block_size - tokens
            of_frames = F.pad(turned.unflatten(1, (size.chunk_frames, tokens)), (0, 0, 0, 0, 0, missing))
            blocks = of_frames.unflatten(2, (-1, size.block_size)).sum(3, dtype=torch.float32)
            self.descriptors[:, self.described].copy_((blocks / self.in_block[:, None, None]).flatten(1, 2))
            self.means.copy_(upright[:, None, :tokens].mean(2, keepdim=True))
        return self._rotated(self._normalised(self.q, self.weight_q))

    def _normalised(self, x: Tensor, weight: Tensor) -> Tensor:
        """x after RMSNorm, in float32."""
        return F.rms_norm(x.flatten(2).float(), (self.size.dim,), weight.float(), _EPS).view(x.shape)

    def _rotated(self, x: Tensor) -> Tensor:
        cosines, sines = self.rotation
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((even * cosines - odd * sines, even * sines + odd * cosines), -1)
        return turned.flatten(-2).to(self.k.dtype)

    def contender(self, call: Callable[[], Tensor]) -> Contender:
        def check() -> None:
            for x in (self.keys, self.values, self.descriptors, self.means):
                x.fill_(torch.nan)
            self.check(call())

        size = self.size
        more = size.chunk_frames * size.blocks_per_frame + 1 if self.clean else 0
        return Contender(call, check, bytes=(6 * size.queries + more) * size.dim * self.k.element_size())

    def check(self, out: Tensor) -> None:
        """Check the queries that a write returned and what it wrote into a pool of NaN."""
        size, tokens, rotation = self.size, self.size.frame_tokens, self.rotation
        keys, values, descriptors = self.keys, self.values, self.descriptors
        check_rounded(out, exact_projection(self.q, rotation, self.weight_q, _EPS), "queries")
        exact = exact_projection(self.k, rotation, self.weight_k, _EPS)
        check_rounded(keys[:, self.written], exact, "keys in the pool")
        assert torch.equal(values[:, self.written], self.v), "the pool does not hold the chunk's values"
        if self.clean:
            in_pool = keys[0, self.written]
            check_means(descriptors[0, self.described], in_pool, size.block_size, tokens, "descriptors")
            unrotated = (torch.ones_like(rotation[0]), torch.zeros_like(rotation[1]))
            upright = exact_projection(self.k, unrotated, self.weight_k, _EPS)
            check_means(self.means[0, 0], upright[0, :tokens], tokens, tokens, "mean of the first frame")
        before = (keys[:, : self.written.start], values[:, : self.written.start])
        rest = (descriptors[:, : self.described.start],) if self.clean else (descriptors, self.means)
        assert all(x.isnan().all() for x in (*before, *rest)), "something else was written"


# -------------------------------------------------------------------------------------------------------- a whole chunk


def chunk_write(size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Built:
    """What one layer's frame cache does with a chunk, against a copy of the chunk's keys and values."""
    write = ChunkWrite(size, dtype, device, seed)
    moved = 4 * write.k.numel() * dtype.itemsize
    # The prototype is read and written once more.
    more = 4 * (size.frame_tokens + size.blocks_per_frame) * size.dim * dtype.itemsize
    sources = [write.k, write.v]
    targets = [torch.empty_like(x) for x in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    contenders = {
        OURS: Contender(write.call, write.check, bytes=moved + more, graph=False),
        "copy": Contender(copy, lambda: check_copy(copy, targets, sources), bytes=moved, graph=False),
    }
    return Built(contenders)


class ChunkWrite:
    """What one layer keeps of a chunk.

    A pass writes the chunk's keys and values, the clean pass computes means, and the commit copies the prototype and
    describes it.
    """

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int):
        self.size = size
        self.layout = CacheLayout(
            batch=1,
            layers=1,
            frame_tokens=size.frame_tokens,
            kv_heads=size.heads,
            head_dim=size.head_dim,
            chunk_frames=size.chunk_frames,
            window_frames=size.window_frames,
            sink_frames=size.sink_frames,
            bank_frames=_BANK_FRAMES,
            device_frames=max(16, size.window_frames),
            block_size=size.block_size,
            dtype=dtype,
        )
        self.cache = FrameCache(self.layout, device)
        self.k, self.v = (
            inputs.correlated_tokens(1, size.queries, size.heads, size.head_dim, dtype, seed + n, str(device))
            for n in range(2)
        )

    def call(self) -> None:
        self.cache.begin_chunk()
        self.cache.write(0, self.k, self.v)
        self.cache.remember(0, self.k)
        self.cache.commit()

    def check(self) -> None:
        """Make the timed call on chunk after chunk, all different, until a bank of prototypes has left the window."""
        cache, layout = self.cache, self.layout
        assert not cache.committed
        without_prototype = -(-layout.sink_frames // layout.chunk_frames)  # The chunks of the sink leave none.
        chunks = without_prototype + layout.bank_frames + layout.window_chunks - 1
        written: list[tuple[Tensor, ...]] = []
        for _ in range(chunks):
            for x in (self.k, self.v):
                x.copy_(x.roll(7, 1))
            self.call()
            frames = (x[0].clone().unflatten(0, (layout.chunk_frames, -1)) for x in (self.k, self.v))
            written += zip(*frames, strict=True)
        past = [
            chunk * layout.chunk_frames for chunk in range(without_prototype, without_prototype + layout.bank_frames)
        ]
        self._check_means(past, written)
        cache.set_bank([past])
        (bank,) = cache.bank()
        assert bank == [*range(layout.sink_frames), *past], f"the bank is {bank}"
        cache.begin_chunk()
        self._check_slots(bank, written)
        self._check_window(chunks, written)
        cache.abort()

    def _check_means(self, past: list[int], written: Sequence[Sequence[Tensor]]) -> None:
        candidates, tokens = self.cache.candidates(), self.size.frame_tokens
        assert candidates.frames == [past], f"candidates are {candidates.frames}, expected {past}"
        for frame, mean in zip(past, candidates.means[0, 0], strict=True):
            check_means(mean, written[frame][0], tokens, tokens, f"mean of frame {frame}")

    def _check_slots(self, bank: list[int], written: Sequence[Sequence[Tensor]]) -> None:
        size, memory = self.size, self.cache.memory(0)
        pools = [pool[0].unflatten(0, (self.layout.pool_frames, -1)) for pool in memory[:3]]
        for frame, place in zip(bank, memory.slots[0].tolist(), strict=True):
            *kept, descriptors = (pool[place] for pool in pools)
            check_frame(f"the slot of frame {frame}", kept, written[frame])
            what = f"descriptors of {frame}"
            check_means(descriptors, written[frame][0], size.block_size, size.frame_tokens, what)

    def _check_window(self, chunks: int, written: Sequence[Sequence[Tensor]]) -> None:
        window, ring, layout = self.cache.window(0), self.cache.window_frames(), self.layout
        begun = (chunks + 1) * layout.chunk_frames
        assert sorted(ring) == [*range(begun - layout.window_frames, begun)], f"the window is {ring}"
        for place, frame in enumerate(ring):
            if frame < len(written):  # The frames of the chunk that has just begun are not written yet.
                kept = [x[0].unflatten(0, (len(ring), -1))[place] for x in window]
                check_frame(f"the window's frame {frame}", kept, written[frame])


def check_frame(where: str, kept: Sequence[Tensor], frame: Sequence[Tensor]) -> None:
    """Check that a place holds a frame's keys and values."""
    for name, x, of in zip(("keys", "values"), kept, frame, strict=True):
        assert torch.equal(x, of), f"{where} does not hold the {name} that were written"
