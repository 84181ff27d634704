"""The evaluation as a table, as JSON and as a picture."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from memflow_ops.environment import ROOT, environment
from memflow_ops.files import sha256, write_atomically
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.toy.evaluation.figures import KindFigures, KindTiming, Proportion
from memflow_ops.model.toy.evaluation.held_out import (
    FRAMES_PER_PROMPT,
)
from memflow_ops.model.toy.schedule import HELD_OUT_SEED


def evaluation_table(rows: Sequence[KindFigures], timings: Mapping[str, KindTiming]) -> str:
    """The rows, with what a chunk takes, as a table of fixed-width text."""

    def percent(x: float | None) -> str:
        return "-" if x is None or math.isnan(x) else f"{100 * x:.0f} %"

    def interval(x: Proportion) -> str:
        return f"{100 * x.value:.0f} % ({100 * x.low:.0f}-{100 * x.high:.0f})" if x.count else "-"

    gaps = list(rows[0].gaps) if rows else []
    heads = ["memory", "returns", "same hue (95 %)", "chance", "others", "error", "pattern", "chance", "both of two"]
    heads += ["as named", "retrieved right", "activated", *(f"gap {gap}" for gap in gaps)]
    heads += ["copies", "s/chunk", "overhead"]
    cells = [heads]
    for row in rows:
        timing = timings.get(row.memory)
        ratio = timing.ratio if timing and row.memory != "none" else None
        line = [row.memory, str(row.hue.count), interval(row.hue), percent(row.chance_hue)]
        line += [percent(row.others_hue), f"{row.median_error:.1f}"]
        line += [percent(x) for x in (row.pattern.value, row.chance_pattern, row.pairs.value, row.shape.value)]
        line += [percent(row.precision), percent(row.activated)]
        line += [f"{percent(row.gaps[gap].value)} of {row.gaps[gap].count}" for gap in gaps]
        overhead = "-" if ratio is None else f"{100 * (ratio - 1):+.0f} %"
        cells.append([*line, percent(row.copies), f"{timing.seconds:.3f}" if timing else "-", overhead])
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def write_evaluation(
    rows: Sequence[KindFigures],
    timings: Mapping[str, KindTiming],
    settings: StreamSettings,
    *,
    seed: int,
    stories: int,
    weights: Path,
    out: Path,
) -> None:
    """Writes the rows as JSON to `out` and as a picture beside it."""
    from memflow_ops.model.toy.evaluation.plot import draw_evaluation

    results = {
        "command": "memflow toy evaluate",
        **environment(torch.device("cpu")),
        "weights": {"name": weights.name, "sha256": sha256(weights)},
        "seed": seed,
        "held_out": seed >= HELD_OUT_SEED,
        "stories_of_each_length": stories,
        "frames_per_prompt": FRAMES_PER_PROMPT,
        "settings": asdict(settings),
        "written": time.strftime("%Y-%m-%d"),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "rows": [asdict(row) for row in rows],
    }
    write_atomically(out, (json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n").encode())
    write_atomically(out.with_suffix(".png"), draw_evaluation(rows))


def without_nan(x: object) -> object:
    """JSON has no NaN; None says as well that there was nothing to measure."""
    if isinstance(x, dict):
        return {key: without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [without_nan(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def default_results() -> Path | None:
    """bench/results/toy-cpu.json in a checkout; None where the package is installed elsewhere."""
    return ROOT / "bench" / "results" / "toy-cpu.json" if (ROOT / "setup.py").is_file() else None
