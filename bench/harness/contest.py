"""How things are compared: every contender checked first, then all timed in turn, ratios taken pair by pair.

Within a round each contender runs once; the ratio of two is the median over the rounds of one's time over the
other's, so that what slows the machine down for a while slows both. Every round has an order of its own, because what
ran before leaves caches and clocks behind. On CUDA a contender is replayed as a graph where it can be captured, timed
by events, over up to 8 copies of its inputs, as many as are larger together than the L2 cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from memflow_ops.bench.harness.case import OURS, Call, Contender
from memflow_ops.bench.harness.statistics import in_turn, paired, quantiles

if TYPE_CHECKING:
    from memflow_ops.bench.harness.case import Case
# Inputs are rotated until they are this many times the L2 cache.
_CACHES = 2


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
