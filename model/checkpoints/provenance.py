"""What the names of files and folders tell about a checkpoint that its weights do not."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_MEMFLOW = re.compile(r"memflow(?![-_ ]?ops)")
_LONGLIVE = re.compile(r"longlive")
_OTHERS = re.compile(r"wan[-_ ]?2|self[-_ ]?forcing|causvid")
_CONTAINERS = frozenset(("checkpoints", "checkpoint", "ckpts", "ckpt", "weights", "models", "snapshots", "blobs"))
"""Names of folders that say nothing about what is in them, so that the folder above is asked too."""


def tuned_for(path: Path) -> str:
    """The kind of memory that the weights at this path were tuned for, judged by its name: "released" for MemFlow."""
    return "released" if _project(path) == "MemFlow" else "memflow"


def prefers_ema(path: Path) -> bool:
    """Whether averaged weights are to be taken where a file holds both, judged by its name: the inference
    configurations of LongLive and MemFlow take those of the last step (`use_ema: false`)."""
    return not _project(path)


def _project(path: Path) -> str:
    """The project that the names around a checkpoint speak of: "MemFlow", "LongLive" or "". The path is asked as it is
    given and as it is with all links followed; on each the name nearest to the file decides."""
    for way in (os.path.abspath(path), os.path.realpath(path)):
        for name in _names(Path(way)):
            if _OTHERS.search(name):
                break
            if _MEMFLOW.search(name):
                return "MemFlow"
            if _LONGLIVE.search(name):
                return "LongLive"
    return ""


def _names(path: Path) -> Iterator[str]:
    """The names that may speak of a checkpoint, from the file's own upwards, in lower case."""
    yield (path.name if path.is_dir() else path.stem).lower()
    for folder in path.parents:
        yield folder.name.lower()
        if folder.name.lower() not in _CONTAINERS and folder.parent.name != "snapshots":
            return
