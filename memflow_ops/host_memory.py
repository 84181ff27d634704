"""How much memory the host can still give this process (Linux)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory that is available, within the limits of the process's control group and of all groups above it.

    root: the folder in which proc/ lies, and in which the control groups are mounted.
    """
    lines = (root / "proc" / "meminfo").read_text().splitlines()
    about = dict(line.split(":", 1) for line in lines if ":" in line)
    free = int(about["MemAvailable"].split()[0]) * 1024
    return max(0, min([free, *_left_in_groups(root)]))


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the process's own memory group, and each group above it up to the mount, has left below its limits.

    A process has one group in version 2, whose line has no controllers, or one for each controller in version 1.
    """
    try:
        own = [line.split(":", 2) for line in (root / "proc" / "self" / "cgroup").read_text().splitlines()]
        mounts = (root / "proc" / "self" / "mountinfo").read_text().splitlines()
    except OSError:
        return
    for mount in mounts:
        # Its fields: id, parent, device, root, mount point, options, more options, "-", type, source, super options.
        fields, _, about = mount.partition(" - ")
        kind, *_, options = about.split(" ")
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        inside, point = (_unescaped(field) for field in fields.split(" ")[3:5])
        top = root / point.lstrip("/")
        for _, controllers, path in own:
            if controllers == "" if kind == "cgroup2" else "memory" in controllers.split(","):
                for group in _up_to(top, path, inside):
                    yield from _left(group)


def _up_to(top: Path, path: str, inside: str) -> Iterator[Path]:
    """The folders of a group and of those above it, up to the mount.

    path: of the group. inside: the group that is mounted at `top`; in a container it may be the process's own, and the
    names of the path are then not to be seen below it.
    """
    words = [word for word in path.split("/") if word]
    mounted = [word for word in inside.split("/") if word]
    below = words[len(mounted) :] if words[: len(mounted)] == mounted and ".." not in words else []
    group = top.joinpath(*below)
    while True:
        yield group
        if group == top:
            return
        group = group.parent


def _left(group: Path) -> Iterator[int]:
    """What a group has left below each of its limits; pages of files that it can give back do not count as used."""
    for limits, usage, cache in (
        (("memory.max", "memory.high"), "memory.current", "inactive_file"),
        (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    ):
        used = _number(group / usage)
        if used is None:
            continue  # not a group of this version
        used -= _number(group / "memory.stat", cache) or 0
        for name in limits:
            limit = _number(group / name)
            if limit is not None:
                yield limit - used


def _number(path: Path, name: str | None = None) -> int | None:
    """The number in a file, or in its line that begins with a name; None for "max", and where there is none."""
    try:
        text = path.read_text()
        return int(text if name is None else dict(line.split() for line in text.splitlines())[name])
    except (OSError, ValueError, KeyError):
        return None


def _unescaped(field: str) -> str:
    """A field of mountinfo, in which white space and backslashes are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)
