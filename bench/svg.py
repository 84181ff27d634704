"""Small charts as inline SVG, coloured by the page's CSS variables, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH = 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 200, 16, 44
_LETTER = 7  # at the most, of the font below
COLOURS = 6
"""Series colours of the page: var(--c0) to var(--c5)."""

STYLE = """
:root { --paper: #ffffff; --ink: #1b1f24; --faint: #59636e; --rule: #d8dee4; --panel: #f6f8fa;
  --c0: #0969da; --c1: #bc4c00; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989; --c5: #7d4e00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0d1117; --ink: #e6edf3; --faint: #9198a1; --rule: #3d444d; --panel: #151b23;
    --c0: #58a6ff; --c1: #f0883e; --c2: #3fb950; --c3: #bc8cff; --c4: #ff7bc2; --c5: #d4a72c; } }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .faint { fill: var(--faint); }
svg .value { stroke: var(--paper); stroke-width: 4; paint-order: stroke; }
svg .rule { stroke: var(--rule); stroke-width: 1; }
svg .edge { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; }
"""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high."""
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / most))
    step = next(step * m for m in (1, 2, 2.5, 5, 10, 20) if span / (step * m) <= most)
    return [step * n for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _frame(height: int, label: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        f'xmlns="http://www.w3.org/2000/svg">\n' + "\n".join(body) + "\n</svg>"
    )


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(words)}</text>'


def _line(x0: float, y0: float, x1: float, y1: float, kind: str = "rule") -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" class="{kind}"/>'


Point = tuple[float, float, float, float]
"""x, y and the ends of y's spread."""


def lines(
    series: Mapping[str, Sequence[Point]], label: str, x_label: str, y_label: str, *, x_names: Sequence[str] = (),
    log_x: bool = False, edge: float | None = None, edge_label: str = "", right: int = _RIGHT,
) -> str:  # fmt: skip
    """A line per series with a bar for each point's spread. x_names: names of x = 0, 1, 2, ...; edge: a line to stay
    below. right: room for the names of the series."""
    height = 340
    points = [point for of in series.values() for point in of]
    place = (lambda x: math.log10(x)) if log_x else float
    xs = sorted({point[0] for point in points})
    x_low, x_high = place(xs[0]), place(xs[-1])
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low = min(0.0, *(point[2] for point in points))
    y_high = max(*(point[3] for point in points), edge or 0.0) * 1.05
    right, bottom = _WIDTH - right, height - _BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        across = (place(x) - x_low) / (x_high - x_low)
        return _LEFT + 12 + across * (right - _LEFT - 24), bottom - (y - y_low) / (y_high - y_low) * (bottom - _TOP)

    body = []
    for tick in ticks(y_low, y_high):
        _, y = at(xs[0], tick)
        body += [_line(_LEFT, y, right, y), _text(_LEFT - 8, y + 4, number(tick), "end", "faint")]
    for number_of, x in enumerate(xs):
        name = x_names[number_of] if x_names else number(x)
        body.append(_text(at(x, y_low)[0], bottom + 18, name, "middle", "faint"))
    body += [_text((_LEFT + right) / 2, height - 6, x_label, "middle"), _text(4, 12, y_label)]
    if edge is not None:
        _, y = at(xs[0], edge)
        body += [_line(_LEFT, y, right, y, "edge"), _text(right + 10, y + 4, edge_label)]
    for number_of, (name, of) in enumerate(series.items()):
        colour = f"var(--c{number_of % COLOURS})"
        path = " ".join(f"{'L' if i else 'M'}{at(p[0], p[1])[0]:.1f} {at(p[0], p[1])[1]:.1f}" for i, p in enumerate(of))
        body.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y, low, high in of:
            (px, py), top, end = at(x, y), at(x, high)[1], at(x, low)[1]
            body.append(
                f'<g stroke="{colour}" fill="{colour}"><path d="M{px:.1f} {top:.1f} V{end:.1f}"/>'
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{escape(name)}: {number(y)}</title></circle></g>'
            )
        y = _TOP + 14 + 20 * number_of
        body += [f'<rect x="{right + 10}" y="{y - 10}" width="12" height="12" fill="{colour}"/>',
                 _text(right + 28, y + 1, name)]  # fmt: skip
    return _frame(height, label, body)


def bars(
    rows: Mapping[str, Mapping[str, float]], label: str, x_label: str, *, edge: float | None = None, legend: bool = True
) -> str:
    """A horizontal bar per row, made of parts one behind the other."""
    left = 24 + _LETTER * max(len(name) for name in rows)
    parts = list(dict.fromkeys(name for of in rows.values() for name in of))
    top = 34 if legend else 12
    height = top + 28 * len(rows) + _BOTTOM
    high = max(*(sum(of.values()) for of in rows.values()), edge or 0.0) * 1.02
    right, bottom = _WIDTH - 70, height - _BOTTOM
    at = lambda value: left + value / high * (right - left)  # noqa: E731
    body = []
    for tick in ticks(0, high):
        body += [
            _line(at(tick), top - 4, at(tick), bottom),
            _text(at(tick), bottom + 16, number(tick), "middle", "faint"),
        ]
    body.append(_text((left + right) / 2, height - 6, x_label, "middle"))
    if edge is not None:
        body.append(_line(at(edge), top - 8, at(edge), bottom, "edge"))
    for number_of, (name, of) in enumerate(rows.items()):
        y, start = top + 28 * number_of, 0.0
        body.append(_text(left - 8, y + 15, name, "end"))
        for part, value in of.items():
            colour = f"var(--c{parts.index(part) % COLOURS})"
            body.append(
                f'<rect x="{at(start):.1f}" y="{y}" width="{max(at(start + value) - at(start), 0.5):.1f}" height="20" '
                f'fill="{colour}"><title>{escape(name)}, {escape(part)}: {number(value)}</title></rect>'
            )
            start += value
        body.append(_text(at(start) + 6, y + 15, number(start), "start", "faint value"))
    if legend:
        for number_of, part in enumerate(parts):
            x = left + 130 * number_of
            body += [f'<rect x="{x}" y="6" width="12" height="12" fill="var(--c{number_of % COLOURS})"/>',
                     _text(x + 18, 17, part)]  # fmt: skip
    return _frame(height, label, body)
