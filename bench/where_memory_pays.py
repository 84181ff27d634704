"""`make where-memory-pays`: who comes back the same in the toy world, against what the memory takes.

    python -m memflow_ops.bench.where_memory_pays [--stories 8] [--lengths 24] [--banks 3 1 6 2] [--out FILE.json]

Held-out stories are streamed with banks of several sizes and several numbers of activated blocks: those of the highest
score by means (top) or by moments, normalised where more queries share a choice than that changes nothing for
(`--query-group`), and as many at random; without memory and with the whole history for comparison. Each setting is
judged as `memflow toy evaluate` does, and is timed in turn with the others. Everything is written as soon as it is
measured: after Ctrl-C the same command continues, on another machine too. Every row names its device, and all times are
of one.

All settings stream the same stories from the same noise, so they are compared return by return as well: how many of
them one has got right and the other has not, and the p of a sign test (two-sided, exact) for that.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.progress import Progress

from memflow_ops.allocator import keep_freed_memory
from memflow_ops.bench.harness.results import load, write_json
from memflow_ops.environment import environment
from memflow_ops.files import check_target, locked, sha256, write_atomically
from memflow_ops.geometry import PART_QUERIES
from memflow_ops.model.checkpoints.native import load_checkpoint
from memflow_ops.model.plot_style import INK, PALE, new_figure, own_style, plain_panel, png
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.toy.evaluation.evaluate import evaluate_kinds, time_kinds
from memflow_ops.model.toy.evaluation.held_out import appearances, is_return, make_stories
from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS, MemoryKind
from memflow_ops.model.toy.evaluation.report import without_nan
from memflow_ops.model.toy.settings import TOY_SETTINGS

RESULT = Path(__file__).resolve().parent / "results" / "where-memory-pays.json"
BANKS = (3, 1, 6, 2)
"""Frames that are retrieved for a chunk, in the order in which they are measured."""
TOP_K = (1, 2, 4, 8, 16)
"""Blocks that a query group activates; with every bank, all of its blocks are measured besides."""
BLOCKS = ("top", "moments", "normalised", "random")
"""How blocks are chosen, in the order in which it is measured."""
WORDS = {"moments": "by moments", "normalised": "by normalised scores", "random": "at random"}
MEASURED = ("device", "date", "commit")
"""What every row and every time says of its own measurement."""
COLOURS = {1: "#3d9a5f", 2: "#8a5bb5", 3: "#2f6fc4", 6: "#d9822b"}

Measured = dict[str, Any]
"""A result file: what was asked for, `rows` and `timings` by the settings' names."""


@dataclass(frozen=True)
class Setting:
    """A kind of memory, and how many blocks of its bank are activated."""

    memory: str
    """`none`, `full` or `memflow`; the other fields are for `memflow` alone."""
    bank_frames: int = 0
    top_k: int = 0
    """Blocks that a query group activates."""
    of: int = 0
    """Blocks of the sink and the bank."""
    blocks: str = ""
    """Which blocks are activated: those of the highest score by means, `top`, by `moments` or `normalised`, or `random`
    ones."""

    @property
    def name(self) -> str:
        if self.memory != "memflow":
            return self.memory
        return f"bank {self.bank_frames}, {self.blocks} {self.top_k} of {self.of}"

    @property
    def cost(self) -> str:
        """The name of the setting whose time it takes: blocks at random cost as much as the best."""
        return replace(self, blocks="top").name if self.blocks == "random" else self.name

    def change(self, settings: StreamSettings) -> StreamSettings:
        """A stream's settings with this memory."""
        if self.memory != "memflow":
            return MEMORY_KINDS[self.memory].change(settings)
        scored = self.blocks in ("moments", "normalised")
        how: dict[str, Any] = {"score": self.blocks} if scored else {"selection": self.blocks}
        return replace(settings, bank_frames=self.bank_frames, top_k=self.top_k, **how)


def settings_of(
    banks: Sequence[int], top_k: Sequence[int], blocks_per_frame: int, query_group: int | None
) -> list[Setting]:
    """All settings, each once, in the order of the banks. query_group: None for one choice per chunk."""
    several = query_group is None or query_group > PART_QUERIES  # of one part, normalising keeps the order
    kinds = [kind for kind in BLOCKS if several or kind != "normalised"]
    found: list[Setting] = []
    for number, bank in enumerate(banks):
        if number == 1:
            found += [Setting("none"), Setting("full")]
        blocks = (TOY_SETTINGS.sink_frames + bank) * blocks_per_frame
        found += [Setting("memflow", bank, k, blocks, kind) for k in top_k if k < blocks for kind in kinds]
        found.append(Setting("memflow", bank, blocks, blocks, "top"))
    return list(dict.fromkeys([*found, Setting("none"), Setting("full")]))


def have_returns(stories: int, seed: int, lengths: Sequence[int]) -> bool:
    """Whether anybody comes back in the stories that are judged."""
    groups = make_stories(stories, seed, lengths)
    return any(is_return(appearance) for group in groups for appearance in appearances(group))


# ------------------------------------------------------------------------------------------------------------ measuring


def load_measured(target: Path) -> Measured:
    """What has been measured so far. Raises ValueError where the file is damaged.

    Rows and times that do not say when and where they were measured take that from the head of the file.
    """
    measured = load(target, {"rows": {}, "timings": {}})
    for row in [*measured["rows"].values(), *measured["timings"].values()]:
        for name in MEASURED:
            row.setdefault(name, measured.get(name))
    return measured


def measure(
    measured: Measured, settings: Sequence[Setting], stream: StreamSettings, about: Measured, bar: Progress
) -> Iterator[str]:
    """Add the rows that are missing, and in the end the times; after each, yield in words what it was.

    stream: what the settings change. about: the head of the file.
    """
    model = load_checkpoint(TOY_WEIGHTS)
    count = {name: about[name] for name in ("stories", "seed", "lengths")}
    now = {name: about[name] for name in MEASURED}
    task = bar.add_task("settings", total=len(settings))
    for setting in settings:
        if setting.name not in measured["rows"]:
            chunks = bar.add_task(setting.name, total=None)
            (row,) = evaluate_kinds(
                model,
                kinds=["memflow"],
                settings=setting.change(stream),
                **count,
                report=lambda _, done, total: bar.update(chunks, completed=done, total=total),  # noqa: B023
            )
            bar.remove_task(chunks)
            found = {**asdict(setting), **asdict(row), "memory": setting.memory, **now}
            measured["rows"][setting.name] = without_nan(found)
            yield f"{setting.name}: {_percentage(found['hue'])}"
        bar.advance(task)
    kinds = {"none": MEMORY_KINDS["none"]}
    kinds |= {setting.cost: MemoryKind("", setting.change) for setting in settings if setting.blocks != "random"}
    if kinds.keys() - measured["timings"].keys():
        bar.add_task("times", total=None)
        timings = time_kinds(model, kinds, stream)
        measured["timings"] = {name: {**asdict(timing), **now} for name, timing in timings.items()}
        yield "times"


def compared(rows: Measured) -> list[str]:
    """In words, for every bank and number of blocks: those of the highest score by means, the others beside them."""
    lines = []
    for row in rows.values():
        if row["blocks"] != "top" or not row["hue"]["count"]:
            continue
        for look in ("hue", "pattern"):
            best, others = row[look], []
            for blocks, words in WORDS.items():
                other = rows.get(replace(_setting(row), blocks=blocks).name)
                if other is not None:
                    found = other[look]
                    apart = best["low"] > found["high"] or found["low"] > best["high"]
                    others.append(
                        f"{words} {_percentage(found)}, {'apart' if apart else 'the intervals overlap'}"
                        f"{_paired(row.get(f'each_{look}'), other.get(f'each_{look}'))}"
                    )
            if others:
                lines.append(
                    f"bank of {row['bank_frames']}, {row['top_k']:>2} of {row['of']} blocks: {_percentage(best)} of "
                    f"{best['count']} returns have their {look}; {'; '.join(others)}"
                )
    return lines


def _paired(first: str | None, second: str | None) -> str:
    """In words, how the same returns went under two settings, each given as in `KindFigures.each_hue`.

    None, and so nothing, where a row was stored before rows had that.
    """
    if first is None or second is None:
        return ""
    gained = sum(pair == ("0", "1") for pair in zip(first, second, strict=True))
    lost = sum(pair == ("1", "0") for pair in zip(first, second, strict=True))
    return f", {gained} gained and {lost} lost (p {sign_test(gained, lost):.2g})"


def sign_test(gained: int, lost: int) -> float:
    """How likely at least so uneven a split of the differing cases is where both are as likely: two-sided, exact."""
    cases = gained + lost
    tail = sum(math.comb(cases, rarer) for rarer in range(min(gained, lost) + 1)) / 2**cases
    return min(1.0, 2 * tail)


def _percentage(proportion: Mapping[str, Any]) -> str:
    if not proportion["count"]:
        return "no returns"
    return "{:.0f} % ({:.0f}-{:.0f})".format(*(100 * proportion[name] for name in ("value", "low", "high")))


def _setting(row: Mapping[str, Any]) -> Setting:
    return Setting(row["memory"], row["bank_frames"], row["top_k"], row["of"], row["blocks"])


# -------------------------------------------------------------------------------------------------------------- drawing


@own_style()
def draw(rows: Measured, timings: Measured) -> bytes:
    """The share of returns with the same hue, against the blocks activated and against the time; a PNG."""
    figure = new_figure(12.5, 5)
    count = max(row["hue"]["count"] for row in rows.values())
    title = (
        f"The toy world: returning characters with the hue of their first appearance, {count} returns a point, "
        "bars: 95 %"
    )
    figure.suptitle(title, fontsize=11.5, color=INK)
    by_blocks, by_time = figure.subplots(1, 2, sharey=True)
    for bank in sorted({row["bank_frames"] for row in rows.values() if row["memory"] == "memflow"}):
        _draw_bank(by_blocks, by_time, bank, rows, timings)
    _draw_comparisons(by_blocks, by_time, rows, timings)
    if not timings:
        by_time.text(0.5, 0.5, "not timed yet", ha="center", va="center", color=PALE, transform=by_time.transAxes)
    ticks = sorted({row["top_k"] for row in rows.values() if row["memory"] == "memflow"})
    by_blocks.set_xscale("log", base=2)
    by_blocks.set_xticks(ticks, [str(tick) for tick in ticks])
    by_blocks.set_xlabel(f"blocks of {TOY_SETTINGS.block_size} tokens that a query group activates", fontsize=9)
    by_time.set_xlabel("time of a chunk, times that without memory (median)", fontsize=9)
    by_blocks.set_ylabel("same hue, %", fontsize=9)
    for panel in (by_blocks, by_time):
        _finish(panel)
    return png(figure)


def _draw_bank(by_blocks: Any, by_time: Any, bank: int, rows: Measured, timings: Measured) -> None:
    """A bank's lines: the blocks of the highest score by means and by others, and blocks at random."""
    of_bank = [row for row in rows.values() if (row["memory"], row["bank_frames"]) == ("memflow", bank)]
    styles = {"moments": (0, (6, 1.5, 1, 1.5)), "normalised": (0, (5, 2)), "random": (0, (1, 1.5))}
    for blocks, style in {"top": "-", **styles}.items():
        line = [row for row in of_bank if row["blocks"] == blocks]
        if line and blocks != "top":  # However they are chosen, all blocks are all blocks.
            line += [row for row in of_bank if row["top_k"] == row["of"]]
        line.sort(key=lambda row: row["top_k"])
        look = {"color": COLOURS.get(bank, INK), "linestyle": style}
        look["label"] = f"bank of {bank} frames" + (f", {WORDS[blocks]}" if blocks in WORDS else "")
        if len(line) > 1 or blocks == "top":
            _draw_line(by_blocks, line, [row["top_k"] for row in line], look)
        timed = [row for row in line if _time_ratio(row, timings) is not None]
        if timed and (len(timed) > 1 or blocks == "top"):
            _draw_line(by_time, timed, [_time_ratio(row, timings) for row in timed], look)


def _draw_comparisons(by_blocks: Any, by_time: Any, rows: Measured, timings: Measured) -> None:
    """No memory and the whole history: lines across the blocks, points in time."""
    for name, words, marker in (("none", "no memory", "v"), ("full", "the whole history, dense", "^")):
        value = _percent(rows[name]["hue"]["value"]) if name in rows else math.nan
        if math.isnan(value):
            continue
        by_blocks.axhline(value, color=PALE, linewidth=0.9, linestyle=(0, (5, 3)))
        by_blocks.text(1, value + 1.2, words, fontsize=8, color=PALE)
        if (ratio := _time_ratio(rows[name], timings)) is not None:
            by_time.scatter(ratio, value, marker=marker, s=50, color=INK, label=words, zorder=3)


def _draw_line(panel: Any, line: Sequence[Mapping[str, Any]], x: Sequence[Any], look: Mapping[str, Any]) -> None:
    """A line through the rows' shares with their intervals."""
    value, low, high = ([_percent(row["hue"][name]) for row in line] for name in ("value", "low", "high"))
    spans = [
        [max(0.0, v - bound) for v, bound in zip(value, low, strict=True)],
        [max(0.0, bound - v) for v, bound in zip(value, high, strict=True)],
    ]
    panel.errorbar(x, value, yerr=spans, linewidth=1.6, marker="o", markersize=4.5, elinewidth=0.7, alpha=0.9, **look)


def _finish(panel: Any) -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8, frameon=False, loc="lower right")
    panel.set_ylim(0, 104)
    panel.tick_params(labelsize=8)
    plain_panel(panel)


def _time_ratio(row: Mapping[str, Any], timings: Measured) -> float | None:
    """The time of a chunk over that without memory; None where it has not been timed."""
    timing = timings.get(_setting(row).cost)
    return timing["ratio"] if timing else None


def _percent(share: float | None) -> float:
    """NaN, which is not drawn, where nothing was judged."""
    return math.nan if share is None else 100 * share


# ---------------------------------------------------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    _check_options(parser, given)
    about = {"command": "make where-memory-pays", **environment(torch.device("cpu")), **_identity(given)}
    with ExitStack() as stack:
        measured = _measured_before(parser, given, about, stack)
        model = load_checkpoint(TOY_WEIGHTS)
        tokens = model.tokens(TOY_SETTINGS.height, TOY_SETTINGS.width)
        blocks_per_frame = -(-tokens // TOY_SETTINGS.block_size)
        settings = settings_of(given.banks, given.top_k, blocks_per_frame, given.query_group or None)
        keep_freed_memory()
        try:
            _measure_and_write(measured, settings, _stream_settings(given), about, given.out)
        except KeyboardInterrupt:
            same = "the same command without --restart" if given.restart else "the same command"
            found = f"what was measured is in {given.out}, {same} continues"
            print(f"interrupted; {found if measured['rows'] else 'nothing has been measured yet'}", file=sys.stderr)
            raise SystemExit(130) from None
    print("\n".join(compared(measured["rows"])))
    for name, timing in measured["timings"].items():
        print(f"{name}: {timing['seconds']:.3f} s a chunk, {timing['ratio']:.2f} of none")
    print(f"written to {given.out} and {given.out.with_suffix('.png').name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stories", type=int, default=8, help="held-out stories of each length (8)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[24], help="of the stories, in prompts (24)")
    parser.add_argument("--banks", type=int, nargs="+", default=list(BANKS), help="frames retrieved (3 1 6 2)")
    parser.add_argument("--top-k", type=int, nargs="+", default=list(TOP_K), help="blocks (1 2 4 8 16); all are added")
    parser.add_argument(
        "--query-group",
        type=int,
        default=TOY_SETTINGS.query_group,
        help="queries that share a choice of blocks, 0 for the whole chunk (16)",
    )
    parser.add_argument("--seed", type=int, default=20_000, help="of stories and noise (20000)")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--restart", action="store_true", help="replace results of other stories or weights")
    return parser


def _fail(parser: argparse.ArgumentParser, words: object) -> NoReturn:
    """End with one line, where a line of usage would not help."""
    parser.exit(2, f"where_memory_pays: {words}\n")


def _check_options(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    for name in ("stories", "lengths", "banks", "top_k"):
        values = getattr(given, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {values}")
    if given.query_group < 0:
        parser.error(f"--query-group must be positive, or 0 for the whole chunk, got {given.query_group}")
    if given.seed < 10_000:
        parser.error(f"seeds below 10000 are for training, got {given.seed}")
    if not have_returns(given.stories, given.seed, given.lengths):
        _fail(
            parser,
            "nobody comes back in these stories, so there is nothing to judge; ask for longer --lengths, more "
            "--stories or another --seed",
        )


def _stream_settings(given: argparse.Namespace) -> StreamSettings:
    """What the settings of a memory change."""
    return replace(TOY_SETTINGS, query_group=given.query_group or None)


def _identity(given: argparse.Namespace) -> dict[str, Any]:
    """What results must have in common to stand in one file."""
    return {
        "stories": given.stories,
        "lengths": given.lengths,
        "seed": given.seed,
        "weights": {"name": TOY_WEIGHTS.name, "sha256": sha256(TOY_WEIGHTS)},
        "settings": asdict(_stream_settings(given)),
    }


def _measured_before(
    parser: argparse.ArgumentParser, given: argparse.Namespace, about: dict[str, Any], stack: ExitStack
) -> Measured:
    """What the file holds already. It is locked until the stack is closed.

    Ends the command where the file holds results of something else, cannot be written, or is being written.
    """
    measured: Measured = {"rows": {}, "timings": {}}
    try:
        check_target(given.out, ".json")
        check_target(given.out.with_suffix(".png"), ".png")
        stack.enter_context(locked(given.out, wait=False))
        if not given.restart:
            measured = load_measured(given.out)
    except ValueError as error:
        _fail(parser, error)
    changed = [name for name in _identity(given) if measured["rows"] and measured.get(name) != about[name]]
    if changed:
        parser.error(
            f"{given.out} has results with other {', '.join(changed)}: say --restart to replace them, or --out "
            f"another file"
        )
    return measured


def _measure_and_write(
    measured: Measured, settings: Sequence[Setting], stream: StreamSettings, about: dict[str, Any], out: Path
) -> None:
    """Measure what is missing, and write results and picture after each step."""
    console = Console(stderr=True)
    with Progress(console=console) as bar:
        for done in measure(measured, settings, stream, about, bar):
            write_json(out, without_nan({**measured, **about}))
            write_atomically(out.with_suffix(".png"), draw(measured["rows"], measured["timings"]))
            console.print(done)


if __name__ == "__main__":
    main()
