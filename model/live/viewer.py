"""What waits to be sent to one page. It is bounded: who reads slowly misses chunks, and holds up nobody."""

import asyncio
import threading
from collections import deque
from contextlib import suppress

MOST_NOTES = 64
"""Messages without video that may wait for a viewer. Who reads none of so many is gone."""


class Viewer:
    """One connection of a page to a session. `offer` may be called from any thread, `take` from the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, most_chunks: int):
        """most_chunks: chunks that wait at most; when another one comes, only the newest is kept."""
        self._loop, self._most = loop, most_chunks
        self._waiting: deque[tuple[bool, str | bytes]] = deque()
        self._lock, self._there = threading.Lock(), asyncio.Event()
        self._closed = False
        self.dropped = 0
        """Chunks that were never sent."""

    def offer(self, message: str | bytes, chunk: bool = False) -> None:
        """Queues a message. chunk: it is one of video, which may be dropped later."""
        with self._lock:
            if chunk and sum(video for video, _ in self._waiting) >= self._most:
                self._drop()
            self._waiting.append((chunk, message))
            if len(self._waiting) > MOST_NOTES + self._most:
                self._closed = True
                self._waiting.clear()
        self._wake()

    def drop_chunks(self) -> None:
        """Forgets the chunks that wait, because what they show is no longer wanted."""
        with self._lock:
            self._drop()

    def close(self) -> None:
        """Nothing more will come; what waits is still taken."""
        with self._lock:
            self._closed = True
        self._wake()

    async def take(self) -> str | bytes | None:
        """The next message, as soon as there is one; None when the connection is to be closed."""
        while True:
            with self._lock:
                if self._waiting:
                    return self._waiting.popleft()[1]
                if self._closed:
                    return None
                self._there.clear()
            await self._there.wait()

    def _drop(self) -> None:
        kept = [waiting for waiting in self._waiting if not waiting[0]]
        self.dropped += len(self._waiting) - len(kept)
        self._waiting = deque(kept)

    def _wake(self) -> None:
        if not self._loop.is_closed():
            with suppress(RuntimeError):  # the loop was closed just now, and nobody waits any more
                self._loop.call_soon_threadsafe(self._there.set)
