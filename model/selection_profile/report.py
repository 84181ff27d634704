"""A selection profile as a table, as JSON and in words."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, cast

from memflow_ops.model.selection_profile.figures import ChoiceFigures, Sampling, SelectionProfile
from memflow_ops.model.selection_profile.quality import Choice, Ranking

GOALS: dict[str, Callable[[ChoiceFigures], bool]] = {
    "80 % of the mass": lambda row: row.captured >= 0.8,
    "95 %": lambda row: row.captured >= 0.95,
    "error of 5 %": lambda row: row.error <= 0.05,
}


# ---------------------------------------------------------------------------------------------------------------- words


def choices_of(rows: Sequence[ChoiceFigures]) -> list[Choice]:
    """The ways to choose that the rows are of."""
    return list(dict.fromkeys(_choice(row) for row in rows))


def _choice(row: ChoiceFigures) -> Choice:
    return Choice(cast(Ranking, row.blocks), row.block_size, row.query_group)


def smallest_enough(
    rows: Sequence[ChoiceFigures], choice: Choice, goal: Callable[[ChoiceFigures], bool]
) -> ChoiceFigures:
    """A choice at the smallest budget that reaches a goal; all blocks reach every one."""
    return next(row for row in rows if _choice(row) == choice and goal(row))


def describe_choice(choice: Choice, frame_tokens: int) -> str:
    """A choice in words."""
    blocks, size, group = choice
    what = "frames" if size == frame_tokens else f"blocks of {size}"
    if blocks == "random":
        return f"{what}, at random"
    who = {1: "per query", None: "per chunk"}.get(group, f"per {group} queries")
    released = ", as released" if size == frame_tokens and group is None else ""
    return f"{what}, {who}{released}" + (", oracle" if blocks == "oracle" else "")


def profile_table(rows: Sequence[ChoiceFigures], frame_tokens: int) -> str:
    """What every choice needs to reach each goal, and in brackets what the oracle would; fixed-width text."""
    found = choices_of(rows)
    cells = [["selection", *(word for goal in GOALS for word in (f"{goal}: top_k", "of bank (oracle)", "time"))]]
    for choice in found:
        if choice.blocks == "oracle":
            continue
        line, oracle = [describe_choice(choice, frame_tokens)], choice._replace(blocks="oracle")
        for goal in GOALS.values():
            row = smallest_enough(rows, choice, goal)
            best = f" ({100 * smallest_enough(rows, oracle, goal).share:.0f})" if oracle in found else ""
            line += [
                str(row.top_k),
                f"{100 * row.share:.0f} %{best}",
                "-" if row.ratio is None else f"{row.ratio:.2f} x",
            ]
        cells.append(line)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in cells]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def cheapest(rows: Sequence[ChoiceFigures], goal: Callable[[ChoiceFigures], bool]) -> ChoiceFigures:
    """The setting that reaches a goal in the least time; where nothing was timed, with the fewest keys."""
    reached = [smallest_enough(rows, choice, goal) for choice in choices_of(rows) if choice.blocks == "top"]
    return min(reached, key=lambda row: (row.ratio or 0.0, row.keys))


def profile_json(measured: SelectionProfile, about: dict[str, Any], sampling: Sampling, *, interrupted: bool) -> str:
    """As JSON."""
    said = {
        **about,
        "sampling": asdict(sampling),
        "interrupted": interrupted,
        "bank_frames_with_sink": measured.frames,
        "frame_tokens": measured.frame_tokens,
        "chunks_measured": measured.chunks,
        "calls_measured": measured.calls,
        "queries_times_heads_measured": measured.queries,
        "bank_mass": _rounded(measured.bank_mass),
        "rows": [{name: _rounded(x) for name, x in asdict(row).items()} for row in measured.figures()],
    }
    return json.dumps(said, indent=1, allow_nan=False) + "\n"


def _rounded(x: Any) -> Any:
    """To six digits."""
    return float(f"{x:.6g}") if isinstance(x, float) else x
