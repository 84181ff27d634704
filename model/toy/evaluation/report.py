"""The evaluation as a table, as JSON and as a picture."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from memflow_ops.environment import ROOT, environment
from memflow_ops.files import sha256, write_atomically, write_picture
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.toy.evaluation.figures import KindFigures, KindTiming
from memflow_ops.model.toy.evaluation.held_out import FRAMES_PER_PROMPT, JUDGED_SEED
from memflow_ops.model.toy.schedule import HELD_OUT_SEED


def evaluation_table(kinds: Sequence[KindFigures], timings: Mapping[str, KindTiming]) -> str:
    """The figures, with what a chunk takes, as a table of fixed-width text; a line per kind of memory."""
    gaps = list(kinds[0].gaps) if kinds else []
    heads = ["memory", "returns", "same hue (95 %)", "chance", "others", "error", "pattern", "chance", "both of two"]
    heads += ["as named", "retrieved right", "activated", *(f"gap {gap}" for gap in gaps)]
    heads += ["copies", "s/chunk", "overhead"]
    lines = [heads, *(_cells(kind, gaps, timings.get(kind.memory)) for kind in kinds)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _cells(kind: KindFigures, gaps: Sequence[str], timing: KindTiming | None) -> list[str]:
    ratio = timing.ratio if timing and kind.memory != "none" else None
    interval = f"{_percent(kind.hue.value)} ({100 * kind.hue.low:.0f}-{100 * kind.hue.high:.0f})"
    shares = (kind.pattern.value, kind.chance_pattern, kind.pairs.value, kind.shape.value, kind.precision)
    return [
        kind.memory,
        str(kind.hue.count),
        interval if kind.hue.count else "-",
        _percent(kind.chance_hue),
        _percent(kind.others_hue),
        f"{kind.median_error:.1f}",
        *map(_percent, (*shares, kind.activated)),
        *(f"{_percent(kind.gaps[gap].value)} of {kind.gaps[gap].count}" for gap in gaps),
        _percent(kind.copies),
        f"{timing.seconds:.3f}" if timing else "-",
        "-" if ratio is None else f"{100 * (ratio - 1):+.0f} %",
    ]


def _percent(x: float | None) -> str:
    return "-" if x is None or math.isnan(x) else f"{100 * x:.0f} %"


def write_evaluation(
    kinds: Sequence[KindFigures],
    timings: Mapping[str, KindTiming],
    settings: StreamSettings,
    *,
    seed: int,
    stories: int,
    weights: Path,
    out: Path,
) -> str:
    """Writes the figures as JSON to `out`, and as a picture beside it. Gives "", or why there is no picture.

    settings, seed, stories (of each length) and weights (the file) are what the stories were streamed with.
    """
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
        "rows": [asdict(kind) for kind in kinds],
    }
    write_atomically(out, (json.dumps(without_nan(results), indent=1, allow_nan=False) + "\n").encode())
    return write_picture(out.with_suffix(".png"), lambda: _draw(kinds))


def _draw(kinds: Sequence[KindFigures]) -> bytes:
    # It brings matplotlib, which every command would otherwise wait for, even `memflow --help`.
    from memflow_ops.model.toy.evaluation.plot import draw_evaluation

    return draw_evaluation(kinds)


def without_nan(x: object) -> object:
    """The same with None for every NaN, which JSON does not have: there was nothing to measure."""
    if isinstance(x, dict):
        return {key: without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [without_nan(value) for value in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def default_results() -> Path | None:
    """The stored results of the default seed in a checkout; None where the package is installed elsewhere."""
    return ROOT / "bench" / "results" / f"toy-cpu-seed-{JUDGED_SEED}.json" if (ROOT / "setup.py").is_file() else None
