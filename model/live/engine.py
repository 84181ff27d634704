"""The thread that works: it makes the chunks of all sessions in turn, and frees those that nobody watches any more.

There is one such thread, because there is one device: sessions that took it from one another in the middle of a chunk
would all be late.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from memflow_ops.model.live.session import Limits, LiveSession
from memflow_ops.model.live.world import LiveWorld

LONGEST_WAIT = 0.1
"""Seconds after which the thread looks again whether there is something to do."""


class Engine:
    """All sessions of a server. Use it as a context: the thread works inside."""

    def __init__(self, world: LiveWorld, limits: Limits | None = None, baseline: bool = True):
        """baseline: whether every session streams without memory too."""
        self.world, self.limits, self.baseline = world, limits or Limits(), baseline
        self.started = time.time()
        self.opened = self.failed = 0
        self._sessions: dict[str, LiveSession] = {}
        self._forks: list[tuple[LiveSession, str, Callable[[LiveSession | str], None]]] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="memflow-live", daemon=True)

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()  # until the chunk that is being made is finished
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def open(self, prompt: str | None = None, seed: int = 0) -> LiveSession:
        """A new session. prompt: of its first chunk, checked; None for the first example. A ValueError where all places
        are taken."""
        with self._changed:
            return self._add(
                lambda: LiveSession(self.world, self.limits, prompt or self.world.examples[0], seed, self.baseline)
            )

    def find(self, name: str) -> LiveSession | None:
        """The session of this name; None where there is none."""
        with self._changed:
            return self._sessions.get(name)

    def fork(self, session: LiveSession, prompt: str, answer: Callable[[LiveSession | str], None]) -> None:
        """Asks for a session that goes on from where this one is, under another prompt. answer: is called with it, or
        with the reason why there is none, by the thread that works."""
        with self._changed:
            if len(self._forks) >= self.limits.sessions:
                raise ValueError("others are being made at the moment; try again in a while")
            self._forks.append((session, prompt, answer))
            self._changed.notify_all()

    def wake(self) -> None:
        """To be called when a session has been changed, so that the thread does not wait."""
        with self._changed:
            self._changed.notify_all()

    def metrics(self) -> dict[str, Any]:
        """What /metrics.json says."""
        with self._changed:
            sessions = list(self._sessions.values())
        return {
            "world": self.world.about,
            "seconds": time.time() - self.started,
            "most_sessions": self.limits.sessions,
            "opened": self.opened,
            "failed": self.failed,
            "sessions": [session.metrics() for session in sessions],
        }

    def _add(self, make: Callable[[], LiveSession]) -> LiveSession:
        if len(self._sessions) >= self.limits.sessions:
            raise ValueError(f"all {self.limits.sessions} places are taken; try again in a while")
        session = make()
        self._sessions[session.name] = session
        self.opened += 1
        self._changed.notify_all()
        return session

    # --------------------------------------------------------------------------------------- the thread that works

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    return
                self._free()
                forks, self._forks = self._forks, []
                session = self._next()
                if session is None and not forks:
                    self._changed.wait(LONGEST_WAIT)
                    continue
            for parent, prompt, answer in forks:
                answer(self._forked(parent, prompt))
            if session is not None:
                self._make_chunk(session)

    def _free(self) -> None:
        now = time.monotonic()
        for name in [name for name, session in self._sessions.items() if session.over(now)]:
            self._sessions.pop(name).close()

    def _next(self) -> LiveSession | None:
        """The session whose turn it is: of those that want a chunk the one that has waited longest for one."""
        now = time.monotonic()
        for name, session in self._sessions.items():
            if session.wants_chunk(now):
                self._sessions[name] = self._sessions.pop(name)  # to the end of the queue
                return session
        return None

    def _make_chunk(self, session: LiveSession) -> None:
        generation = session.generation
        try:
            session.make_chunk()
        except Exception as error:  # One session's failure, such as too little memory, must not end the others.
            self.failed += 1
            if session.generation == generation:  # else it has been started again already
                session.end(f"the stream failed ({type(error).__name__}: {error}); start it again")

    def _forked(self, parent: LiveSession, prompt: str) -> LiveSession | str:
        try:
            with self._changed:
                if len(self._sessions) >= self.limits.sessions:
                    return f"all {self.limits.sessions} places are taken; close another page first"
            child = parent.fork(prompt)
        except Exception as error:
            return f"that could not be continued ({type(error).__name__}: {error})"
        with self._changed:
            try:
                return self._add(lambda: child)
            except ValueError as error:
                child.close()
                return str(error)
