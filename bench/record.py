"""Result files: JSON named after the device, each with what its figures depend on."""

from __future__ import annotations

import copy
import json
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
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(target)


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
    raise ValueError(f"{target} is damaged: delete it, or restore it from git")


# ---------------------------------------------------------------------------------------------- the registry's results

REGISTRY: Mapping[str, Any] = {"rows": [], "history": [], "ceilings": {}}


def bench_file(folder: Path, about: Mapping[str, object]) -> Path:
    """Where the registry's results of a device are: one file, whose rows each say when they were measured."""
    return folder / f"bench-{slug(str(about['device']))}.json"


def keep(target: Path, rows: Sequence[Row], ceilings: Mapping[str, float], about: Mapping[str, object]) -> None:
    """Put rows in the place of those of the same cases, and their ratios behind the history of their commit."""
    kept = load(target, REGISTRY)
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


def compared(ours: Row, target: Path) -> Worse | None:
    """A case's row of ours beside the stored one. A ValueError for a case that has no stored result, or one with other
    settings or baseline: that is not to pass for "no worse"."""
    if not target.is_file():
        raise ValueError(f"nothing to compare with: {target} does not exist; run `make bench` first")
    case, baseline = ours["case"], ours["baseline"]
    stored = {row["case"]: row for row in load(target, REGISTRY)["rows"] if row["contender"] == "ours"}
    before = stored.get(case)
    if before is None:
        raise ValueError(f"{case} has no stored result in {target.name}: run `make bench` first")
    if before["settings"] != json.loads(json.dumps(ours["settings"])):
        raise ValueError(f"{case} was stored with other settings in {target.name}: run `make bench` again")
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
