"""Result files: JSON named after the device, in which every row says what its figures depend on."""

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
from memflow_ops.files import locked, write_atomically

WORSE = 1.10
"""`make bench-compare` fails where a ratio is more than this many times the stored one."""

ResultRow = Mapping[str, Any]
"""What one contender of one case took, as the result files hold it."""


def device_slug(name: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_json(target: Path, result: object) -> None:
    """Write a result file whole or not at all."""
    write_atomically(target, (json.dumps(result, indent=1) + "\n").encode())


def load(target: Path, empty: Mapping[str, Any]) -> dict[str, Any]:
    """Read a result file.

    empty: what a file without results would hold. It is returned where there is no file, and the types of its entries
    are those that the file's entries must have. Raises ValueError where the file is damaged or has no rows.
    """
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
    """The error that names a damaged file and what to do about it."""
    return ValueError(f"{target} is damaged: delete it, or restore it from git")


def record(folder: Path, device: torch.device, section: str, result: object) -> Path:
    """Put `result` under `section` of `<device>-<date>.json`, whose other sections stay, and return that file.

    A damaged file is moved to `*.damaged`, so that what has just been measured is not lost because of it.
    """
    about = environment(device)
    target = folder / f"{device_slug(str(about['device']))}-{about['date']}.json"
    with locked(target):
        kept: dict[str, object] = {}
        try:
            kept |= json.loads(target.read_text()) if target.is_file() else {}
        except (ValueError, TypeError):
            target.replace(target.with_suffix(".damaged"))
        write_json(target, {**kept, **about, "triton": version("triton"), section: result})
    return target


# ---------------------------------------------------------------------------------------------- the registry's results

_EMPTY: Mapping[str, Any] = {"rows": [], "history": [], "ceilings": {}}

# The entries that every row, and every entry of the history, must have, and their types.
_SPREAD = {name: (int, float) for name in ("p20", "p50", "p80")}
_ROW = {
    **dict.fromkeys(("case", "level", "size", "dtype", "contender", "baseline", "torch", "date"), str),
    **dict.fromkeys(("seconds", "over_baseline", "ours_over_this"), _SPREAD),
    "commit": (str, type(None)),
    "rounds": int,
    "settings": dict,
}
_ENTRY = {"commit": (str, type(None)), "date": str, "ratios": dict}


def bench_file(folder: Path, about: Mapping[str, object]) -> Path:
    """The file of a device's registry results. There is one for all days: each row says when it was measured."""
    return folder / f"bench-{device_slug(str(about['device']))}.json"


def load_bench(target: Path) -> dict[str, Any]:
    """Read the registry's results, or none where there is no file.

    Raises ValueError where the file is damaged, which includes a row that lacks something that is read of it.
    """
    found = load(target, _EMPTY)
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


def _has(found: object, types: Mapping[str, Any]) -> bool:
    """Whether `found` is an object with entries of these types; a mapping of types describes an object in turn."""
    return isinstance(found, dict) and all(
        name in found and (_has(found[name], of) if isinstance(of, dict) else isinstance(found[name], of))
        for name, of in types.items()
    )


def keep(
    target: Path,
    rows: Sequence[ResultRow],
    ceilings: Mapping[str, float],
    about: Mapping[str, object],
    some: bool = False,
) -> None:
    """Replace the rows of the same cases in a file, and add their ratios to the history of the commit in `about`.

    some: not all of the contenders were timed; the rows of the others stay, and say when they were.

    Two processes that keep results in one file wait for each other, so that neither loses the other's rows.
    """
    with locked(target):
        kept = load_bench(target)
        cases, timed = {row["case"] for row in rows}, {(row["case"], row["contender"]) for row in rows}
        others = [row for row in kept["rows"] if row["case"] not in cases]
        same = [row for row in kept["rows"] if row["case"] in cases] if some else []
        stay = [row for row in same if (row["case"], row["contender"]) not in timed]
        history = list(kept["history"])
        if not history or history[-1]["commit"] != about["commit"]:
            history.append({"commit": about["commit"], "date": about["date"], "ratios": {}})
        history[-1]["ratios"] |= {row["case"]: row["over_baseline"] for row in rows if row["contender"] == "ours"}
        result = {
            "device": about["device"],
            "ceilings": {**kept["ceilings"], **ceilings},
            "rows": [*others, *rows, *stay],
            "history": history,
        }
        write_json(target, result)


@dataclass(frozen=True)
class Worse:
    """A case in which ours takes more than `WORSE` times the stored ratio over the baseline."""

    words: str
    in_doubt: bool
    """Whether the spreads of the two ratios overlap, or one of them was measured in one round and has no spread."""


def comparable(target: Path, settings: Mapping[str, Mapping[str, object]]) -> dict[str, ResultRow]:
    """The stored rows of ours, by case.

    settings: those of each case that is going to be compared, by the case's name. Raises ValueError where a case has no
    stored result or was stored with other settings, because neither may pass for "no worse".
    """
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


def compared(ours: ResultRow, target: Path) -> Worse | None:
    """Compare a case's row of ours with the stored one; None where it is no worse.

    Raises ValueError as `comparable` does, and where the two ratios are over different baselines.
    """
    case, baseline = ours["case"], ours["baseline"]
    before = comparable(target, {case: ours["settings"]})[case]
    if before["baseline"] != baseline:
        raise ValueError(f"{case} was stored over {before['baseline']}, this is over {baseline}")
    old, new = before["over_baseline"], ours["over_baseline"]
    if new["p50"] <= WORSE * old["p50"]:
        return None
    in_doubt = new["p20"] <= old["p80"] or 1 in (before["rounds"], ours["rounds"])
    return Worse(
        f"{case}: ours takes {new['p50']:.3f} times {baseline} ({new['p20']:.3f} to {new['p80']:.3f}), stored "
        f"{old['p50']:.3f} ({old['p20']:.3f} to {old['p80']:.3f}) of {before['date']}, commit {before['commit']}: "
        f"{100 * (new['p50'] / old['p50'] - 1):+.0f} %{' (within the spread)' if in_doubt else ''}",
        in_doubt,
    )
