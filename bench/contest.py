"""How things are compared: every contender checked first, then all timed in turn, ratios taken pair by pair.

Within a round each contender runs once; the ratio of two is the median over the rounds of one's time over the
other's, so that what slows the machine down for a while slows both. Every round has an order of its own, because what
ran before leaves caches and clocks behind. On CUDA a contender is replayed as a graph where it can be captured, timed
by events, over up to 8 copies of its inputs, as many as are larger together than the L2 cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:
    from memflow_ops.bench.cases import Case

Call = Callable[[], Any]

OURS = "ours"
# Inputs are rotated until they are this many times the L2 cache.
_CACHES = 2
# Operands of the measured ceilings: rows of a square product, bytes of a copy.
_PRODUCT_ROWS = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}


@dataclass(frozen=True)
class Contender:
    """One way to compute what a case asks for.

    call: runs it once. check: raises an AssertionError where its result is wrong; run before anything is timed.
    flops, bytes: what one call computes and must read and write at least; 0 where nobody has counted.
    every: timed in every such round only (what takes long). graph: whether it can be captured in a CUDA graph.
    video_frames: that one call makes. notes: measured once, after the timing. settings: where they are not the case's.
    """

    call: Call
    check: Callable[[], None]
    flops: int = 0
    bytes: int = 0
    every: int = 1
    graph: bool = True
    video_frames: int = 0
    notes: Callable[[], dict[str, object]] | None = None
    settings: dict[str, object] = field(default_factory=dict)


@dataclass
class Built:
    """A case's contenders over one set of inputs: ours first, then the one that ratios are over."""

    contenders: dict[str, Contender]
    left_out: dict[str, str] = field(default_factory=dict)
    """Those that cannot run here, and why."""


class Contest:
    """A case on a device, built and checked. `before`, `ours` and `after` together are a round."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        first = case.build(device, 0)
        self.built = first
        for name, contender in first.contenders.items():
            try:
                contender.check()
            except AssertionError as error:
                raise AssertionError(f"{case.name}, {name}: {error}") from error
        runs = [first.contenders]
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            moved = max(1, max(c.bytes for c in first.contenders.values()))
            graphs = all(contender.graph for contender in first.contenders.values())
            copies = min(8, -(-_CACHES * cache // moved)) if graphs else 1
            runs += [case.build(device, seed).contenders for seed in range(1, copies)]
        self.runs = {name: [self._captured(of[name]) for of in runs] for name in first.contenders}
        self.start_over()

    def start_over(self) -> None:
        """Forgets what has been timed."""
        self.samples: dict[str, list[float | None]] = {name: [] for name in self.runs}
        self.round = 0

    def _captured(self, contender: Contender) -> Call:
        """The call, as a CUDA graph where that is possible."""
        if self.device.type != "cuda" or not contender.graph:
            return contender.call
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            contender.call()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            contender.call()
        graph.replay()
        return graph.replay

    def run_round(self) -> None:
        """Everyone once."""
        self.before()
        self.ours()
        self.after()

    def before(self) -> None:
        """Those whose turn in this round comes before ours."""
        order = in_turn(list(self.runs), self.round)
        self._time(order[: order.index(OURS)])

    def ours(self) -> None:
        self._time([OURS])

    def after(self) -> None:
        """The others; ends the round."""
        order = in_turn(list(self.runs), self.round)
        self._time(order[order.index(OURS) + 1 :])
        self.round += 1

    def _time(self, names: Sequence[str]) -> None:
        for name in names:
            due = self.round % self.built.contenders[name].every == 0
            self.samples[name].append(self._seconds(name) if due else None)

    def _seconds(self, name: str) -> float:
        run = self.runs[name][self.round % len(self.runs[name])]
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        torch.cuda.synchronize(self.device)
        return before.elapsed_time(after) / 1e3

    def rows(self, ceilings: dict[str, float], about: dict[str, object]) -> list[dict[str, object]]:
        """A row of results per contender; `about`: what the figures depend on, in every row."""
        case, rows = self.case, []
        names = list(self.built.contenders)
        baseline = names[1] if len(names) > 1 else OURS
        product, copy = ceilings[f"tflops_{case.dtype}"], ceilings["gbs"]
        for name, contender in self.built.contenders.items():
            seconds = quantiles([t for t in self.samples[name] if t is not None])
            row: dict[str, object] = {
                "case": case.name, "level": case.level, "size": case.size.name, "dtype": case.dtype,
                "contender": name, "baseline": baseline, "seconds": seconds,
                "over_baseline": paired(self.samples[name], self.samples[baseline]),
                "ours_over_this": paired(self.samples[OURS], self.samples[name]),
                "rounds": sum(t is not None for t in self.samples[name]),
            }  # fmt: skip
            if contender.flops:
                tflops = contender.flops / seconds["p50"] / 1e12
                row |= {"flops": contender.flops, "tflops": tflops, "of_product_ceiling": tflops / product}
            if contender.bytes:
                gbs = contender.bytes / seconds["p50"] / 1e9
                row |= {"bytes": contender.bytes, "gbs": gbs, "of_copy_ceiling": gbs / copy}
            if contender.video_frames:
                row["fps"] = contender.video_frames / seconds["p50"]
            if contender.notes is not None:
                row |= contender.notes()
            rows.append({**row, "settings": case.all_settings() | contender.settings, **about})
        rows[0]["left_out"] = self.built.left_out
        return rows


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: in as many rounds as there are names (twice as many for an odd count) each is in every
    place, and next after every other, equally often (the Latin squares of Williams, 1949)."""
    count = len(names)
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]  # 0, 1, -1, 2, -2, ...
    order = [names[(step + number) % count] for step in zigzag]
    return order[::-1] if count % 2 and number // count % 2 else order


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """20th, 50th and 80th percentile."""
    ordered = sorted(values)
    pick = lambda share: ordered[round(share * (len(ordered) - 1))]  # noqa: E731
    return {"p20": pick(0.2), "p50": statistics.median(ordered), "p80": pick(0.8)}


def paired(ours: Sequence[float | None], theirs: Sequence[float | None]) -> dict[str, float]:
    """Quantiles of the ratios of those rounds in which both ran."""
    return quantiles([a / b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None])


def decided(ratio: Mapping[str, float], rounds: int) -> bool:
    """Whether the ratio's spread leaves no doubt which of the two is faster; a single round has no spread."""
    return rounds > 1 and (ratio["p20"] > 1 or ratio["p80"] < 1)


def product_ceiling(device: torch.device, dtype: str) -> float:
    """The most that this device reaches: TFLOP/s of a large square product."""
    rows = _PRODUCT_ROWS[device.type]
    a, b = (torch.randn(rows, rows, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * rows**3 / _shortest(lambda: torch.mm(a, b, out=out), device) / 1e12


def copy_ceiling(device: torch.device) -> float:
    """GB/s, read and written, of a large copy."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / _shortest(lambda: target.copy_(source), device) / 1e9


def _shortest(call: Call, device: torch.device, rounds: int = 7) -> float:
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def peak_bytes(call: Call, device: torch.device) -> int:
    """Most bytes that one call holds at a time, its own scratch included."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, profile_memory=True) as profiled:
        call()
    result = profiled.profiler
    assert result is not None and result.kineto_results is not None
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
