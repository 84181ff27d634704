"""How things are compared: every contender is checked first, then all are timed in turn and compared pair by pair.

Within a round each contender runs once. The ratio of two is the median, over the rounds, of one's time over the
other's, so that what slows the machine down for a while slows both. Every round has an order of its own, because what
ran before leaves caches and clocks behind. On CUDA up to 8 copies of the inputs are taken in turn, as many as are
larger together than the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from memflow_ops.bench.harness.case import OURS, Built, Case
from memflow_ops.bench.harness.statistics import in_turn, paired, quantiles
from memflow_ops.bench.harness.timing import captured, seconds_of

# The copies of the inputs together are at least this many times as large as the L2 cache, and at most so many.
_CACHES, _MOST_COPIES = 2, 8


class Contest:
    """A case on a device, built and checked. `before`, `ours` and `after` together are a round.

    wanted: whether a contender is timed, by its name; None for all of them. Ours and the baseline always are.
    """

    def __init__(self, case: Case, device: torch.device, wanted: Callable[[str], bool] | None = None):
        self.case, self.device, self.wanted = case, device, wanted
        self.built = self._built(0)
        for name, contender in self.built.contenders.items():
            try:
                contender.check()
            except AssertionError as error:
                raise AssertionError(f"{case.name}, {name}: {error}") from error
        copies = [self.built.contenders]
        copies += [self._built(seed).contenders for seed in range(1, self._copies_of_inputs())]
        self.calls = {
            name: [
                captured(of[name].call, device) if device.type == "cuda" and contender.graph else of[name].call
                for of in copies
            ]
            for name, contender in self.built.contenders.items()
        }
        self.start_over()

    def _built(self, seed: int) -> Built:
        built = self.case.build(self.device, seed)
        names = list(built.contenders)
        kept = {*names[:2], *filter(self.wanted or names.__contains__, names)}
        return replace(built, contenders={name: built.contenders[name] for name in names if name in kept})

    def _copies_of_inputs(self) -> int:
        contenders = self.built.contenders.values()
        if self.device.type != "cuda" or not all(contender.graph for contender in contenders):
            return 1
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        moved = max(1, max(contender.bytes for contender in contenders))
        return min(_MOST_COPIES, -(-_CACHES * cache // moved))

    def start_over(self) -> None:
        """Forget what has been timed."""
        self.samples: dict[str, list[float | None]] = {name: [] for name in self.calls}
        self.round = 0

    def run_round(self) -> None:
        """Time every contender once."""
        self.before()
        self.ours()
        self.after()

    def before(self) -> None:
        """Time the contenders whose turn in this round comes before ours."""
        order = in_turn(list(self.calls), self.round)
        self._time(order[: order.index(OURS)])

    def ours(self) -> None:
        self._time([OURS])

    def after(self) -> None:
        """Time the contenders that come after ours, and end the round."""
        order = in_turn(list(self.calls), self.round)
        self._time(order[order.index(OURS) + 1 :])
        self.round += 1

    def _time(self, names: Sequence[str]) -> None:
        for name in names:
            due = self.round % self.built.contenders[name].every == 0
            self.samples[name].append(self.seconds(name) if due else None)

    def seconds(self, name: str) -> float:
        """Run a contender once, over the inputs whose turn it is, and return the seconds that it took."""
        calls = self.calls[name]
        return seconds_of(calls[self.round % len(calls)], self.device)

    def rows(self, ceilings: dict[str, float], about: dict[str, object]) -> list[dict[str, object]]:
        """A row of results per contender, ours first. about: what the figures depend on, for every row."""
        names = list(self.built.contenders)
        baseline = names[1] if len(names) > 1 else OURS
        rows = [{**self._row(name, baseline, ceilings), **about} for name in names]
        rows[0]["left_out"] = self.built.left_out
        return rows

    def _row(self, name: str, baseline: str, ceilings: dict[str, float]) -> dict[str, object]:
        case, contender, samples = self.case, self.built.contenders[name], self.samples
        seconds = quantiles([t for t in samples[name] if t is not None])
        row: dict[str, object] = {
            "case": case.name,
            "level": case.level,
            "size": case.size.name,
            "dtype": case.dtype,
            "contender": name,
            "baseline": baseline,
            "seconds": seconds,
            "over_baseline": paired(samples[name], samples[baseline]),
            "ours_over_this": paired(samples[OURS], samples[name]),
            "rounds": sum(t is not None for t in samples[name]),
        }
        if contender.flops:
            tflops = contender.flops / seconds["p50"] / 1e12
            share = tflops / ceilings[f"tflops_{case.dtype}"]
            row |= {"flops": contender.flops, "tflops": tflops, "of_product_ceiling": share}
        if contender.bytes:
            gbs = contender.bytes / seconds["p50"] / 1e9
            row |= {"bytes": contender.bytes, "gbs": gbs, "of_copy_ceiling": gbs / ceilings["gbs"]}
        if contender.video_frames:
            row["fps"] = contender.video_frames / seconds["p50"]
        if contender.notes is not None:
            row |= contender.notes()
        return {**row, "settings": case.all_settings() | contender.settings}
