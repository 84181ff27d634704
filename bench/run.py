"""`make bench`: what memory costs in one attention layer against the same local window without it.

    python -m memflow_ops.bench.run [--rounds 15] [--out bench/results]

Ours and the baseline run in turn; the ratio is the median of the pairwise ratios, with its spread. The result is
printed and written as JSON named after the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from memflow_ops.bench.cases import DTYPES, Case, Shape, attention_case
from memflow_ops.bench.record import slug, write
from memflow_ops.environment import environment


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
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


@torch.no_grad()
def measure(case: Case, rounds: int, device: torch.device) -> dict[str, object]:
    """One row of results; times in seconds."""
    for call in (case.baseline, case.ours):
        call()
    pairs = [(seconds(case.ours, device), seconds(case.baseline, device)) for _ in track(range(rounds), case.name)]
    ratios = sorted(ours / baseline for ours, baseline in pairs)
    quantile = lambda share: ratios[round(share * (len(ratios) - 1))]  # noqa: E731
    return {
        "case": case.name,
        "ratio": statistics.median(ratios),
        "ratio_p20": quantile(0.2),
        "ratio_p80": quantile(0.8),
        "ratio_by_flops": case.flops_ratio,
        "seconds": statistics.median(ours for ours, _ in pairs),
        "baseline_seconds": statistics.median(baseline for _, baseline in pairs),
        "rounds": rounds,
        "peak_bytes": peak_bytes(case.ours, device),
        "baseline_peak_bytes": peak_bytes(case.baseline, device),
        **case.notes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = []
    for dtype in ("float32", "bfloat16"):
        for kind, layout in (
            ("correlated", "tokens"),
            ("correlated", "heads"),
            ("random", "tokens"),
            ("random", "heads"),
        ):
            case = attention_case(Shape(), DTYPES[dtype], kind, layout, device)
            rows.append(measure(case, arguments.rounds, device))
    about = environment(device)
    table = Table(title=f"memory_attention over its local window alone, {about['device']}")
    for title in ("case", "ratio (p20 to p80)", "by FLOPs", "ms", "window ms", "peak MiB", "gathered MiB"):
        table.add_column(title, justify="left" if title == "case" else "right")
    for row in rows:
        table.add_row(
            str(row["case"]),
            f"{row['ratio']:.3f} ({row['ratio_p20']:.3f} to {row['ratio_p80']:.3f})",
            f"{row['ratio_by_flops']:.3f}",
            f"{1e3 * row['seconds']:.1f}",  # type: ignore[operator]
            f"{1e3 * row['baseline_seconds']:.1f}",  # type: ignore[operator]
            f"{row['peak_bytes'] / 2**20:.0f}",  # type: ignore[operator]
            f"{row['gathered_bytes'] / 2**20:.0f}",  # type: ignore[operator]
        )
    Console().print(table)
    target = arguments.out / f"attention-{slug(str(about['device']))}.json"
    write(target, {**about, "rows": rows})
    print(f"written to {target}")


if __name__ == "__main__":
    main()
