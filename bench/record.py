"""Result files: JSON named after the device, each with what its figures depend on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from memflow_ops.environment import environment, version


def result_file(folder: Path, device: torch.device) -> Path:
    """`<device>-<date>.json`, of what is measured on GPUs."""
    about = environment(device)
    return folder / f"{slug(str(about['device']))}-{about['date']}.json"


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def record(folder: Path, device: torch.device, section: str, result: object) -> Path:
    """Put `result` under `section` of the device's file of today, whose other sections stay."""
    target = result_file(folder, device)
    kept = json.loads(target.read_text()) if target.is_file() else {}
    write(target, {**kept, **environment(device), "triton": version("triton"), section: result})
    return target


def write(target: Path, result: object) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(target)
