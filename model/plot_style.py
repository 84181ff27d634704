"""What all pictures share: colours, plain panels, and the way into a PNG file."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, PALE = "#22262b", "#6b737c"
"""The colours of text and lines, and of what stands back."""
SUBJECT, OTHERS = "#2f6fc4", "#9aa3ad"
"""The colours of what a picture is about, and of what it is compared with."""


@contextmanager
def own_style() -> Iterator[None]:
    """A context (and a decorator) in which pictures do not depend on the user's matplotlibrc.

    It may ask for LaTeX, which may not be there. Text is shown as it is, dollar signs included.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        yield


def new_figure(width: float, height: float) -> Figure:
    """A white figure, in inches, that lays out its panels by itself."""
    return Figure(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")


def plain_panel(panel: Axes, *, grid: str = "both") -> None:
    """Gives a panel pale grid lines (along "x", "y" or "both"), and no frame and no tick marks."""
    panel.tick_params(length=0, colors=INK)
    panel.grid(axis=grid, color="#e4e8ec", linewidth=0.7)  # type: ignore[arg-type]
    panel.set_axisbelow(True)
    for spine in panel.spines.values():
        spine.set_visible(False)


def png(figure: Figure) -> bytes:
    """The content of a PNG file."""
    target = io.BytesIO()
    FigureCanvasAgg(figure).print_png(target)
    return target.getvalue()
