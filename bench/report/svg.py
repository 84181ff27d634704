"""Small charts as inline SVG, coloured by the page's CSS variables, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 200, 16, 44
_LINES_HEIGHT = 340
_LETTER = 7  # The width of a letter of the font below, at the most.
_ASIDE = 4.0  # The distance of two series at the same place, at the most.
COLOURS = 8
"""Colours of the page for series: var(--c0) to var(--c7)."""
_DASHES = ("", "7 4", "2 3")  # Where there are more lines than colours, the next ones are dashed.

STYLE = """
:root { --paper: #ffffff; --ink: #1b1f24; --faint: #59636e; --rule: #d8dee4; --panel: #f6f8fa;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #8a6100;
  --c6: #08808f; --c7: #6e7781; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --rule: #3d444d; --panel: #151b23;
    --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #ff7bc2; --c5: #d4a72c;
    --c6: #56d4dd; --c7: #9da7b3; } }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .faint { fill: var(--faint); }
svg .value { stroke: var(--paper); stroke-width: 4; paint-order: stroke; }
svg .rule { stroke: var(--rule); stroke-width: 1; }
svg .edge { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .spread { stroke: var(--ink); stroke-width: 1.3; fill: none; }
"""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, about `most` of them."""
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * m for m in (1, 2, 2.5, 5, 10, 20) if span / (step * m) <= most)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def spread(middle: float, low: float, high: float) -> str:
    return number(middle) + (f" ({number(low)} to {number(high)})" if low < high else "")


def _frame(height: int, label: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">\n' + "\n".join(body) + "\n</svg>"
    )


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str = "rule") -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


Spread = tuple[float, float, float]
"""A value, and the low and high end of its spread."""
Point = tuple[float, float, float, float]
"""x, and y with its spread."""


class _Plane:
    """The plane that lines are drawn in: where a point lies, and its axes."""

    def __init__(self, points: Sequence[Point], right: int, log_x: bool):
        self.log_x = log_x
        self.xs = sorted({point[0] for point in points})
        self.x_low, self.x_high = self._across(self.xs[0]), self._across(self.xs[-1])
        if self.x_low == self.x_high:
            self.x_low, self.x_high = self.x_low - 0.5, self.x_high + 0.5
        self.y_low = min(0.0, *(point[2] for point in points))
        self.y_high = max(*(point[3] for point in points), 0.0) * 1.05
        self.right, self.bottom = _WIDTH - right, _LINES_HEIGHT - _BOTTOM

    def _across(self, x: float) -> float:
        return math.log10(x) if self.log_x else x

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (self._across(x) - self.x_low) / (self.x_high - self.x_low)
        up = (y - self.y_low) / (self.y_high - self.y_low)
        return _LEFT + 20 + across * (self.right - _LEFT - 40), self.bottom - up * (self.bottom - _TOP)

    def axes(self, x_label: str, y_label: str, x_names: Sequence[str]) -> list[str]:
        body = []
        for tick in ticks(self.y_low, self.y_high):
            _, y = self.at(self.xs[0], tick)
            body += [_line(_LEFT, y, self.right, y), _text(_LEFT - 8, y + 4, number(tick), "end", "faint")]
        names = [str(x_names[round(x)]) if x_names else number(x) for x in self.xs]
        room = _LETTER * max(map(len, names)) + 10
        every = math.ceil(len(self.xs) * room / (self.right - _LEFT)) if x_names else 1
        for x, name in list(zip(self.xs, names, strict=True))[::-every]:  # From the newest, which always has its name.
            body.append(_text(self.at(x, self.y_low)[0], self.bottom + 18, name, "middle", "faint"))
        middle = (_LEFT + self.right) / 2
        return [*body, _text(middle, _LINES_HEIGHT - 6, x_label, "middle"), _text(4, 12, y_label)]

    def series(self, name: str, points: Sequence[Point], which: int, shift: float) -> list[str]:
        """A line, its points with their spreads, and its entry in the legend. shift: of the whole line to the right."""
        colour = f"var(--c{which % COLOURS})"
        stroke = f'stroke-width="2" stroke-dasharray="{_DASHES[which // COLOURS % len(_DASHES)]}"'
        places = [(self.at(x, y)[0] + shift, self.at(x, y)[1]) for x, y, *_ in points]
        path = " ".join(f"{'L' if i else 'M'}{px:.1f} {py:.1f}" for i, (px, py) in enumerate(places))
        body = [f'<g stroke="{colour}" fill="{colour}"><path d="{path}" fill="none" {stroke}/>']
        for (px, py), (x, y, low, high) in zip(places, points, strict=True):
            top, end, said = self.at(x, high)[1], self.at(x, low)[1], f"{name}: {spread(y, low, high)}"
            body += [
                f'<path d="M{px - 3:.1f} {top:.1f} h6 m-3 0 V{end:.1f} m-3 0 h6"/>',
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{escape(said)}</title></circle>',
            ]
        x, y = self.right, _TOP + 14 + 20 * which
        body += [
            f'<path d="M{x + 8} {y - 4} h20" {stroke}/><circle cx="{x + 18}" cy="{y - 4}" r="3.5"/></g>',
            _text(x + 34, y + 1, name),
        ]
        return body


def lines(
    series: Mapping[str, Sequence[Point]],
    label: str,
    x_label: str,
    y_label: str,
    *,
    x_names: Sequence[str] = (),
    log_x: bool = False,
    right: int = _RIGHT,
) -> str:
    """A line per series, with a bar for the spread of each point.

    x_names: the names of x = 0, 1, 2, ..., where series stand side by side. right: room for the names of the series.
    """
    plane = _Plane([point for points in series.values() for point in points], right, log_x)
    body = plane.axes(x_label, y_label, x_names)
    apart = min(_ASIDE, 0.7 * (plane.right - _LEFT) / len(plane.xs) / len(series)) if x_names else 0.0
    for which, (name, points) in enumerate(series.items()):
        body += plane.series(name, points, which, apart * (which - (len(series) - 1) / 2))
    return _frame(_LINES_HEIGHT, label, body)


def bars(
    rows: Mapping[str, Mapping[str, Spread]],
    label: str,
    x_label: str,
    *,
    edge: float | None = None,
    edge_label: str = "",
    legend: bool = True,
) -> str:
    """A horizontal bar with its spread for each part of each row, one beneath the other.

    edge: a value to stay below, drawn as a dashed line.
    """
    left = 24 + _LETTER * max(len(name) for name in rows)
    parts = list(dict.fromkeys(name for of in rows.values() for name in of))
    thick, pitch, gap = (20, 20, 8) if max(map(len, rows.values())) == 1 else (13, 17, 8)
    top = (34 if legend else 12) + (18 if edge_label else 0)
    height = top + sum(pitch * len(of) + gap for of in rows.values()) + _BOTTOM
    spreads = [value for of in rows.values() for value in of.values()]
    low, high = min(0.0, *(x for _, x, _ in spreads)) * 1.02, max(edge or 0.0, *(x for _, _, x in spreads)) * 1.02
    right, bottom = _WIDTH - 70, height - _BOTTOM
    at = lambda value: left + (value - low) / (high - low) * (right - left)  # noqa: E731
    body = []
    for tick in ticks(low, high):
        body += [
            _line(at(tick), top - 4, at(tick), bottom),
            _text(at(tick), bottom + 16, number(tick), "middle", "faint"),
        ]
    body.append(_text((left + right) / 2, height - 6, x_label, "middle"))
    y, values = float(top), []
    for name, of in rows.items():
        body.append(_text(left - 8, y + pitch * len(of) / 2 + thick / 4, name, "end"))
        for part, (value, least, most) in of.items():
            middle = y + thick / 2
            said = f"{name}, {part}: {spread(value, least, most)}"
            body += [
                f'<rect x="{min(at(0), at(value)):.1f}" y="{y:.1f}" width="{max(abs(at(value) - at(0)), 0.5):.1f}" '
                f'height="{thick}" fill="var(--c{parts.index(part) % COLOURS})"><title>{escape(said)}</title></rect>',
                f'<path class="spread" d="M{at(least):.1f} {middle - 4:.1f} v8 m0 -4 H{at(most):.1f} m0 -4 v8"/>',
            ]
            values.append(_text(max(at(most), at(0)) + 6, middle + 5, number(value), "start", "faint value"))
            y += pitch
        y += gap
    if edge is not None:
        body.append(_line(at(edge), top - 8, at(edge), bottom, "edge"))
        if edge_label:
            body.append(_text(at(edge), top - 12, edge_label, "middle"))
    if low:
        body.append(_line(at(0), top - 4, at(0), bottom, "spread"))
    body += values
    return _frame(height, label, [*body, *(_legend(parts, left) if legend else [])])


def _legend(parts: Sequence[str], x: int) -> list[str]:
    """A square and a name for each part, from x on."""
    body = []
    for which, part in enumerate(parts):
        square = f'<rect x="{x}" y="6" width="12" height="12" fill="var(--c{which % COLOURS})"/>'
        body += [square, _text(x + 18, 17, part)]
        x += 42 + _LETTER * len(part)
    return body
