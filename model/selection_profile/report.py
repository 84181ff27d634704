"""A selection profile as a table, as JSON and in words."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from memflow_ops.model.selection_profile.figures import ChoiceFigures, Sampling, SelectionProfile
from memflow_ops.model.selection_profile.quality import SCORE_OF, Choice
from memflow_ops.model.selection_profile.rankings import compare_rankings

GOALS: dict[str, Callable[[ChoiceFigures], bool]] = {
    "80 % of the mass": lambda figures: figures.captured >= 0.8,
    "95 %": lambda figures: figures.captured >= 0.95,
    "error of 5 %": lambda figures: figures.error <= 0.05,
}
"""The goals whose cost the table states; a recommendation goes by the last one."""


def choices_of(figures: Sequence[ChoiceFigures]) -> list[Choice]:
    """The ways to choose that the figures belong to."""
    return list(dict.fromkeys(one.choice for one in figures))


def smallest_enough(
    figures: Sequence[ChoiceFigures], choice: Choice, goal: Callable[[ChoiceFigures], bool]
) -> ChoiceFigures:
    """A choice at the smallest budget that reaches a goal. All blocks together reach every goal."""
    return next(one for one in figures if one.choice == choice and goal(one))


def cheapest(figures: Sequence[ChoiceFigures], goal: Callable[[ChoiceFigures], bool]) -> ChoiceFigures:
    """The setting that reaches a goal in the least time; where nothing was timed, the one with the fewest keys."""
    reached = [smallest_enough(figures, choice, goal) for choice in choices_of(figures) if choice.blocks in SCORE_OF]
    return min(reached, key=lambda one: (one.ratio or 0.0, one.keys))


def describe_choice(choice: Choice, frame_tokens: int) -> str:
    """A choice in words."""
    blocks, size, group = choice
    what = "frames" if size == frame_tokens else f"blocks of {size}"
    if blocks == "random":
        return f"{what}, at random"
    who = {1: "per query", None: "per chunk"}.get(group, f"per {group} queries")
    released = ", as released" if size == frame_tokens and group is None and blocks in ("top", "oracle") else ""
    ranking = {"oracle": ", oracle", "moments": ", by moments", "normalised": ", normalised"}.get(blocks, "")
    return f"{what}, {who}{released}{ranking}"


def profile_table(figures: Sequence[ChoiceFigures], frame_tokens: int) -> str:
    """What every choice needs to reach each goal, and in brackets what the oracle needs; fixed-width text."""
    choices = choices_of(figures)
    lines = [["selection", *(word for goal in GOALS for word in (f"{goal}: top_k", "of bank (oracle)", "time"))]]
    for choice in choices:
        if choice.blocks == "oracle":
            continue
        line, oracle = [describe_choice(choice, frame_tokens)], choice._replace(blocks="oracle")
        for goal in GOALS.values():
            found = smallest_enough(figures, choice, goal)
            best = f" ({100 * smallest_enough(figures, oracle, goal).share:.0f})" if oracle in choices else ""
            time = "-" if found.ratio is None else f"{found.ratio:.2f} x"
            line += [str(found.top_k), f"{100 * found.share:.0f} %{best}", time]
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def profile_json(measured: SelectionProfile, about: dict[str, Any], sampling: Sampling, *, interrupted: bool) -> str:
    """The profile as JSON, its numbers rounded to six digits. about: what the results say of the stream."""
    settings = {(choice.block_size, choice.query_group) for choice in measured.sums if choice.blocks in SCORE_OF}
    order = sorted(settings, key=lambda setting: (setting[0], setting[1] or math.inf))
    compared = [row for setting in order for row in compare_rankings(measured, *setting)]
    results = {
        **about,
        "sampling": asdict(sampling),
        "interrupted": interrupted,
        "bank_frames_with_sink": measured.frames,
        "frame_tokens": measured.frame_tokens,
        "chunks_measured": measured.chunks,
        "calls_measured": measured.calls,
        "queries_times_heads_measured": measured.queries,
        "bank_mass": _rounded(measured.bank_mass),
        "rankings": [_rounded(asdict(row)) for row in compared],
        "rows": _rows(measured),
    }
    if measured.strips is not None:
        results["rows_in_strips"] = _rows(measured.strips)
    return json.dumps(results, indent=1, allow_nan=False) + "\n"


def _rows(measured: SelectionProfile) -> list[dict[str, Any]]:
    return [_rounded(asdict(one)) for one in measured.figures()]


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _rounded(value) for name, value in x.items()}
    return float(f"{x:.6g}") if isinstance(x, float) else x
