"""timeline.png: a story's frames, and under every chunk which frames it remembered, and how much it used each.

Everything is placed in inches from the upper left corner of one picture.
"""

import io
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from memflow_ops.model.plot_style import INK, PALE, own_style
from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.toy.returns import colour_name
from memflow_ops.model.toy.runs import ToyRun

PAPER = "#f3f5f7"
RETRIEVED, SINK = "#2f6fc4", "#9aa3ad"

DPI = 120
MARGIN = 0.4
LINE_FRAMES = 12  # thumbnails side by side
THUMB, GAP, CHUNK_GAP = 0.76, 0.03, 0.26
HEADING, NUMBERS, PANEL, LINE_GAP = 0.34, 0.17, 1.12, 0.34
MOST_LINES = 40  # a picture of more would be too tall for most viewers
MOST_CANDIDATES = 8  # in the panel of a chunk
HEADER, COMPARISON_HEADER, STRIP_TEXT = 1.62, 0.62, 0.72
EXPLAINED = {
    "none": "It has no memory: a chunk sees only the frames just before it.",
    "sink": "Every chunk sees the frames just before it and, in full, the first frames of the video.",
    "full": "Every chunk sees the frames just before it and, in full, the first frame of every chunk before.",
    "released": "Every chunk sees the frames just before it, the first frames and a bank, as in the released MemFlow.",
}


class _Page:
    """An empty picture, and what can be drawn on it. Its size is in inches."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.axis("off")
        self.width, self.height = width, height

    def image(self, pixels: np.ndarray, x: float, y: float, size: float, edge: str | None = None) -> None:
        self.axes.imshow(pixels, extent=(x, x + size, y + size, y), interpolation="nearest", aspect="auto", zorder=2)
        self.axes.add_patch(
            Rectangle(
                (x, y), size, size, fill=False, edgecolor=edge or "#c9cfd5", linewidth=1.6 if edge else 0.5, zorder=3
            )
        )

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0, zorder=2))

    def panel(self, x: float, y: float, width: float, height: float) -> None:
        style = "round,pad=0,rounding_size=0.06"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=PAPER, linewidth=0, zorder=1)
        )

    def text(self, x: float, y: float, words: str, size: float = 8, colour: str = INK, **more: object) -> float:
        """Writes a line whose upper edge is at y. Returns the x at which the words end."""
        style = {"ha": "left", "va": "top", "fontsize": size, "color": colour, "zorder": 4} | more
        drawn = self.axes.text(x, y, words, **style)  # type: ignore[arg-type]
        return x + drawn.get_window_extent(self.canvas.get_renderer()).width / DPI

    def png(self) -> bytes:
        self.axes.set_xlim(0, self.width)
        self.axes.set_ylim(self.height, 0)
        target = io.BytesIO()
        self.canvas.print_png(target)
        return target.getvalue()


@own_style()
def draw_timeline(run: ToyRun) -> bytes:
    """The picture of a story, as the content of a PNG file."""
    settings = run.plan.settings
    lines = _lines(run)
    hidden, lines = lines[MOST_LINES:], lines[:MOST_LINES]
    panels = settings.memory == "memflow"
    chunk_width = settings.chunk_frames * (THUMB + GAP) - GAP
    across = max(1, LINE_FRAMES // settings.chunk_frames)
    width = max(2 * MARGIN + across * (chunk_width + CHUNK_GAP) - CHUNK_GAP, 8.0)
    line_height = HEADING + NUMBERS + THUMB + (PANEL + 0.12 if panels else 0) + LINE_GAP
    strip_size = (width - 2 * MARGIN) / max(20, min(40, len(run.chunks)))
    comparison = _comparison_height(run, strip_size, width)
    page = _Page(width, HEADER + len(lines) * line_height + 0.3 * bool(hidden) + comparison + MARGIN / 2)

    _draw_header(page, run)
    y = HEADER
    frames = run.video
    largest = max((share for chunk in run.chunks for share in chunk.activation[0]), default=1.0)
    returns = run.returns()
    for number, chunks in lines:
        _draw_heading(page, f"{number + 1}  {run.plan.prompts[number]}", returns, chunks[0].first_frame, y)
        for i, chunk in enumerate(chunks):
            x = MARGIN + i * (chunk_width + CHUNK_GAP)
            _draw_chunk(page, chunk, frames, x, y + HEADING, settings.chunk_frames)
            if panels:
                _draw_memory(page, chunk, frames, x, y + HEADING + THUMB + NUMBERS + 0.08, chunk_width, largest)
        y += line_height
    if hidden:
        first = hidden[0][1][0].first_frame
        page.text(
            MARGIN, y, f"... frames {first} to {len(frames) - 1}: see video.mp4, frames.npz and run.json", 9, PALE
        )
        y += 0.3
    if comparison:
        _draw_comparison(page, run, frames, y, strip_size)
    return page.png()


def _lines(run: ToyRun) -> list[tuple[int, list[Chunk]]]:
    """For every line of the picture its prompt's number, from 0, and its chunks. A long prompt takes several lines."""
    across = max(1, LINE_FRAMES // run.plan.settings.chunk_frames)
    lines = []
    for number, group in groupby(run.chunks, key=lambda chunk: run.plan.prompt_number(chunk.index)):
        chunks = list(group)
        lines += [(number, chunks[i : i + across]) for i in range(0, len(chunks), across)]
    return lines


# ----------------------------------------------------------------------------------------------------------- the header


def _draw_header(page: _Page, run: ToyRun) -> None:
    """What the picture shows, how the story was made, and what the colours mean."""
    settings, seed = run.plan.settings, run.plan.seed
    page.text(
        MARGIN, 0.3, "What each part of the story remembered" if settings.memory == "memflow" else "The story", 17
    )
    stopped = ", stopped early" if run.interrupted else ""
    about = f"memory={settings.memory}, seed {seed}, {len(run.video)} frames{stopped}"
    page.text(page.width - MARGIN, 0.4, about, 9, PALE, ha="right")
    size = settings.chunk_frames
    page.text(
        MARGIN,
        0.72,
        f"Each row is a prompt. The frames are made in chunks of {size}, which see the {settings.window_frames - size} "
        "frames just before them.",
        9.5,
        PALE,
    )
    if settings.memory != "memflow":
        page.text(MARGIN, 0.94, EXPLAINED[settings.memory], 9.5, PALE)
        return
    page.text(
        MARGIN,
        0.94,
        "Under a chunk: older frames it could look back at. A bar is a frame's share of what its attention picked.",
        9.5,
        PALE,
    )
    x = MARGIN
    sink = f"the first {settings.sink_frames} frames of the video, always at hand"
    for colour, words in ((RETRIEVED, "frames retrieved from the past for this prompt"), (SINK, sink)):
        page.box(x, 1.22, 0.15, 0.13, colour)
        x = page.text(x + 0.22, 1.205, words, 9.5) + 0.35


# ---------------------------------------------------------------------------------------------------------- one prompt


def _draw_heading(page: _Page, prompt: str, returns: Sequence[dict[str, Any]], first_frame: int, y: float) -> None:
    """The prompt of a line, and which characters return in its first frame."""
    x = page.text(MARGIN, y, prompt, 12.5, fontweight="bold")
    for there in returns:
        if first_frame == there["back"]:
            page.text(x + 0.2, y + 0.03, _return_in_words(there), 9.5, RETRIEVED)


def _return_in_words(there: dict[str, Any]) -> str:
    """Such as "the ball is back after 24 frames, with the same look (blue sides: hue 212° then, 214° now)"."""
    seen = there["with_memory"]
    said = f"the {there['character']} is back after {there['gap']} frames"
    if seen["difference"] is None:
        return f"{said}, says the prompt, but one of the two times it is not to be seen"
    before, after = seen["hue_before"], seen["hue_after"]
    if seen["same"]:
        same = f"{colour_name(before)} {seen['pattern_before']}: hue {before:.0f}° then, {after:.0f}° now"
        return f"{said}, with the same look ({same})"
    looks = ((before, seen["pattern_before"]), (after, seen["pattern_after"]))
    then, now = (f"{colour_name(hue)} {pattern}, hue {hue:.0f}°" for hue, pattern in looks)
    return f"{said}, with another look ({then}, then {now})"


def _draw_chunk(page: _Page, chunk: Chunk, frames: np.ndarray, x: float, y: float, size: int) -> None:
    """The frames of a chunk side by side, with their numbers."""
    for i in range(size):
        left, frame = x + i * (THUMB + GAP), chunk.first_frame + i
        page.image(frames[frame], left, y, THUMB)
        page.text(left + THUMB / 2, y + THUMB + 0.03, str(frame), 7.5, PALE, ha="center")


def _draw_memory(
    page: _Page, chunk: Chunk, frames: np.ndarray, x: float, y: float, width: float, largest: float
) -> None:
    """The panel under a chunk: the frames from which it selected, oldest first, and a bar for the share of each.

    largest: the largest share in the picture, whose bar is as tall as bars get.
    """
    page.panel(x, y, width, PANEL)
    shares = dict(zip(chunk.candidates[0], chunk.activation[0], strict=True))
    if not shares:
        words = "no older frames yet"
        page.text(x + width / 2, y + PANEL / 2, words, 8.5, PALE, ha="center", va="center", style="italic")
        return
    shown = sorted(sorted(shares, key=lambda frame: -shares[frame])[:MOST_CANDIDATES])
    if len(shown) < len(shares):
        more = f"+ {len(shares) - len(shown)} more"
        page.text(x + width - 0.05, y + 0.03, more, 6.5, PALE, ha="right")
    place = (width - 0.1) / max(len(shown), 6)
    small, tallest = min(place - 0.05, 0.36), 0.36
    base = y + 0.2 + tallest
    for i, frame in enumerate(shown):
        middle = x + 0.05 + (i + 0.5) * place
        colour = RETRIEVED if frame in chunk.retrieved[0] else SINK
        tall = tallest * shares[frame] / max(largest, 1e-9)
        page.box(middle - small * 0.35, base - tall, small * 0.7, max(tall, 0.008), colour)
        page.text(middle, base - tall - 0.02, f"{100 * shares[frame]:.0f}%", 7, colour, ha="center", va="bottom")
        page.image(frames[frame], middle - small / 2, base + 0.04, small, colour)
        page.text(middle, base + 0.04 + small + 0.03, str(frame), 7, PALE, ha="center")


# ------------------------------------------------------------------------------------------- with memory and without it


def _comparison_height(run: ToyRun, size: float, width: float) -> float:
    """The height of the comparison in a picture of this width; 0 where there is nothing to compare with."""
    if run.baseline_video is None:
        return 0.0
    lines = -(-len(run.chunks) // int((width - 2 * MARGIN) / size + 1e-6))
    return COMPARISON_HEADER + min(lines, MOST_LINES) * (2 * size + STRIP_TEXT)


def _draw_comparison(page: _Page, run: ToyRun, frames: np.ndarray, y: float, size: float) -> None:
    """One frame of every chunk, with memory above and without it below."""
    without = run.baseline_video
    assert without is not None
    page.box(MARGIN, y - 0.1, page.width - 2 * MARGIN, 0.012, "#d5dade")
    page.text(MARGIN, y + 0.02, "The same story from the same noise, one frame of each chunk", 12.5, fontweight="bold")
    cost = run.overhead()
    if cost is not None:
        words = f"memory took {100 * (float(cost['ratio']) - 1):+.0f} % time per chunk"  # type: ignore[arg-type]
        page.text(page.width - MARGIN, y + 0.05, words, 9.5, PALE, ha="right")
    y += 0.36
    across = int((page.width - 2 * MARGIN) / size + 1e-6)
    for start in range(0, min(len(run.chunks), across * MOST_LINES), across):
        for row, (words, pixels) in enumerate((("with memory", frames), ("without memory", without))):
            top = y + row * (size + 0.23)
            page.text(MARGIN, top, words, 8.5, RETRIEVED if row == 0 else PALE)
            for i, chunk in enumerate(run.chunks[start : start + across]):
                page.image(pixels[chunk.first_frame], MARGIN + i * size + 0.01, top + 0.17, size - 0.03)
        _draw_strip_prompts(page, run, run.chunks[start : start + across], y + 2 * size + 0.44, size)
        y += 2 * size + STRIP_TEXT


def _draw_strip_prompts(page: _Page, run: ToyRun, chunks: Sequence[Chunk], y: float, size: float) -> None:
    """Writes under the strips where each prompt begins: its words where they fit, otherwise its number alone."""
    x = MARGIN
    for number, group in groupby(chunks, key=lambda chunk: run.plan.prompt_number(chunk.index)):
        width = len(list(group)) * size
        prompt = f"{number + 1}  {run.plan.prompts[number]}"
        page.text(x + 0.01, y, prompt if len(prompt) * 0.075 < width else str(number + 1), 7.5, PALE)
        x += width
