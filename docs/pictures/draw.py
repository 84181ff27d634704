"""Draw the two pictures of the README from two runs of the demo's story, one with memory and one without.

`make pictures` makes both runs and calls this file: draw.py WITH_MEMORY WITHOUT_MEMORY OUT, three folders. The first
two are what `memflow toy demo` and `memflow toy generate --memory none` wrote; story.png and bank.png go to OUT.
"""

import json
import sys
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

PAPER, INK, PALE, LINE = "#ffffff", "#1f2328", "#656d76", "#d5dade"
SAME, OTHER, RETRIEVED, SINK = "#1a7f37", "#c0362c", "#2f6fc4", "#9aa3ad"
OFFSETS = (1, 9)  # which of a prompt's frames are shown, one near the ground and one in the air
FRAME, GAP = 1.0, 0.06  # inches


def page(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one set of axes, in inches from the upper left, on a rounded white card."""
    figure = Figure(figsize=(width, height), dpi=120)
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    card = FancyBboxPatch(
        (0.12, 0.12), width - 0.24, height - 0.24, boxstyle="round,pad=0.1", facecolor=PAPER, edgecolor=LINE
    )
    axes.add_patch(card)
    return figure, axes


def frame(
    axes: Axes, pixels: np.ndarray, x: float, y: float, size: float, edge: str = LINE, width: float = 0.8
) -> None:
    axes.imshow(pixels, extent=(x, x + size, y + size, y), interpolation="nearest", aspect="auto", zorder=2)
    axes.add_patch(Rectangle((x, y), size, size, fill=False, edgecolor=edge, linewidth=width, zorder=3))


def draw_story(run: dict, with_memory: np.ndarray, without: np.ndarray) -> Figure:
    """Two frames of every prompt, in a row with memory and a row without, and how each return was judged."""
    prompts, length = run["prompts"], run["frames_per_prompt"]
    group = len(OFFSETS) * (FRAME + GAP) - GAP
    left, top, step = 1.7, 0.85, group + 0.22
    row = FRAME + 0.42
    figure, axes = page(left + len(prompts) * step + 0.1, top + 2 * row + 0.12)
    rows = (("with\nmemory", with_memory, "with_memory"), ("without\nmemory", without, "without_memory"))
    for i, (name, _, _) in enumerate(rows):
        y = top + i * row + FRAME / 2
        axes.text(0.38, y, name, fontsize=17, color=INK, weight="bold" if i == 0 else "normal", va="center")
    returns = {there["back"]: there for there in run["returns"]}
    for n, prompt in enumerate(prompts):
        x = left + n * step
        lines = fill(prompt, 18).split("\n")
        for up, line in enumerate(reversed(lines)):
            axes.text(x, top - 0.13 - 0.24 * up, line, fontsize=15, color=INK, va="baseline")
        there = returns.get(n * length)
        for i, (_, frames, judged) in enumerate(rows):
            y = top + i * row
            same = there is not None and there[judged]["same"]
            colour = LINE if there is None else SAME if same else OTHER
            for j, offset in enumerate(OFFSETS):
                wide = 0.8 if there is None else 2.6
                frame(axes, frames[n * length + offset], x + j * (FRAME + GAP), y, FRAME, colour, wide)
            if there is not None:
                words = f"the same {there['character']}" if same else f"another {there['character']}"
                axes.text(x, y + FRAME + 0.06, words, fontsize=15, color=colour, va="top", weight="bold")
    return figure


def draw_bank(run: dict, frames: np.ndarray) -> Figure:
    """The chunk in which the first character returns, and the bank that it looked back at."""
    back = run["returns"][0]["back"]
    chunk = next(chunk for chunk in run["chunks"] if chunk["first_frame"] == back)
    size = len(frames) // len(run["chunks"])
    shares = dict(zip(chunk["candidates"], chunk["activation"], strict=True))
    small, top, left = 0.82, 1.25, 0.4
    right = left + size * (FRAME + GAP) + 0.75
    figure, axes = page(right + len(shares) * (small + 0.12) + 0.3, 2.95)
    axes.text(left, 0.42, f"“{chunk['prompt']}”", fontsize=15, color=INK, weight="bold", va="top")
    axes.text(left, 0.76, f"the new chunk, frames {back} to {back + size - 1}", fontsize=11.5, color=PALE, va="top")
    for i in range(size):
        frame(axes, frames[back + i], left + i * (FRAME + GAP), top, FRAME)
    axes.annotate(
        "",
        (right - 0.62, top + FRAME / 2),
        (right - 0.15, top + FRAME / 2),
        arrowprops={"arrowstyle": "-|>", "color": PALE, "linewidth": 1.6},
    )
    axes.text(right, 0.42, "what it looked back at", fontsize=15, color=INK, weight="bold", va="top")
    axes.text(right, 0.76, "retrieved by the prompt", fontsize=11.5, color=RETRIEVED, va="top")
    axes.text(right + 2.25, 0.76, "first frames of the video", fontsize=11.5, color=PALE, va="top")
    y, tallest = top + FRAME - small, max(shares.values())
    for i, number in enumerate(sorted(shares, key=lambda number: (number not in chunk["retrieved"], number))):
        x, colour = right + i * (small + 0.12), RETRIEVED if number in chunk["retrieved"] else SINK
        frame(axes, frames[number], x, y, small, colour, 2.2)
        axes.text(x + small / 2, y - 0.05, f"frame {number}", fontsize=9.5, color=PALE, ha="center", va="bottom")
        tall = 0.28 * shares[number] / tallest
        axes.add_patch(Rectangle((x, y + small + 0.1), small, tall, facecolor=colour, linewidth=0))
        words = f"{100 * shares[number]:.0f} %"
        axes.text(x + small / 2, y + small + 0.43, words, fontsize=11, color=INK, ha="center", va="top")
    words = "bars: each frame's share of the\nblocks that attention selected"
    axes.text(left, top + FRAME + 0.15, words, fontsize=11, color=PALE, va="top", linespacing=1.3)
    return figure


def main(with_memory: Path, without: Path, out: Path) -> None:
    run = json.loads((with_memory / "run.json").read_text(encoding="utf-8"))
    frames, forgetful = (np.load(folder / "frames.npz")["frames"] for folder in (with_memory, without))
    draw_story(run, frames, forgetful).savefig(out / "story.png")
    draw_bank(run, frames).savefig(out / "bank.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
