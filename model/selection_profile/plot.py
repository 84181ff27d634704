"""The picture of a selection profile: mass captured, error of the output, and what they cost."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from memflow_ops.model.plot_style import INK, PALE
from memflow_ops.model.selection_profile.report import choices_of, describe_choice

if TYPE_CHECKING:
    from memflow_ops.model.selection_profile.figures import ChoiceFigures
    from memflow_ops.model.selection_profile.quality import Choice
    from memflow_ops.model.streaming.settings import StreamSettings

BLUES = ("#2f6fc4", "#d9822b", "#3d9a5f", "#8a5bb5", "#c2476b")
MARKERS = "osD^vP"


def draw_profile(rows: Sequence[ChoiceFigures], frame_tokens: int, title: str, settings: StreamSettings) -> bytes:
    """Rows -> a PNG file of three panels. settings: those of the stream, which the first two panels hold fixed, as far
    as they were measured, and the third points out.

    Solid: what the op selects; dashed: the oracle; dotted: at random.
    """
    block_size, query_group = settings.block_size, settings.query_group
    found = choices_of(rows)
    groups = list(dict.fromkeys(choice.query_group for choice in found if choice.blocks == "top"))
    groups.sort(key=lambda group: group or math.inf)
    sizes = sorted({choice.block_size for choice in found})
    block_size = min(sizes, key=lambda size: abs(size - block_size))
    if query_group not in groups:
        query_group = groups[len(groups) // 2]
    of_group = dict(zip(groups, BLUES * len(groups), strict=False))

    figure = Figure(figsize=(15, 5.2), dpi=110, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11.5, color=INK)
    mass, error, cost = figure.subplots(1, 3)

    def lines(panel: Any, choices: Sequence[Choice], colours: Sequence[str], value: str) -> None:
        for choice, colour in zip(choices, colours, strict=True):
            at = [row for row in rows if (row.blocks, row.block_size, row.query_group) == choice and row.top_k]
            style = {"top": "-", "oracle": (0, (4, 2)), "random": (0, (1, 1.5))}[choice.blocks]
            released = choice.block_size == frame_tokens and choice.query_group is None
            panel.plot(
                [100 * row.share for row in at],
                [100 * getattr(row, value) for row in at],
                linestyle=style,
                color=colour,
                linewidth=1.1 if choice.blocks == "oracle" else 1.7,
                marker="s" if released and choice.blocks == "top" else None,
                markersize=4.5,
                label=None if choice.blocks == "oracle" else describe_choice(choice, frame_tokens),
            )

    by_group = [c for c in found if c.block_size == block_size and c.blocks != "random"]
    whole = [c for c in found if c.block_size == frame_tokens and c.query_group is None and c.blocks == "top"]
    others = [c for c in found if c.block_size == block_size and c.blocks == "random"]
    extra = [c for c in whole if c not in by_group]
    lines(mass, by_group, [of_group[c.query_group] for c in by_group], "captured")
    lines(mass, extra, [INK] * len(extra), "captured")
    lines(mass, others, [PALE] * len(others), "captured")
    mass.set_title(f"mass captured: who shares a choice (blocks of {block_size})", fontsize=10, color=INK)
    mass.set_ylabel("of the bank's dense attention mass, %", fontsize=9, color=INK)

    shades = dict(zip(sizes, ("#9cc3f0", "#2f6fc4", "#d9822b", "#8a3b12", "#3d9a5f", "#555555"), strict=False))
    by_size = [c for c in found if c.query_group == query_group and c.blocks != "random"]
    extra = [c for c in whole if c not in by_size]
    lines(error, by_size, [shades.get(c.block_size, INK) for c in by_size], "error")
    lines(error, extra, [INK] * len(extra), "error")
    lines(error, others, [PALE] * len(others), "error")
    who = "the whole chunk" if query_group is None else f"{query_group} queries"
    error.set_title(f"error of the output: block sizes (a choice per {who})", fontsize=10, color=INK)
    error.set_ylabel("of the dense output, root mean square, %", fontsize=9, color=INK)
    for panel in (mass, error):
        panel.set_xscale("log", base=2)
        ticks = [100 / 2**i for i in range(6, -1, -1)]
        panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        panel.set_xlabel("keys of the chosen blocks, % of the bank's", fontsize=9, color=INK)
        panel.legend(fontsize=7.5, frameon=False)
        panel.set_ylim(0, None)
        low = min(100 * row.share for row in rows if row.top_k)
        panel.set_xlim(max(low, 100 / 2**7), 104)

    _draw_cost(cost, rows, sizes, of_group, (settings.block_size, settings.query_group, settings.top_k))
    for panel in (mass, error, cost):
        panel.tick_params(length=0, colors=INK, labelsize=8)
        panel.grid(color="#e4e8ec", linewidth=0.7)
        panel.set_axisbelow(True)
        for spine in panel.spines.values():
            spine.set_visible(False)
    target = io.BytesIO()
    canvas.print_png(target)
    return target.getvalue()


def _draw_cost(
    panel: Any,
    rows: Sequence[ChoiceFigures],
    sizes: Sequence[int],
    of_group: dict[int | None, str],
    streamed: tuple[int, int | None, int],
) -> None:
    """Error against time, every setting a point, the best of each time joined."""
    panel.set_title("error against time: every setting", fontsize=10, color=INK)
    timed = [row for row in rows if row.ratio is not None]
    if not timed:
        panel.text(0.5, 0.5, "nothing was timed", ha="center", va="center", color=PALE, transform=panel.transAxes)
        return
    marker = dict(zip(sizes, MARKERS * len(sizes), strict=False))
    for row in timed:
        panel.scatter(
            row.ratio, 100 * row.error, s=22, marker=marker[row.block_size], color=of_group[row.query_group],
            alpha=0.75, linewidths=0,
        )  # fmt: skip
        if (row.block_size, row.query_group, row.top_k) == streamed:
            panel.scatter(row.ratio, 100 * row.error, s=110, facecolors="none", edgecolors=INK, linewidths=1.2)
    front = pareto_front(timed)
    alone = next(100 * row.error for row in rows if not row.top_k)
    panel.plot([1, *(row.ratio for row in front)], [alone, *(100 * row.error for row in front)], color=INK, linewidth=1)
    panel.scatter(1, alone, s=60, marker="*", color=INK)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    panel.set_ylim(0, None)
    panel.set_xlabel("time of the attention op, times the window alone (median)", fontsize=9, color=INK)
    panel.set_ylabel("error of the output, %", fontsize=9, color=INK)
    names = {1: "per query", None: "per chunk"}
    entries = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=names.get(group, f"per {group} queries"))
        for group, colour in of_group.items()
    ]
    entries += [
        Line2D([], [], marker=marker[size], linestyle="", color=PALE, label=f"blocks of {size}") for size in sizes
    ]
    entries.append(Line2D([], [], marker="*", linestyle="", color=INK, label="the window alone"))
    entries.append(
        Line2D([], [], marker="o", markersize=9, markerfacecolor="none", linestyle="", color=INK, label="as streamed")
    )
    panel.legend(handles=entries, fontsize=7.5, frameon=False)


def pareto_front(rows: Sequence[ChoiceFigures]) -> list[ChoiceFigures]:
    """The timed rows that no other beats in both time and error, by time."""
    front: list[ChoiceFigures] = []
    for row in sorted(rows, key=lambda row: (row.ratio, row.error)):
        if not front or row.error < front[-1].error:
            front.append(row)
    return front
