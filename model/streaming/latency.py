"""How soon and how steadily a stream's video comes: time to the first frame, chunks, and deadlines of playing it."""

import math
from collections.abc import Sequence

HOW_MEASURED = (
    "Seconds. time_to_first_frame: from the start of the stream until the first chunk's video can be shown. chunk: the "
    "work for one chunk, which is retrieval, re-caching and all passes of the transformer, and decoding and encoding "
    "where they are done; nearest-rank percentiles over all chunks but the first. real_time_factor: the seconds of "
    "video that those chunks show, over the seconds of work; 1 or more keeps up. Deadlines: a player starts with the "
    "first chunk and shows every frame for its time. A chunk that is not there when the last frame before it is over "
    "has missed its deadline; the player waits (stalled_seconds in all), and later deadlines move on by as much."
)


class Latency:
    """The latency of one stream, chunk by chunk."""

    def __init__(self, started: float = 0.0):
        """started: when the stream was asked for, in seconds of any clock; the arrivals are of the same one."""
        self.started = started
        self.first: float | None = None
        """Seconds until the first chunk's video could be shown; None before."""
        self.work: list[float] = []
        """Seconds of work, per chunk."""
        self.video: list[float] = []
        """Seconds of video, per chunk."""
        self.missed, self.stalled = 0, 0.0
        self._due = started

    def add(self, work: float, video: float, at: float | None = None, cut: bool = False) -> None:
        """A chunk is finished.

        work: the seconds it took. video: the seconds that its frames are shown for. at: when it could be shown; None
        where the stream does nothing but work, so that it is when all work so far was done. cut: it is shown at once,
        in place of what the player has not shown yet.
        """
        arrived = self.started + sum(self.work) + work if at is None else at
        if self.first is None:
            self.first = arrived - self.started
            self._due = arrived
        elif arrived > self._due:
            self.missed += 1
            self.stalled += arrived - self._due
            self._due = arrived
        elif cut:
            self._due = arrived
        self._due += video
        self.work.append(work)
        self.video.append(video)

    def ahead(self, now: float) -> float:
        """Seconds of video that a player has not shown yet; negative while it waits. 0 before the first chunk."""
        return 0.0 if self.first is None else self._due - now

    def hold(self, seconds: float) -> None:
        """The player was stopped for so long, and all deadlines move on."""
        self._due += seconds

    def record(self) -> dict[str, object] | None:
        """The figures for a results file; None before the first chunk."""
        if self.first is None:
            return None
        steady = slice(1 if len(self.work) > 1 else 0, None)
        work, video = sorted(self.work[steady]), sum(self.video[steady])
        return {
            "time_to_first_frame": self.first,
            "chunk_p50": percentile(work, 0.5),
            "chunk_p95": percentile(work, 0.95),
            "real_time_factor": video / max(sum(work), 1e-9),
            "missed_deadlines": self.missed,
            "stalled_seconds": self.stalled,
            "chunks": len(self.work),
            "how": HOW_MEASURED,
        }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The nearest-rank percentile of ascending values: the smallest that this share of them does not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
