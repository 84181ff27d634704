"""`make where-memory-pays`: who comes back the same in the toy world, against what the memory takes.

    python -m memflow_ops.bench.where_memory_pays [--stories 8] [--lengths 24] [--banks 3 1 6 2] [--out FILE.json]

Held-out stories are streamed with banks of several sizes and several numbers of activated blocks, those of the highest
score and as many at random; without memory and with the whole history for comparison. Each row is judged as `memflow
evaluate` does, and every setting timed in turn with the others. Everything is written as soon as it is there: after
Ctrl-C the same command continues.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress

from memflow_ops.allocator import keep_freed_memory
from memflow_ops.bench.harness.results import load, write_json
from memflow_ops.environment import environment
from memflow_ops.files import check_target, sha256, write_atomically
from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.plot_style import INK, PALE
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.toy.evaluation.evaluate import evaluate_kinds, time_kinds
from memflow_ops.model.toy.evaluation.held_out import appearances, is_return, make_stories
from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS, MemoryKind
from memflow_ops.model.toy.evaluation.report import without_nan
from memflow_ops.model.toy.settings import TOY_SETTINGS

BANKS = (3, 1, 6, 2)
"""Frames retrieved for a chunk, what is asked first first."""
TOP_K = (1, 2, 4, 8, 16)
"""Blocks that a query group activates; all of them come with every bank."""
MEASURED = ("device", "date", "commit")
"""What each row and time says of its own run."""
COLOURS = {1: "#3d9a5f", 2: "#8a5bb5", 3: "#2f6fc4", 6: "#d9822b"}


@dataclass(frozen=True)
class Setting:
    """One kind of memory."""

    memory: str
    """none, full or memflow"""
    bank_frames: int = 0
    top_k: int = 0
    """memflow: blocks activated"""
    of: int = 0
    """blocks of sink and bank"""
    blocks: str = ""
    """memflow: top or random"""

    @property
    def name(self) -> str:
        if self.memory != "memflow":
            return self.memory
        return f"bank {self.bank_frames}, {self.blocks} {self.top_k} of {self.of}"

    @property
    def cost(self) -> str:
        """Whose time it takes: blocks at random cost what the best do."""
        return replace(self, blocks="top").name if self.memory == "memflow" else self.memory

    def change(self, settings: StreamSettings) -> StreamSettings:
        if self.memory != "memflow":
            return MEMORY_KINDS[self.memory].change(settings)
        selection: Any = self.blocks
        return replace(settings, bank_frames=self.bank_frames, top_k=self.top_k, selection=selection)


def settings_of(banks: Sequence[int], top_k: Sequence[int], blocks_per_frame: int) -> list[Setting]:
    """All settings, in the order of the banks; what is the same is there once."""
    found: list[Setting] = []
    for number, bank in enumerate(banks):
        if number == 1:
            found += [Setting("none"), Setting("full")]
        blocks = (TOY_SETTINGS.sink_frames + bank) * blocks_per_frame
        found += [Setting("memflow", bank, k, blocks, kind) for k in top_k if k < blocks for kind in ("top", "random")]
        found.append(Setting("memflow", bank, blocks, blocks, "top"))
    return list(dict.fromkeys([*found, Setting("none"), Setting("full")]))


def have_returns(stories: int, seed: int, lengths: Sequence[int]) -> bool:
    """Whether anybody comes back in the stories that are judged."""
    groups = make_stories(stories, seed, lengths)
    return any(is_return(appearance) for group in groups for appearance in appearances(group))


def load_told(target: Path) -> dict[str, Any]:
    """What has been told so far; a ValueError where the file is damaged. Rows and times that do not say when and where
    they were measured are of the run that the file's head names."""
    told = load(target, {"rows": {}, "timings": {}})
    for row in [*told["rows"].values(), *told["timings"].values()]:
        for name in MEASURED:
            row.setdefault(name, told.get(name))
    return told


def measure(told: dict[str, Any], settings: Sequence[Setting], about: dict[str, Any], bar: Progress) -> Iterator[str]:
    """Adds to what has been told the rows that are missing, and at last the times; after each yields what it was.
    about: the head of the file."""
    model = load_checkpoint(TOY_WEIGHTS)
    count = {name: about[name] for name in ("stories", "seed", "lengths")}
    measured = {name: about[name] for name in MEASURED}
    task = bar.add_task("settings", total=len(settings))
    for setting in settings:
        if setting.name not in told["rows"]:
            chunks = bar.add_task(setting.name, total=None)
            (row,) = evaluate_kinds(
                model, kinds=["memflow"], settings=setting.change(TOY_SETTINGS), **count,
                report=lambda _, done, total: bar.update(chunks, completed=done, total=total),  # noqa: B023
            )  # fmt: skip
            bar.remove_task(chunks)
            found = {**asdict(setting), **asdict(row), "memory": setting.memory, **measured}
            told["rows"][setting.name] = without_nan(found)
            yield f"{setting.name}: {_share(found['hue'])}"
        bar.advance(task)
    kinds = {"none": MEMORY_KINDS["none"]} | {
        s.cost: MemoryKind("", s.change) for s in settings if s.blocks != "random"
    }
    if kinds.keys() - told["timings"].keys():
        bar.add_task("times", total=None)
        timings = time_kinds(model, kinds)
        told["timings"] = {name: {**asdict(timing), **measured} for name, timing in timings.items()}
        yield "times"


def compared(rows: dict[str, Any]) -> list[str]:
    """For every bank and number of blocks, the best against as many at random, in words."""
    lines = []
    for row in rows.values():
        other = rows.get(replace(_setting(row), blocks="random").name)
        if row["blocks"] == "top" and other is not None and row["hue"]["count"]:
            best, drawn = row["hue"], other["hue"]
            apart = "apart" if best["low"] > drawn["high"] else "the intervals overlap"
            lines.append(
                f"bank of {row['bank_frames']}, {row['top_k']:>2} of {row['of']} blocks: {_share(best)} of "
                f"{best['count']} returns have their hue, at random {_share(drawn)}; {apart}"
            )
    return lines


def _share(share: dict[str, Any]) -> str:
    if not share["count"]:
        return "no returns"
    return f"{100 * share['value']:.0f} % ({100 * share['low']:.0f}-{100 * share['high']:.0f})"


def _setting(row: dict[str, Any]) -> Setting:
    return Setting(row["memory"], row["bank_frames"], row["top_k"], row["of"], row["blocks"])


def draw(rows: dict[str, Any], timings: dict[str, Any]) -> bytes:
    """Same hue against blocks activated, and against time; PNG."""
    figure = Figure(figsize=(12.5, 5), dpi=110, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    count = max(row["hue"]["count"] for row in rows.values())
    figure.suptitle(
        f"The toy world: returning characters with the hue of their first appearance, {count} returns a point, "
        "bars: 95 %", fontsize=11.5, color=INK,
    )  # fmt: skip
    by_blocks, by_time = figure.subplots(1, 2, sharey=True)
    memories = [row for row in rows.values() if row["memory"] == "memflow"]
    for bank in sorted({row["bank_frames"] for row in memories}):
        for kind, style in (("top", "-"), ("random", (0, (1, 1.5)))):
            line = [row for row in memories if (row["bank_frames"], row["blocks"]) == (bank, kind)]
            if kind == "random":  # all blocks at random are all blocks
                line += [row for row in memories if row["bank_frames"] == bank and row["top_k"] == row["of"]]
            line.sort(key=lambda row: row["top_k"])
            label = f"bank of {bank} frames" + (", blocks at random" if kind == "random" else "")
            if len(line) > 1 or kind == "top":
                _line(by_blocks, line, [row["top_k"] for row in line], COLOURS.get(bank, INK), style, label)
            timed = [row for row in line if _ratio(row, timings) is not None]
            if timed and (len(timed) > 1 or kind == "top"):
                taken = [_ratio(row, timings) for row in timed]
                _line(by_time, timed, taken, COLOURS.get(bank, INK), style, label)
    for name, marker in (("none", "v"), ("full", "^")):
        if name in rows:
            value = _percent(rows[name]["hue"]["value"])
            if math.isnan(value):
                continue
            by_blocks.axhline(value, color=PALE, linewidth=0.9, linestyle=(0, (5, 3)))
            words = {"none": "no memory", "full": "the whole history, dense"}[name]
            by_blocks.text(1, value + 1.2, words, fontsize=8, color=PALE)
            if (ratio := _ratio(rows[name], timings)) is not None:
                by_time.scatter(ratio, value, marker=marker, s=50, color=INK, label=words, zorder=3)
    if not timings:
        by_time.text(0.5, 0.5, "not timed yet", ha="center", va="center", color=PALE, transform=by_time.transAxes)
    ticks = sorted({row["top_k"] for row in memories})
    by_blocks.set_xscale("log", base=2)
    by_blocks.set_xticks(ticks, [str(tick) for tick in ticks])
    by_blocks.set_xlabel(f"blocks of {TOY_SETTINGS.block_size} tokens that a query group activates", fontsize=9)
    by_time.set_xlabel("time of a chunk, times that without memory (median)", fontsize=9)
    by_blocks.set_ylabel("same hue, %", fontsize=9)
    for panel in (by_blocks, by_time):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, frameon=False, loc="lower right")
        panel.set_ylim(0, 104)
        panel.tick_params(length=0, colors=INK, labelsize=8)
        panel.grid(color="#e4e8ec", linewidth=0.7)
        panel.set_axisbelow(True)
        for spine in panel.spines.values():
            spine.set_visible(False)
    target = io.BytesIO()
    canvas.print_png(target)
    return target.getvalue()


def _ratio(row: dict[str, Any], timings: dict[str, Any]) -> float | None:
    timing = timings.get(_setting(row).cost)
    return timing["ratio"] if timing else None


def _percent(share: float | None) -> float:
    """NaN where nothing was judged, which is not drawn."""
    return math.nan if share is None else 100 * share


def _line(panel: Any, line: list[dict[str, Any]], x: list[Any], colour: str, style: Any, label: str) -> None:
    value, low, high = ([_percent(row["hue"][name]) for row in line] for name in ("value", "low", "high"))
    spans = [
        [max(0.0, v - bound) for v, bound in zip(value, low, strict=True)],
        [max(0.0, bound - v) for v, bound in zip(value, high, strict=True)],
    ]
    panel.errorbar(
        x, value, yerr=spans, color=colour, linestyle=style, linewidth=1.6, marker="o", markersize=4.5, label=label,
        elinewidth=0.7, alpha=0.9,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=8, help="held-out stories of each length (8)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[24], help="of the stories, in prompts (24)")
    parser.add_argument("--banks", type=int, nargs="+", default=list(BANKS), help="frames retrieved (3 1 6 2)")
    parser.add_argument("--top-k", type=int, nargs="+", default=list(TOP_K), help="blocks (1 2 4 8 16); all are added")
    parser.add_argument("--seed", type=int, default=20_000, help="of stories and noise (20000)")
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=results / "where-memory-pays.json")
    parser.add_argument("--restart", action="store_true", help="replace results of other stories or weights")
    given = parser.parse_args(arguments)
    for name in ("stories", "lengths", "banks", "top_k"):
        values = getattr(given, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {values}")
    if given.seed < 10_000:
        parser.error(f"seeds below 10000 are for training, got {given.seed}")
    if not have_returns(given.stories, given.seed, given.lengths):
        parser.exit(2, "where_memory_pays: nobody comes back in these stories, so there is nothing to judge; ask for "
                    "longer --lengths, more --stories or another --seed\n")  # fmt: skip
    identity = {
        "stories": given.stories,
        "lengths": given.lengths,
        "seed": given.seed,
        "weights": {"name": TOY_WEIGHTS.name, "sha256": sha256(TOY_WEIGHTS)},
        "settings": asdict(TOY_SETTINGS),
    }
    told: dict[str, Any] = {"rows": {}, "timings": {}}
    try:
        check_target(given.out, ".json")
        check_target(given.out.with_suffix(".png"), ".png")
        if not given.restart:
            told = load_told(given.out)
    except ValueError as error:
        parser.exit(2, f"where_memory_pays: {error}\n")
    changed = [name for name, value in identity.items() if told["rows"] and told.get(name) != value]
    if changed:
        parser.error(
            f"{given.out} has results with other {', '.join(changed)}: say --restart to replace them, or --out "
            f"another file"
        )
    about = {"command": "make where-memory-pays", **environment(torch.device("cpu")), **identity}
    devices = {row["device"] for row in told["rows"].values()} - {about["device"]}
    if devices:
        parser.error(
            f"{given.out} was measured on {', '.join(map(str, devices))}, this is {about['device']}: go on there, or "
            f"say --restart to replace it, or --out another file"
        )
    keep_freed_memory()
    model = load_checkpoint(TOY_WEIGHTS)
    tokens = model.tokens(TOY_SETTINGS.height, TOY_SETTINGS.width)
    settings = settings_of(given.banks, given.top_k, -(-tokens // TOY_SETTINGS.block_size))
    kept = bool(told["rows"])
    console = Console(stderr=True)
    try:
        with Progress(console=console) as bar:
            for done in measure(told, settings, about, bar):
                write_json(given.out, without_nan({**told, **about}))
                kept = True
                write_atomically(given.out.with_suffix(".png"), draw(told["rows"], told["timings"]))
                console.print(done)
    except KeyboardInterrupt:
        same = "the same command without --restart" if given.restart else "the same command"
        found = f"what was measured is in {given.out}, {same} continues" if kept else "nothing has been measured yet"
        print(f"interrupted; {found}", file=sys.stderr)
        raise SystemExit(130) from None
    print("\n".join(compared(told["rows"])))
    for name, timing in told["timings"].items():
        print(f"{name}: {timing['seconds']:.3f} s a chunk, {timing['ratio']:.2f} of none")
    print(f"written to {given.out} and {given.out.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
