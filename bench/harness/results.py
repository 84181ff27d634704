"""Result files: JSON named after the device, each with what its figures depend on."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memflow_ops.environment import environment, version

WORSE = 1.10
"""A ratio that is more than this many times the stored one fails `make bench-compare`."""

Row = Mapping[str, Any]


def result_file(folder: Path, device: torch.device) -> Path:
    """`<device>-<date>.json`, of what is measured on GPUs."""
    about = environment(device)
    return folder / f"{slug(str(about['device']))}-{about['date']}.json"


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def record(folder: Path, device: torch.device, section: str, result: object) -> Path:
    """Put `result` under `section` of the device's file of today, whose other sections stay. A damaged file goes to
    `*.damaged`: what has just been measured is not lost for it."""
    target = result_file(folder, device)
    kept: dict[str, object] = {}
    try:
        kept |= json.loads(target.read_text()) if target.is_file() else {}
    except (ValueError, TypeError):
        target.replace(target.with_suffix(".damaged"))
    write(target, {**kept, **environment(device), "triton": version("triton"), section: result})
    return target


def write(target: Path, result: object) -> None:
    write_text(target, json.dumps(result, indent=1) + "\n")


def write_text(target: Path, words: str) -> None:
    """Whole or not at all. The temporary name is this process's own; imports nothing that a machine that only measures
    kernels may lack."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(words, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def load(target: Path, empty: Mapping[str, Any]) -> dict[str, Any]:
    """The results in a file; `empty` where there is no file, a ValueError where it is damaged: no rows, or nothing of
    the kind of an entry of `empty`."""
    if not target.exists():
        return dict(copy.deepcopy(empty))
    try:
        found = json.loads(target.read_text())
        if found["rows"] and all(isinstance(found[name], type(value)) for name, value in empty.items()):
            return dict(found)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    raise damaged(target)


def damaged(target: Path) -> ValueError:
    return ValueError(f"{target} is damaged: delete it, or restore it from git")


# ---------------------------------------------------------------------------------------------- the registry's results

REGISTRY: Mapping[str, Any] = {"rows": [], "history": [], "ceilings": {}}


def bench_file(folder: Path, about: Mapping[str, object]) -> Path:
    """Where the registry's results of a device are: one file, whose rows each say when they were measured."""
    return folder / f"bench-{slug(str(about['device']))}.json"


_SPREAD = {name: (int, float) for name in ("p20", "p50", "p80")}
_ROW = {
    **dict.fromkeys(("case", "level", "size", "dtype", "contender", "baseline", "torch", "date"), str),
    **dict.fromkeys(("seconds", "over_baseline", "ours_over_this"), _SPREAD),
    "commit": (str, type(None)), "rounds": int, "settings": dict,
}  # fmt: skip
_ENTRY = {"commit": (str, type(None)), "date": str, "ratios": dict}


def load_bench(target: Path) -> dict[str, Any]:
    """The registry's results in a file, or none; a ValueError where it is damaged, down to what is read of each row."""
    found = load(target, REGISTRY)
    ratios = [ratio for entry in found["history"] if _has(entry, _ENTRY) for ratio in entry["ratios"].values()]
    whole = (
        all(_has(row, _ROW) for row in found["rows"])
        and all(_has(entry, _ENTRY) for entry in found["history"])
        and all(_has(ratio, _SPREAD) for ratio in ratios)
        and all(isinstance(value, (int, float)) for value in found["ceilings"].values())
    )
    if not whole:
        raise damaged(target)
    return found


def _has(found: object, kinds: Mapping[str, Any]) -> bool:
    """found is an object with entries of these kinds; a kind that is a mapping is an object's in turn."""
    return isinstance(found, dict) and all(
        name in found and (_has(found[name], kind) if isinstance(kind, dict) else isinstance(found[name], kind))
        for name, kind in kinds.items()
    )


def keep(target: Path, rows: Sequence[Row], ceilings: Mapping[str, float], about: Mapping[str, object]) -> None:
    """Put rows in the place of those of the same cases, and their ratios behind the history of their commit."""
    kept = load_bench(target)
    cases = {row["case"] for row in rows}
    history = list(kept["history"])
    if not history or history[-1]["commit"] != about["commit"]:
        history.append({"commit": about["commit"], "date": about["date"], "ratios": {}})
    history[-1]["ratios"] |= {row["case"]: row["over_baseline"] for row in rows if row["contender"] == "ours"}
    write(
        target,
        {
            "device": about["device"],
            "ceilings": {**kept["ceilings"], **ceilings},
            "rows": [*(row for row in kept["rows"] if row["case"] not in cases), *rows],
            "history": history,
        },
    )


@dataclass(frozen=True)
class Worse:
    """A case in which ours takes more than `WORSE` times the stored ratio over the baseline."""

    words: str
    in_doubt: bool
    """The spreads of the two ratios overlap, or one has none."""


def comparable(target: Path, settings: Mapping[str, Mapping[str, object]]) -> dict[str, Row]:
    """The stored rows of ours by case. settings: by case, of those that are to be compared. A ValueError for one that
    has no stored result, or one with other settings: that is not to pass for "no worse"."""
    if not target.is_file():
        raise ValueError(f"nothing to compare with: {target} does not exist; run `make bench` first")
    stored = {row["case"]: row for row in load_bench(target)["rows"] if row["contender"] == "ours"}
    missing = [case for case in settings if case not in stored]
    if missing:
        raise ValueError(f"no stored result in {target.name}, run `make bench` first: {', '.join(missing)}")
    wanted = json.loads(json.dumps(settings))
    other = [case for case in settings if stored[case]["settings"] != wanted[case]]
    if other:
        raise ValueError(f"stored with other settings in {target.name}, run `make bench` again: {', '.join(other)}")
    return stored


def compared(ours: Row, target: Path) -> Worse | None:
    """A case's row of ours beside the stored one. A ValueError as of `comparable`, or for another baseline."""
    case, baseline = ours["case"], ours["baseline"]
    before = comparable(target, {case: ours["settings"]})[case]
    if before["baseline"] != baseline:
        raise ValueError(f"{case} was stored over {before['baseline']}, this is over {baseline}")
    old, new = before["over_baseline"], ours["over_baseline"]
    if new["p50"] <= WORSE * old["p50"]:
        return None
    in_doubt = new["p20"] <= old["p80"] or 1 in (before["rounds"], ours["rounds"])  # one round has no spread
    return Worse(
        f"{case}: ours takes {new['p50']:.3f} times {baseline} ({new['p20']:.3f} to {new['p80']:.3f}), stored "
        f"{old['p50']:.3f} ({old['p20']:.3f} to {old['p80']:.3f}) of {before['date']}, commit {before['commit']}: "
        f"{100 * (new['p50'] / old['p50'] - 1):+.0f} %{' (within the spread)' if in_doubt else ''}",
        in_doubt,
    )
