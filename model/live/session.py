"""One live session: two streams from the same noise, with memory and without it, and what has been made of them."""

import base64
import json
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from memflow_ops.model.live.fragments import FragmentEncoder, png
from memflow_ops.model.live.viewer import Viewer
from memflow_ops.model.live.world import Decoder, LiveWorld
from memflow_ops.model.streaming.latency import Latency
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer

AHEAD_SECONDS = 1.5
"""Video that is made before it is shown, at most. A new prompt would cut off the rest."""
ROWS_AT_ONCE = 60
"""Chunks that a page is told of when it opens a session that is there."""
FIRST_SECONDS = 60.0
"""For which a session that nobody has watched yet is kept at least, such as a fork whose page is still to be opened."""
PICTURE_WIDTH = 104
"""Pixels that the pictures of past frames are wide at most."""


@dataclass(frozen=True)
class Limits:
    """What a server bears. Everything is bounded, so that no page can take what the others need."""

    sessions: int = 4
    viewers: int = 8
    """Of one session."""
    chunks: int = 960
    """Of one session; then it ends, and can be started again."""
    keep_seconds: float = 60.0
    """How long a session is kept for a page that has gone away."""
    waiting_chunks: int = 4
    """That wait for a slow viewer; see `Viewer`."""


@dataclass
class _Side:
    """One of the two streams."""

    streamer: Streamer
    decoder: Decoder


class LiveSession:
    """`make_chunk` and `fork` belong to the thread that works; everything else may be called from any thread.

    A prompt takes effect with the next chunk. Chunks under the old one that have not been sent are dropped; they remain
    part of the video and of what is remembered, because later chunks were made from them.
    """

    def __init__(self, world: LiveWorld, limits: Limits, prompt: str, seed: int, baseline: bool):
        """prompt: of the first chunk, checked. baseline: whether there is a stream without memory beside the other."""
        self.world, self.limits = world, limits
        self.name = secrets.token_urlsafe(16)
        """What a page needs to know to watch and steer it."""
        self.prompt, self.seed, self.paused = prompt, seed, False
        self.ended = ""
        """Why nothing more is made, in words; empty while it goes on."""
        self.kinds = [world.settings.memory, *(["none"] if baseline and world.settings.memory != "none" else [])]
        """The kinds of memory of the streams, from left to right."""
        self.encoder = FragmentEncoder(world.height, world.width * len(self.kinds), world.fps)
        self.rows: list[dict[str, Any]] = []
        """What run.json of a generated video says of its chunks, and more."""
        self.generation = 0
        """How often the session was started."""
        self.dropped = 0
        """Chunks that viewers who are gone have never been sent."""
        self.latency = Latency(time.monotonic())
        self._lock = threading.RLock()
        self._viewers: set[Viewer] = set()
        self._watched = False
        self._idle_since: float | None = time.monotonic()
        self._paused_since: float | None = None
        self._fresh, self._making = True, False
        self._sides: list[_Side] = []
        self._pictures: dict[int, bytes] = {}
        self._recording = _new_recording()
        self._ends: list[int] = []  # of the fragments in the recording, in bytes
        self._frames = 0

    # ----------------------------------------------------------------------------------------------- from any thread

    def attach(self, viewer: Viewer) -> None:
        """A viewer comes. It is told where the session stands and gets the newest chunk at once. A ValueError where
        there are too many, or the session is over."""
        with self._lock:
            if self._recording.closed:
                raise ValueError("that session is over; a new one can be opened")
            if len(self._viewers) >= self.limits.viewers:
                raise ValueError(f"{self.limits.viewers} viewers watch this session already, and it takes no more")
            self._keep_time(stopped=True)
            self._viewers.add(viewer)
            self._watched, self._idle_since = True, None
            self._keep_time(stopped=self.paused)
            viewer.offer(self._about())
            if self.rows and not self._fresh:
                start = self._ends[-2] if len(self._ends) > 1 else 0
                newest = os.pread(self._recording.fileno(), self._ends[-1] - start, start)
                viewer.offer(_packed(self._told(self.rows[-1]), newest), chunk=True)

    def detach(self, viewer: Viewer) -> None:
        """A viewer has gone away."""
        with self._lock:
            if viewer in self._viewers:
                self._viewers.remove(viewer)
                self.dropped += viewer.dropped
                if not self._viewers:
                    self._idle_since = time.monotonic()
                    self._keep_time(stopped=True)

    def say(self, **words: Any) -> None:
        """Tells every viewer."""
        with self._lock:
            for viewer in self._viewers:
                viewer.offer(json.dumps(words))

    def set_prompt(self, prompt: str) -> None:
        """The prompt, checked, of the next chunk and those after it."""
        with self._lock:
            if prompt != self.prompt:
                self.prompt = prompt
                for viewer in self._viewers:
                    viewer.drop_chunks()
            if self.ended:
                self.say(type="ended", why=self.ended)
            else:
                self.say(type="prompt", prompt=prompt, takes_effect=len(self.rows) + self._making)

    def restart(self, seed: int | None = None) -> None:
        """Starts again from nothing, under the current prompt. seed: of the noise; None for the same."""
        with self._lock:
            if self._recording.closed:
                return
            self.seed = self.seed if seed is None else seed
            self.ended, self._fresh, self._making, self.paused = "", True, False, False
            self.generation += 1
            self.latency = Latency(time.monotonic())
            self._paused_since = None
            self.rows, self._ends, self._pictures, self._frames = [], [], {}, 0
            self._recording.close()  # who is saving the old video reads it to its end
            self._recording = _new_recording()
            for viewer in self._viewers:
                viewer.drop_chunks()
                viewer.offer(self._about())

    def pause(self, paused: bool) -> None:
        with self._lock:
            self.paused = paused
            self._keep_time(stopped=paused)
            self.say(type="paused", paused=paused)

    def end(self, why: str) -> None:
        """Makes no further chunk. Viewers are told why, and may start it again."""
        with self._lock:
            self.ended, self._making = why, False
            self.say(type="ended", why=why)

    def close(self) -> None:
        """Frees everything. The viewers are disconnected."""
        with self._lock:
            self.ended = self.ended or "this session is closed"
            for viewer in self._viewers:
                viewer.close()
            self._viewers.clear()
            for side in self._sides:
                side.streamer.close()
            self._sides, self.rows, self._pictures = [], [], {}
            self._recording.close()

    @property
    def viewers(self) -> int:
        return len(self._viewers)

    def wants_chunk(self, now: float) -> bool:
        """Whether the next chunk should be made now. now: of `time.monotonic`."""
        with self._lock:
            wanted = bool(self._viewers) and not self.paused and not self.ended
            switched = not self.rows or self.rows[-1]["prompt"] != self.prompt
            return wanted and (switched or self.latency.ahead(now) < AHEAD_SECONDS)

    def over(self, now: float) -> bool:
        """Whether its last viewer has been gone for too long."""
        with self._lock:
            keep = self.limits.keep_seconds if self._watched else max(self.limits.keep_seconds, FIRST_SECONDS)
            return self._idle_since is not None and now - self._idle_since > keep

    def metrics(self) -> dict[str, Any]:
        """Its figures for /metrics.json. It is not named, because who knows the name can steer it."""
        with self._lock:
            return {
                "chunks": len(self.rows),
                "viewers": len(self._viewers),
                "dropped_chunks": self.dropped + sum(viewer.dropped for viewer in self._viewers),
                "paused": self.paused,
                "ended": self.ended,
                "latency": self.latency.record(),
            }

    def timeline(self) -> dict[str, Any]:
        """What was made and what it remembered, as run.json of a generated video says it."""
        with self._lock:
            return {
                **self.world.record,
                "seed": self.seed,
                "settings": asdict(self.world.settings),
                "side_by_side": self.kinds,
                "fps": self.world.fps,
                "latency": self.latency.record(),
                "chunks": list(self.rows),
            }

    def picture(self, frame: int) -> bytes | None:
        """A past latent frame that may be remembered, as PNG; None for any other."""
        with self._lock:
            return self._pictures.get(frame)

    def video(self) -> Iterator[bytes]:
        """The whole video so far as a fragmented MP4 file, piece by piece."""
        with self._lock:
            return iter(()) if self._recording.closed else chain([self.encoder.start], self._fragments())

    # --------------------------------------------------------------------------------------- the thread that works

    def make_chunk(self) -> None:
        """Makes the next chunk of every stream and sends it to all viewers."""
        with self._lock:
            prompt, seed, generation, fresh = self.prompt, self.seed, self.generation, self._fresh
            self._fresh, self._making = False, True
        if fresh:
            self._sides = [_Side(*self._start(kind, seed)) for kind in self.kinds]
        started = time.monotonic()
        chunks = [side.streamer.next_chunk([prompt]) for side in self._sides]
        decoding = time.monotonic()
        videos = [side.decoder.pixels(chunk.frames) for side, chunk in zip(self._sides, chunks, strict=True)]
        encoding = time.monotonic()
        fragment = self.encoder.encode(np.concatenate(videos, axis=2), self._frames, chunks[0].index)
        pictures = self._draw(chunks[0], videos[0])
        now = time.monotonic()
        with self._lock:
            self._making = False
            if generation != self.generation or self._recording.closed:
                return  # It was started again or closed in the meantime.
            row = {
                "chunk": chunks[0].index,
                "first_frame": chunks[0].first_frame,
                "prompt": prompt,
                "seconds": chunks[0].seconds,
                "baseline_seconds": chunks[1].seconds if len(chunks) > 1 else None,
                "decode_seconds": encoding - decoding,
                "encode_seconds": now - encoding,
                "retrieved": chunks[0].retrieved[0],
                "relevance": chunks[0].relevance[0],
                "candidates": chunks[0].candidates[0],
                "activation": chunks[0].activation[0],
                "video_start": self._frames / self.world.fps,
                "video_seconds": len(videos[0]) / self.world.fps,
            }
            self._recording.write(fragment)
            self._recording.flush()
            self._ends.append(self._recording.tell())
            cut = bool(self.rows) and self.rows[-1]["prompt"] != prompt
            # A player that has been stopped in the meantime misses nothing.
            arrived = now if self._paused_since is None else min(now, self._paused_since)
            self.latency.add(now - started, len(videos[0]) / self.world.fps, arrived, cut)
            self.rows.append(row)
            self._pictures |= pictures
            self._frames += len(videos[0])
            message = _packed(self._told(row), fragment)
            for viewer in self._viewers:
                viewer.offer(message, chunk=True)
            if len(self.rows) >= self.limits.chunks:
                self.end(f"the session has reached its {self.limits.chunks} chunks; start it again")

    def fork(self, prompt: str) -> "LiveSession":
        """Another session that goes on from here under another prompt. This one is not changed by it. A ValueError
        where this one has ended, or is started again in the meantime."""
        if self.ended:  # by its length, or by a chunk that only some of its streams have made
            raise ValueError(self.ended)
        child = LiveSession(self.world, self.limits, prompt, self.seed, baseline=len(self.kinds) > 1)
        if self._fresh or not self._sides:
            return child
        try:
            for side in self._sides:
                decoder = self.world.decoder()
                decoder.load_state_dict(side.decoder.state_dict())
                child._sides.append(_Side(side.streamer.fork(), decoder))
            with self._lock:
                child.rows, child._ends, child._pictures = list(self.rows), list(self._ends), dict(self._pictures)
                child._frames, child._fresh = self._frames, False
                fragments = self._fragments()
            for piece in fragments:  # Without the lock: these may be many, and viewers come and go meanwhile.
                child._recording.write(piece)
            if self._fresh or child._recording.tell() != child._ends[-1]:
                raise ValueError("the session was started again")
        except BaseException:
            child.close()
            raise
        return child

    def _start(self, kind: str, seed: int) -> tuple[Streamer, Decoder]:
        settings: StreamSettings = replace(self.world.settings, memory=kind)  # type: ignore[arg-type]
        return self.world.streamer(settings, seed), self.world.decoder()

    def _draw(self, chunk: Chunk, video: np.ndarray) -> dict[int, bytes]:
        """Latent frame -> picture, of the frames of a chunk that may be remembered: its first, and those of the sink.

        A latent frame is shown by the first of its video frames.
        """
        count = self.world.settings.chunk_frames
        each = -(-len(video) // count)
        starts = [max(0, len(video) - (count - i) * each) for i in range(count)]  # the first may have fewer
        step = max(1, -(-self.world.width // PICTURE_WIDTH))
        wanted = [i for i in range(count) if i == 0 or chunk.first_frame + i < self.world.settings.sink_frames]
        return {chunk.first_frame + i: png(video[starts[i], ::step, ::step].copy()) for i in wanted}

    # ------------------------------------------------------------------------------------------------ under the lock

    def _keep_time(self, stopped: bool) -> None:
        """Stops or goes on counting deadlines, which do not pass while nothing is asked for."""
        now = time.monotonic()
        if stopped and self._paused_since is None:
            self._paused_since = now
        elif not stopped and self._paused_since is not None:
            self.latency.hold(now - self._paused_since)
            self._paused_since = None

    def _fragments(self) -> Iterator[bytes]:
        """The recording so far, piece by piece, to be read without the lock."""
        size = self._ends[-1] if self._ends else 0
        own = os.fdopen(os.dup(self._recording.fileno()), "rb", buffering=0)

        def pieces() -> Iterator[bytes]:
            with own:
                at = 0
                while at < size and (piece := os.pread(own.fileno(), min(1 << 18, size - at), at)):
                    yield piece
                    at += len(piece)

        return pieces()

    def _about(self) -> str:
        """What a page must know when it opens the session, or when it is started again."""
        world, settings = self.world, self.world.settings
        return json.dumps(
            {
                "type": "session",
                "session": self.name,
                "generation": self.generation,
                "prompt": self.prompt,
                "seed": self.seed,
                "paused": self.paused,
                "ended": self.ended,
                "about": world.about,
                "hint": world.hint,
                "examples": world.examples,
                "kinds": self.kinds,
                "width": world.width * len(self.kinds),
                "height": world.height,
                "fps": world.fps,
                "chunk_frames": settings.chunk_frames,
                "sink_frames": settings.sink_frames,
                "mime": self.encoder.mime,
                "start": base64.b64encode(self.encoder.start).decode(),
                "most_chunks": self.limits.chunks,
                "keep_seconds": self.limits.keep_seconds,
                "rows": self.rows[-ROWS_AT_ONCE:],
            }
        )

    def _told(self, row: dict[str, Any]) -> dict[str, Any]:
        """What a page is told of a chunk beside its video."""
        frames = range(row["first_frame"], row["first_frame"] + self.world.settings.chunk_frames)
        shown = {frame: self._pictures[frame] for frame in frames if frame in self._pictures}
        return {
            "type": "chunk",
            "generation": self.generation,
            **row,
            "pictures": {frame: base64.b64encode(content).decode() for frame, content in shown.items()},
            "latency": {k: v for k, v in (self.latency.record() or {}).items() if k != "how"},
        }


def _new_recording() -> Any:
    """A file for fragments, which whoever makes it closes."""
    return tempfile.TemporaryFile(prefix="memflow-live-")


def _packed(about: dict[str, Any], fragment: bytes) -> bytes:
    """A chunk as one message: the length of the JSON in 4 bytes, the JSON, the fragment."""
    words = json.dumps(about).encode()
    return len(words).to_bytes(4, "big") + words + fragment
