"""`memflow generate --ray` with actors that are killed in the middle of a write, at the points that a file names.

The folder $KILLS has a file for each stream: JSON, a list of [point, count], in the order in which an actor dies of
them, at the count-th time that it comes to that point. What has been died of is noted beside it.
"""

import importlib
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import memflow_ops.model.stories.fragments as fragments
from memflow_ops.cli import main as memflow_main
from memflow_ops.cli.generate import RayWork

POINTS = {
    "record": 5,
    "manifest": 5,
    "fragment": 5,
    "snapshot": 3,
    "run.json": 1,
    "video": 1,
    "finished": 1,
    "deleted": 1,
}
"""Half of a frame is in the history, or of its line in the manifest, or of a chunk in the video; a snapshot, the files
of a story, or the note that it is finished, are written under another name; or it is finished, and what it no longer
needs is still there. In the order of a run, each with how often it comes there at least, before a snapshot or after."""


def schedule(streams: int, seed: int) -> list[list[tuple[str, int]]]:
    """Two points for every stream, so that all are among them."""
    chance, points = random.Random(seed), list(POINTS)
    order = chance.sample(points, len(points)) + [chance.choice(points[:4]) for _ in range(2 * streams - len(points))]
    chosen = [sorted(order[i::streams], key=points.index) for i in range(streams)]
    return [[(point, chance.randint(1, POINTS[point])) for point in of] for of in chosen]


class KilledWork(RayWork):
    def load(self, sharing):
        _die_in_writes()
        return super().load(sharing)


def _die_in_writes() -> None:
    counts: Counter = Counter()
    replace, unlink, write, pwrite = os.replace, os.unlink, os.write, os.pwrite

    def dies(point: str, path: str) -> bool:
        stream = next((part for part in Path(path).parts if part.startswith("story-")), None)
        if stream is None:
            return False
        kills = Path(os.environ["KILLS"])
        planned = json.loads((kills / stream).read_text())
        done = len(list(kills.glob(f"{stream} died *")))
        counts[stream, point] += 1
        if done == len(planned) or planned[done][0] != point or planned[done][1] > counts[stream, point]:
            return False
        (kills / f"{stream} died {done}").touch()
        return True

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_replace(source, target, **more):
        path, history = Path(target), Path(target).parent.parent.name == "history"
        point = {"snapshot.safetensors": "snapshot", "video.mp4": "video"}.get(path.name)
        if path.name == "run.json":
            point = (
                "run.json" if not history else "finished" if '"finished": true' in Path(source).read_text() else None
            )
        if point and dies(point, str(path)):
            die()
        replace(source, target, **more)

    def killed_unlink(path, **more):
        if Path(path).name == "snapshot.safetensors" and Path(path).exists() and dies("deleted", str(path)):
            die()
        unlink(path, **more)

    def killed_pwrite(number, content, place):
        if _path(number).endswith(".bin") and dies("record", _path(number)):
            pwrite(number, content[: len(content) // 2], place)
            die()
        return pwrite(number, content, place)

    def killed_write(number, content):
        if _path(number).endswith(".jsonl") and dies("manifest", _path(number)):
            write(number, content[: len(content) // 2])
            die()
        return write(number, content)

    class Growing:
        """A video that grows."""

        def __init__(self, file):
            self.file = file

        def write(self, content):
            if dies("fragment", self.file.name):
                self.file.write(content[: len(content) // 2])
                die()
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    os.replace, os.unlink, os.write, os.pwrite = killed_replace, killed_unlink, killed_write, killed_pwrite
    fragments.open = lambda path, mode, **more: Growing(open(path, mode, **more))  # noqa: SIM115


def _path(number: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def main() -> None:
    importlib.import_module("memflow_ops.cli.generate").RayWork = KilledWork
    memflow_main()
