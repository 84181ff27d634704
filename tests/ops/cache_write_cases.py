"""Cases of the cache write that the tests of all implementations share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

import memflow_ops
from memflow_ops.rotary import rope_rotation

# Pools are filled with this number, so that a test sees where the operator has not written.
UNTOUCHED = 77.0


@dataclass
class WriteCase:
    q: Tensor
    k: Tensor
    v: Tensor
    rotation: tuple[Tensor, Tensor]
    places: Tensor
    pool_frames: int
    frame_tokens: int
    norm: memflow_ops.QKNorm | None
    options: dict[str, int | None] = field(default_factory=dict)
    mean_frames: int = 0
    described: bool = True
    moments: int = 1
    memory_rotation: tuple[Tensor, Tensor] | None = None

    def to(self, dtype: torch.dtype) -> WriteCase:
        """The same numbers, rounded to `dtype`."""
        norm = self.norm and memflow_ops.QKNorm(
            self.norm.weight_q.to(dtype), self.norm.weight_k.to(dtype), self.norm.eps
        )
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype), norm=norm)

    def moved(self, device: str) -> WriteCase:
        norm = self.norm and memflow_ops.QKNorm(*(x.to(device) for x in self.norm[:2]), self.norm.eps)
        tensors = {name: getattr(self, name).to(device) for name in ("q", "k", "v", "places")}
        for name in ("rotation", "memory_rotation"):
            angles = getattr(self, name)
            tensors[name] = None if angles is None else tuple(x.to(device) for x in angles)
        return replace(self, **tensors, norm=norm)

    def outputs(self) -> dict[str, Tensor | None]:
        """The tensors that the operator writes: pools full of UNTOUCHED, and means, which it fills, full of NaN."""
        batch, _, heads, size = self.k.shape
        blocks = -(-self.frame_tokens // min(self.options.get("block_size", 64), self.frame_tokens))
        mean_size = min(self.options.get("mean_size") or self.frame_tokens, self.frame_tokens)
        full = lambda *shape, width=size: self.q.new_full((batch, *shape, heads, width), UNTOUCHED)  # noqa: E731
        return {
            "memory_k": full(self.pool_frames * self.frame_tokens),
            "memory_v": full(self.pool_frames * self.frame_tokens),
            "descriptors": full(self.pool_frames * blocks, width=self.moments * size) if self.described else None,
            "means": full(self.mean_frames, -(-self.frame_tokens // mean_size)) * torch.nan
            if self.mean_frames
            else None,
            "memory_q": None if self.memory_rotation is None else torch.full_like(self.q, torch.nan),
        }

    def run(self, impl: str) -> dict[str, Tensor]:
        """All that the operator writes, and the rotated q."""
        out = self.outputs()
        memory_k, memory_v = out.pop("memory_k"), out.pop("memory_v")
        q = memflow_ops.write_projections(
            self.q, self.k, self.v, self.rotation, memory_k, memory_v, self.places, frame_tokens=self.frame_tokens,
            norm=self.norm, memory_rotation=self.memory_rotation, impl=impl, **out, **self.options,
        )  # fmt: skip
        written = {"q": q, "memory_k": memory_k, "memory_v": memory_v, **out}
        return {name: x for name, x in written.items() if x is not None}


def make_case(
    *,
    batch: int = 1,
    frames: int = 2,
    grid: tuple[int, int] = (3, 4),
    heads: tuple[int, int] = (2, 2),
    head_dim: int = 16,
    first_frame: int = 0,
    pool_frames: int = 5,
    with_norm: bool = True,
    fused: bool = False,
    moved: int = 0,
    moved_pairs: int | None = None,
    seed: int = 0,
    **options: object,
) -> WriteCase:
    """A case; with `moved`, the queries are also wanted so many frames earlier, by angles of their leading
    `moved_pairs` pairs (None: of all); with `fused`, q, k and v are parts of one projection, like the fused projections
    of diffusers."""
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1]
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    widths = [n * head_dim for n in (heads[0], heads[1], heads[1])]
    if fused:
        parts = random(batch, frames * tokens, sum(widths)).split(widths, -1)
    else:
        parts = tuple(random(batch, frames * tokens, width) for width in widths)
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in parts)
    positions = torch.stack([torch.arange(frames) + first_frame + 7 * b for b in range(batch)])
    rotation = rope_rotation(head_dim, positions, *(torch.arange(n) for n in grid))
    # Some frames have no place in the pool: their number lies below 0 or beyond its end.
    places = torch.stack([torch.randperm(pool_frames + 2, generator=generator)[:frames] - 1 for _ in range(batch)])
    if moved:
        second = rope_rotation(head_dim, positions[:1] - moved, *(torch.arange(n) for n in grid))
        options["memory_rotation"] = tuple(part[..., :moved_pairs] for part in second)
    norm = memflow_ops.QKNorm(1 + random(widths[0]) / 4, 1 + random(widths[1]) / 4, 1e-6) if with_norm else None
    return WriteCase(q, k, v, rotation, places.int(), pool_frames, tokens, norm, **options)


@st.composite
def write_cases(draw) -> WriteCase:
    frames = draw(st.integers(1, 3))
    return make_case(
        batch=draw(st.integers(1, 2)),
        frames=frames,
        grid=(draw(st.integers(1, 5)), draw(st.integers(1, 9))),
        heads=draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (5, 5)])),
        head_dim=draw(st.sampled_from([2, 12, 16, 40])),
        first_frame=draw(st.sampled_from([0, 5, 1030, 100_000])),
        pool_frames=frames + draw(st.integers(0, 3)),
        with_norm=draw(st.booleans()),
        fused=draw(st.booleans()),
        moved=draw(st.sampled_from([0, 7, 99_000])),
        moved_pairs=draw(st.sampled_from([None, 1])),
        seed=draw(st.integers(0, 99)),
        options={
            "block_size": draw(st.sampled_from([1, 4, 6, 16, 100])),
            "mean_size": draw(st.sampled_from([None, 3, 4, 20])),
        },
        mean_frames=draw(st.integers(0, frames)),
        described=draw(st.booleans()),
        moments=draw(st.sampled_from([1, 2])),
    )


def assert_written(case: WriteCase, dtype: torch.dtype, impl: str) -> None:
    """Every number is that of the reference in float64, rounded once to `dtype`; all other places are untouched."""
    low = case.to(dtype)
    got, exact = low.run(impl), low.to(torch.float64).run("reference")
    assert got.keys() == exact.keys()
    for name, x in exact.items():
        assert got[name].dtype == dtype and got[name].shape == x.shape, name
        mine = got[name].double()
        if name == "descriptors":
            # Descriptors are of the keys as they are stored, in `dtype`; the float64 reference stores others.
            keys = got["memory_k"].double()
            size = min(case.options["block_size"], case.frame_tokens)
            described = memflow_ops.describe_blocks(
                keys, size, case.frame_tokens, moments=case.moments, impl="reference"
            )
            x = torch.where(x == UNTOUCHED, UNTOUCHED, described)
        untouched = x == UNTOUCHED
        assert torch.equal(mine == UNTOUCHED, untouched), f"{name}: wrote elsewhere, or not at all"
        # The limit is one rounding, and the error of float32 sums and cosines.
        limit = torch.finfo(dtype).eps / 2 * x.abs() + 2.0**-18 * x[~untouched].abs().max() if (~untouched).any() else 0
        error = (mine - x).abs()
        assert (error <= limit).all(), f"{name}: {error.max()} in {case}"
