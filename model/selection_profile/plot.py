"""The picture of a selection profile: mass captured, error of the output, and what they cost."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from memflow_ops.model.plot_style import INK, PALE, new_figure, own_style, plain_panel, png
from memflow_ops.model.selection_profile.figures import ChoiceFigures
from memflow_ops.model.selection_profile.quality import Choice
from memflow_ops.model.selection_profile.report import choices_of, describe_choice
from memflow_ops.model.streaming.settings import StreamSettings

GROUP_COLOURS = ("#2f6fc4", "#d9822b", "#3d9a5f", "#8a5bb5", "#c2476b")
SIZE_COLOURS = ("#9cc3f0", "#2f6fc4", "#d9822b", "#8a3b12", "#3d9a5f", "#555555")
MARKERS = "osD^vP"
LINE_STYLES = {
    "top": "-",
    "moments": (0, (6, 1.5, 1, 1.5)),
    "normalised": (0, (6, 1.5, 1, 1.5, 1, 1.5)),
    "oracle": (0, (4, 2)),
    "random": (0, (1, 1.5)),
}


@own_style()
def draw_profile(figures: Sequence[ChoiceFigures], frame_tokens: int, title: str, settings: StreamSettings) -> bytes:
    """A PNG file of three panels.

    The first compares query groups and holds the block size of the stream's `settings` fixed, the second compares block
    sizes and holds the query group fixed, as far as these were measured. The third points the stream's setting out.
    Solid lines: what the op selects by means, dash-dotted by moments (two dots: normalised); dashed: the oracle;
    dotted: at random.
    """
    choices = choices_of(figures)
    groups = sorted({c.query_group for c in choices if c.blocks == "top"}, key=lambda group: group or math.inf)
    sizes = sorted({c.block_size for c in choices})
    block_size = min(sizes, key=lambda size: abs(size - settings.block_size))
    query_group = settings.query_group if settings.query_group in groups else groups[len(groups) // 2]
    group_colours = dict(zip(groups, GROUP_COLOURS * len(groups), strict=False))
    size_colours = dict(zip(sizes, SIZE_COLOURS, strict=False))

    figure = new_figure(15, 5.2)
    figure.suptitle(title, fontsize=11.5, color=INK)
    mass, error, cost = figure.subplots(1, 3)
    at_random = [(c, PALE) for c in choices if c.block_size == block_size and c.blocks == "random"]
    ranked = [c for c in choices if c.blocks != "random"]
    by_group = [(c, group_colours[c.query_group]) for c in ranked if c.block_size == block_size]
    by_size = [(c, size_colours.get(c.block_size, INK)) for c in ranked if c.query_group == query_group]
    for panel, lines, value in ((mass, by_group, "captured"), (error, by_size, "error")):
        released = Choice("top", frame_tokens, None)
        if released in choices and released not in dict(lines):
            lines.append((released, INK))
        _draw_lines(panel, figures, frame_tokens, [*lines, *at_random], value)
    mass.set_title(f"mass captured: who shares a choice (blocks of {block_size})", fontsize=10, color=INK)
    mass.set_ylabel("of the bank's dense attention mass, %", fontsize=9, color=INK)
    who = "the whole chunk" if query_group is None else f"{query_group} queries"
    error.set_title(f"error of the output: block sizes (a choice per {who})", fontsize=10, color=INK)
    error.set_ylabel("of the dense output, root mean square, %", fontsize=9, color=INK)
    _draw_cost(cost, figures, sizes, group_colours, (settings.block_size, settings.query_group, settings.top_k))
    for panel in (mass, error, cost):
        plain_panel(panel)
        panel.tick_params(labelsize=8)
    return png(figure)


def _draw_lines(
    panel: Axes,
    figures: Sequence[ChoiceFigures],
    frame_tokens: int,
    coloured: Sequence[tuple[Choice, str]],
    value: str,
) -> None:
    """A line per choice: one of its figures, by name, against the share of the bank's keys."""
    for choice, colour in coloured:
        at = [one for one in figures if one.choice == choice and one.top_k]
        panel.plot(
            [100 * one.share for one in at],
            [100 * getattr(one, value) for one in at],
            linestyle=LINE_STYLES[choice.blocks],
            color=colour,
            linewidth=1.1 if choice.blocks == "oracle" else 1.7,
            marker="s" if choice == ("top", frame_tokens, None) else None,
            markersize=4.5,
            label=None if choice.blocks == "oracle" else describe_choice(choice, frame_tokens),
        )
    panel.set_xscale("log", base=2)
    ticks = [100 / 2**i for i in range(6, -1, -1)]
    panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    panel.set_xlabel("keys of the chosen blocks, % of the bank's", fontsize=9, color=INK)
    panel.legend(fontsize=7.5, frameon=False)
    panel.set_ylim(0, None)
    low = min(100 * one.share for one in figures if one.top_k)
    panel.set_xlim(max(low, 100 / 2**7), 104)


def _draw_cost(
    panel: Axes,
    figures: Sequence[ChoiceFigures],
    sizes: Sequence[int],
    group_colours: dict[int | None, str],
    streamed: tuple[int, int | None, int],
) -> None:
    """Error against time: every setting is a point, and a line joins those that no other beats."""
    panel.set_title("error against time: every setting", fontsize=10, color=INK)
    timed = [(one.ratio, one) for one in figures if one.ratio is not None]
    if not timed:
        panel.text(0.5, 0.5, "nothing was timed", ha="center", va="center", color=PALE, transform=panel.transAxes)
        return
    markers = dict(zip(sizes, MARKERS * len(sizes), strict=False))
    for ratio, one in timed:
        style: dict[str, Any] = {"marker": markers[one.block_size], "color": group_colours[one.query_group]}
        panel.scatter(ratio, 100 * one.error, s=22, alpha=0.75, linewidths=0, **style)
        if (one.block_size, one.query_group, one.top_k) == streamed:
            panel.scatter(ratio, 100 * one.error, s=110, facecolors="none", edgecolors=INK, linewidths=1.2)
    front = pareto_front(figures)
    alone = next(100 * one.error for one in figures if not one.top_k)
    ratios = [one.ratio for one in front if one.ratio is not None]
    panel.plot([1, *ratios], [alone, *(100 * one.error for one in front)], color=INK, linewidth=1)
    panel.scatter(1, alone, s=60, marker="*", color=INK)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    panel.set_ylim(0, None)
    panel.set_xlabel("time of the attention op, times the window alone (median)", fontsize=9, color=INK)
    panel.set_ylabel("error of the output, %", fontsize=9, color=INK)
    panel.legend(handles=_cost_legend(group_colours, markers), fontsize=7.5, frameon=False)


def _cost_legend(group_colours: dict[int | None, str], markers: dict[int, str]) -> list[Line2D]:
    def entry(label: str, marker: str, colour: str, **more: Any) -> Line2D:
        return Line2D([], [], marker=marker, linestyle="", color=colour, label=label, **more)

    names = {1: "per query", None: "per chunk"}
    return [
        *(entry(names.get(group, f"per {group} queries"), "o", colour) for group, colour in group_colours.items()),
        *(entry(f"blocks of {size}", marker, PALE) for size, marker in markers.items()),
        entry("the window alone", "*", INK),
        entry("as streamed", "o", INK, markersize=9, markerfacecolor="none"),
    ]


def pareto_front(figures: Sequence[ChoiceFigures]) -> list[ChoiceFigures]:
    """The timed settings that no other beats in both time and error, by time."""
    front: list[ChoiceFigures] = []
    timed = [one for one in figures if one.ratio is not None]
    for one in sorted(timed, key=lambda one: (one.ratio, one.error)):
        if not front or one.error < front[-1].error:
            front.append(one)
    return front
