"""The picture of an evaluation: who came back the same, under every kind of memory, and after how long."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from memflow_ops.model.plot_style import INK, OTHERS, PALE, SUBJECT, new_figure, own_style, plain_panel, png
from memflow_ops.model.toy.evaluation.figures import KindFigures, Proportion
from memflow_ops.model.toy.language import CHARACTERS


@own_style()
def draw_evaluation(kinds: Sequence[KindFigures]) -> bytes:
    """A PNG file with a line per kind of memory: hue with its interval, pattern, shape, and hue by gap."""
    figure = new_figure(13, 1.7 + 0.42 * len(kinds))
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(1.25, 1, 1, 1.25))
    places = np.arange(len(kinds))[::-1]
    colours = [SUBJECT if kind.memory == "memflow" else OTHERS for kind in kinds]
    count = max(kind.hue.count for kind in kinds)
    columns = (
        (f"same hue, {count} returns", [kind.hue for kind in kinds], [kind.chance_hue for kind in kinds]),
        ("same pattern", [kind.pattern for kind in kinds], [kind.chance_pattern for kind in kinds]),
        ("shape as named", [kind.shape for kind in kinds], [1 / len(CHARACTERS)] * len(kinds)),
    )
    for panel, (title, shares, chances) in zip(panels, columns, strict=False):
        _draw_shares(panel, places, shares, chances, colours)
        panel.set_title(title, fontsize=10, color=INK)
    panels[0].text(
        100 * kinds[0].chance_hue + 1,
        len(kinds) - 0.45,
        "dashed: chance, by shuffled identities",
        fontsize=7.5,
        color=PALE,
        va="bottom",
    )
    _draw_gaps(panels[-1], places, kinds)
    figure.legend(loc="outside lower right", ncols=len(kinds[0].gaps), fontsize=8, frameon=False)

    panels[0].set_yticks(places, [kind.memory for kind in kinds], fontsize=9.5)
    for panel in panels:
        panel.set_xlim(0, 104)
        panel.set_ylim(-0.6, len(kinds) - 0.15)
        panel.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"], fontsize=8)
        plain_panel(panel, grid="x")
    return png(figure)


def _draw_shares(
    panel: Axes, places: np.ndarray, shares: Sequence[Proportion], chances: Sequence[float], colours: Sequence[str]
) -> None:
    """A bar per share with its interval, and a dashed line where chance would be."""
    values = [100 * share.value for share in shares]
    spans = [[100 * (s.value - s.low) for s in shares], [100 * (s.high - s.value) for s in shares]]
    panel.barh(places, values, height=0.62, color=colours, xerr=spans, ecolor=INK, error_kw={"elinewidth": 1})
    panel.vlines([100 * chance for chance in chances], places - 0.4, places + 0.4, color=INK, linestyle=(0, (2, 1)))
    for place, share in zip(places, shares, strict=True):
        panel.text(1.5, place, f"{100 * share.value:.0f} %", va="center", fontsize=8.5, color="white")


def _draw_gaps(panel: Axes, places: np.ndarray, kinds: Sequence[KindFigures]) -> None:
    """A bar per kind of memory and length of absence."""
    gaps = list(kinds[0].gaps)
    height = 0.66 / len(gaps)
    for i, (gap, shade) in enumerate(zip(gaps, np.linspace(0.45, 1, len(gaps)), strict=True)):
        values = [100 * kind.gaps[gap].value for kind in kinds]
        at = places + ((len(gaps) - 1) / 2 - i) * height
        panel.barh(at, values, height=height * 0.92, color=INK, alpha=shade, label=f"{gap} frames")
    panel.set_title("same hue, by frames away", fontsize=10, color=INK)
