"""The picture of an evaluation: who came back the same, under every kind of memory, and after how long."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from memflow_ops.model.plot_style import INK, PALE

if TYPE_CHECKING:
    from memflow_ops.model.toy.evaluation.figures import KindFigures
SUBJECT, OTHERS = "#2f6fc4", "#9aa3ad"
CHANCE_SHAPE = 1 / 4


def draw_evaluation(rows: Sequence[KindFigures]) -> bytes:
    """Rows -> a PNG file: hue with its interval, pattern, shape, and hue by gap."""
    gaps = list(rows[0].gaps)
    figure = Figure(figsize=(13, 1.7 + 0.42 * len(rows)), dpi=110, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(1.25, 1, 1, 1.25))
    places = np.arange(len(rows))[::-1]
    colours = [SUBJECT if row.memory == "memflow" else OTHERS for row in rows]
    count = max(row.hue.count for row in rows)
    columns = (
        (f"same hue, {count} returns", [row.hue for row in rows], [row.chance_hue for row in rows]),
        ("same pattern", [row.pattern for row in rows], [row.chance_pattern for row in rows]),
        ("shape as named", [row.shape for row in rows], [CHANCE_SHAPE] * len(rows)),
    )
    for panel, (title, shares, chances) in zip(panels, columns, strict=False):
        values = [100 * share.value for share in shares]
        spans = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
        panel.barh(places, values, height=0.62, color=colours, xerr=spans, ecolor=INK, error_kw={"elinewidth": 1})
        panel.vlines([100 * chance for chance in chances], places - 0.4, places + 0.4, color=INK, linestyle=(0, (2, 1)))
        panel.set_title(title, fontsize=10, color=INK)
        for place, share in zip(places, shares, strict=True):
            panel.text(1.5, place, f"{100 * share.value:.0f} %", va="center", fontsize=8.5, color="white")
    panels[0].text(
        100 * rows[0].chance_hue + 1,
        len(rows) - 0.45,
        "dashed: chance, by shuffled identities",
        fontsize=7.5,
        color=PALE,
        va="bottom",
    )

    last = panels[-1]
    shades = np.linspace(0.45, 1, len(gaps))
    for i, (gap, shade) in enumerate(zip(gaps, shades, strict=True)):
        values = [100 * row.gaps[gap].value for row in rows]
        offset = (len(gaps) - 1) / 2 - i
        height = 0.66 / len(gaps)
        last.barh(places + offset * height, values, height=height * 0.92, color=INK, alpha=shade, label=f"{gap} frames")
    last.set_title("same hue, by frames away", fontsize=10, color=INK)
    figure.legend(loc="outside lower right", ncols=len(gaps), fontsize=8, frameon=False)

    panels[0].set_yticks(places, [row.memory for row in rows], fontsize=9.5)
    for panel in panels:
        panel.set_xlim(0, 104)
        panel.set_ylim(-0.6, len(rows) - 0.15)
        panel.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"], fontsize=8)
        panel.tick_params(length=0, colors=INK)
        panel.grid(axis="x", color="#e4e8ec", linewidth=0.7)
        panel.set_axisbelow(True)
        for side in ("top", "right", "left", "bottom"):
            panel.spines[side].set_visible(False)
    target = io.BytesIO()
    canvas.print_png(target)
    return target.getvalue()
