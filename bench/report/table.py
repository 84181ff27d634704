"""The results of a device as one table: what each contender takes, over its baseline and of the measured ceilings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from memflow_ops.bench.harness.case import OURS
from memflow_ops.bench.harness.results import ResultRow
from memflow_ops.bench.harness.statistics import decided


def cases_of(rows: Sequence[ResultRow]) -> dict[str, list[ResultRow]]:
    """Rows by case: streams first, our kernels alone last; ours first in each."""
    order = {"stream": 0, "layer": 1, "op": 2, "kernel": 3}
    found: dict[str, list[ResultRow]] = {}
    for row in sorted(rows, key=lambda row: (order[row["level"]], row["dtype"] != "float32")):
        found.setdefault(row["case"], []).append(row)
    return found


def overhead(ratio: Mapping[str, float], rounds: int) -> str:
    """A ratio as percent more, with its spread, and whether the spread leaves open which of the two is faster."""
    middle, low, high = (100 * (ratio[name] - 1) for name in ("p50", "p20", "p80"))
    if rounds == 1:
        return f"{middle:+.1f} % (one round)"
    doubt = "" if decided(ratio, rounds) else ", within the spread"
    return f"{middle:+.1f} % ({low:+.1f} to {high:+.1f}{doubt})"


def milliseconds(seconds: Mapping[str, float], rounds: int) -> str:
    low, middle, high = (1e3 * seconds[name] for name in ("p20", "p50", "p80"))
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 3
    spread = "one round" if rounds == 1 else f"{low:.{digits}f} to {high:.{digits}f}"
    return f"{middle:.{digits}f} ({spread})"


def of_ceiling(row: ResultRow, figure: str, share: str) -> str:
    if figure not in row:
        return ""
    return f"{row[figure]:.3g} ({100 * row[share]:.0f} %)"


def named(row: ResultRow) -> str:
    """A contender, and what else was noted of it.

    The frames of video that it makes, the histories that it was timed over where they grow, and the blocks that a tile
    of queries selects between them.
    """
    words = [str(row["contender"])]
    if "fps" in row:
        words.append(f"{row['fps']:.3g} frames/s")
    if "history_timed" in row:
        words.append("history {} to {}".format(*row["history_timed"]))
    if "union_blocks" in row:
        words.append(f"{row['union_blocks']:.0f} of {row['bank_blocks']} blocks in a tile")
    return ", ".join(words)


def cells(row: ResultRow) -> list[str]:
    """The figures of one contender under `HEADINGS`."""
    is_baseline = row["contender"] == row["baseline"]
    return [
        milliseconds(row["seconds"], row["rounds"]),
        "baseline" if is_baseline else overhead(row["over_baseline"], row["rounds"]),
        "" if row["contender"] == OURS else f"{row['ours_over_this']['p50']:.2f}",
        of_ceiling(row, "tflops", "of_product_ceiling"),
        of_ceiling(row, "gbs", "of_copy_ceiling"),
    ]


FRAMES_PER_SECOND = "frames/s are of the transformer alone, with random weights: no VAE, no text encoder"
HEADINGS = ("ms (20-80 %)", "over the baseline (20-80 %)", "ours / this", "TFLOP/s (of product)", "GB/s (of copy)")


def show(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the results of a device as a table."""
    caption = f"{measured_at(results['rows'])}; {ceilings_line(results['ceilings'])}. {FRAMES_PER_SECOND}."
    table = Table(title=f"memflow bench, {results['device']}", caption=caption)
    table.add_column("case, contender", overflow="fold", min_width=50)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for case, rows in cases_of(results["rows"]).items():
        table.add_section()
        table.add_row(case, *[""] * len(HEADINGS), style="bold")
        for row in rows:
            table.add_row(f"  {named(row)}", *cells(row))
        for name, why in rows[0].get("left_out", {}).items():
            table.add_row(f"  {name}: {why}", style="dim")
    (console or Console(width=160)).print(table)


def measured_at(rows: Sequence[ResultRow]) -> str:
    """The versions, days and commits of the rows, each once, in the order in which the rows were kept."""
    return "; ".join(dict.fromkeys(f"torch {row['torch']}, {row['date']}, commit {row['commit']}" for row in rows))


def ceilings_line(ceilings: Mapping[str, float]) -> str:
    products = (
        f"{name.removeprefix('tflops_')} product {value:.3g} TFLOP/s"
        for name, value in ceilings.items()
        if name != "gbs"
    )
    return f"ceilings, each as measured last: {', '.join(products)}, copy {ceilings['gbs']:.3g} GB/s"
