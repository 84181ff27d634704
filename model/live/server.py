"""The server behind `memflow serve`: the page, its WebSocket, its downloads and its figures. Extra [live]."""

import asyncio
import hmac
import ipaddress
import json
import re
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from memflow_ops.model.live.engine import Engine
from memflow_ops.model.live.messages import MESSAGE_BYTES, Message, read_message
from memflow_ops.model.live.session import LiveSession
from memflow_ops.model.live.viewer import Viewer

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("live.html", "text/html"),
    "/live.css": ("live.css", "text/css"),
    "/live.js": ("live.js", "text/javascript"),
}
"""All files that are served, whatever a client asks for."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
FRAME = re.compile(r"[0-9]{1,12}")
OPENING_SECONDS = 10.0
"""Within which a connection must say what it wants."""
SPARE_CONNECTIONS = 64
"""Connections beyond those of all viewers; further ones are answered with 503."""
MOST_REFUSALS = 50
"""Wrong messages after which a connection is closed."""
REFUSED, NO_PLACE, TOO_MANY_REFUSALS = 4401, 4409, 4400
"""Codes with which a WebSocket is closed: a wrong token, no place or no such session, too many wrong messages."""


def make_app(engine: Engine, token: str | None, loopback: bool) -> Starlette:
    """The application. token: what every request but those for the page's files must know; None: none is needed.
    loopback: it is served to this machine alone, so that it must be called by one of this machine's names."""
    door = Door(token, loopback)
    contents = {path: (PAGE / name).read_bytes() for path, (name, _) in FILES.items()}

    async def file(request: Request) -> Response:
        if not door.knows_host(request):
            return _refusal(421, "this server is not called by that name")
        path = request.scope["route"].path
        return Response(contents[path], media_type=FILES[path][1], headers=HEADERS)

    async def metrics(request: Request) -> Response:
        if refusal := door.refusal(request):
            return refusal
        return JSONResponse(engine.metrics(), headers=HEADERS)

    async def download(request: Request) -> Response:
        if refusal := door.refusal(request):
            return refusal
        session = engine.find(request.path_params["name"])
        if session is None:
            return _refusal(404, "there is no such session, or it is over")
        kind = request.path_params["kind"]
        if kind == "video.mp4":
            return StreamingResponse(session.video(), media_type="video/mp4", headers=HEADERS)
        if kind == "timeline.json":
            return JSONResponse(session.timeline(), headers=HEADERS)
        return _refusal(404, "there are video.mp4 and timeline.json")

    async def picture(request: Request) -> Response:
        if refusal := door.refusal(request):
            return refusal
        session = engine.find(request.path_params["name"])
        frame = request.path_params["frame"]
        content = session.picture(int(frame)) if session and FRAME.fullmatch(frame) else None
        if content is None:
            return _refusal(404, "there is no picture of that frame")
        return Response(content, media_type="image/png", headers=HEADERS)

    async def talk(ws: WebSocket) -> None:
        if not door.knows_host(ws) or not door.knows_origin(ws):
            await ws.close(REFUSED)  # before it is accepted, which the other side sees as 403
            return
        await ws.accept()
        with suppress(WebSocketDisconnect):
            await Conversation(engine, door, ws).run()

    return Starlette(
        routes=[
            *(Route(path, file) for path in FILES),
            Route("/metrics.json", metrics),
            Route("/sessions/{name}/pictures/{frame}", picture),
            Route("/sessions/{name}/{kind}", download),
            WebSocketRoute("/live", talk),
        ]
    )


class Door:
    """Who may come in."""

    def __init__(self, token: str | None, loopback: bool):
        self._token = None if token is None else _bytes(token)
        self._loopback = loopback

    def knows_token(self, given: str | None) -> bool:
        """The comparison takes as long wherever the two differ."""
        return self._token is None or hmac.compare_digest(_bytes(given or ""), self._token)

    def knows_host(self, request: HTTPConnection) -> bool:
        """Another site that gives its own name this machine's address must not reach what only this machine may."""
        if not self._loopback:
            return True
        try:
            name = urlsplit(f"//{request.headers.get('host', '')}").hostname
        except ValueError:  # half an address of IPv6, for one
            return False
        return name is not None and is_loopback(name)

    def knows_origin(self, request: HTTPConnection) -> bool:
        """A browser says which page opens a connection; only our own may. What is no browser says nothing."""
        origin = request.headers.get("origin")
        try:
            return origin is None or urlsplit(origin).netloc == request.headers.get("host")
        except ValueError:
            return False

    def refusal(self, request: Request) -> Response | None:
        """What to answer to a request that may not come in; None where it may."""
        if not self.knows_host(request):
            return _refusal(421, "this server is not called by that name")
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if not self.knows_token(given if kind.lower() == "bearer" else None):
            return _refusal(401, "the token is missing or wrong")
        return None


class Conversation:
    """One WebSocket, from its first message to its end."""

    def __init__(self, engine: Engine, door: Door, ws: WebSocket):
        self.engine, self.door, self.ws = engine, door, ws
        self.viewer = Viewer(asyncio.get_running_loop(), engine.limits.waiting_chunks)
        self.refusals = 0

    async def run(self) -> None:
        session = await self._open()
        if session is None:
            return
        sending = asyncio.create_task(self._send())
        hearing = asyncio.create_task(self._hear(session))
        try:
            await asyncio.wait((sending, hearing), return_when=asyncio.FIRST_COMPLETED)
        finally:
            session.detach(self.viewer)
            for task in (sending, hearing):
                task.cancel()
            await asyncio.gather(sending, hearing, return_exceptions=True)

    async def _open(self) -> LiveSession | None:
        """The session that the first message asks for; None where the connection has been closed instead."""
        try:
            message = await asyncio.wait_for(self._first(), OPENING_SECONDS)
        except asyncio.TimeoutError:
            await self._end(REFUSED, "nothing was asked for in time")
            return None
        if not self.door.knows_token(message.token):
            await self._end(REFUSED, "the token is missing or wrong")
            return None
        try:
            if message.session is None:
                session = self.engine.open(message.prompt, message.seed or 0)
            else:
                found = self.engine.find(message.session)
                if found is None:
                    raise ValueError("that session is over; a new one can be opened")
                session = found
            session.attach(self.viewer)
        except ValueError as error:
            await self._end(NO_PLACE, str(error))
            return None
        self.engine.wake()
        return session

    async def _first(self) -> Message:
        while True:
            message = await self._next()
            if message is not None and message.kind == "open":
                return message
            if message is not None:
                await self._refuse("the first message must be of the type open")

    async def _send(self) -> None:
        while (message := await self.viewer.take()) is not None:
            if isinstance(message, bytes):
                await self.ws.send_bytes(message)
            else:
                await self.ws.send_text(message)
        await self.ws.close(1001)

    async def _hear(self, session: LiveSession) -> None:
        while True:
            message = await self._next()
            if message is None:
                continue
            try:
                self._obey(session, message)
            except ValueError as error:
                await self._refuse(str(error))
            self.engine.wake()

    def _obey(self, session: LiveSession, message: Message) -> None:
        if message.kind == "prompt":
            assert message.prompt is not None
            session.set_prompt(message.prompt)
        elif message.kind == "restart":
            session.restart(message.seed)
        elif message.kind in ("pause", "resume"):
            session.pause(message.kind == "pause")
        elif message.kind == "fork":
            assert message.prompt is not None
            self.engine.fork(session, message.prompt, self._forked)
        else:
            raise ValueError("this connection has been opened already")

    def _forked(self, child: LiveSession | str) -> None:
        if isinstance(child, str):
            self.viewer.offer(json.dumps({"type": "refused", "why": child}))
        else:
            self.viewer.offer(json.dumps({"type": "forked", "session": child.name, "prompt": child.prompt}))

    async def _next(self) -> Message | None:
        """The next message; None where it was refused. A WebSocketDisconnect where there will be no more."""
        received = await self.ws.receive()
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1000))
        try:
            if received.get("text") is None:
                raise ValueError("expected text, got bytes")
            return read_message(received["text"], self.engine.world.check)
        except ValueError as error:
            await self._refuse(str(error))
            return None

    async def _refuse(self, why: str) -> None:
        self.refusals += 1
        if self.refusals > MOST_REFUSALS:
            await self._end(TOO_MANY_REFUSALS, "too many messages were wrong")
            raise WebSocketDisconnect(TOO_MANY_REFUSALS)
        await self.ws.send_text(json.dumps({"type": "refused", "why": why[:500]}))

    async def _end(self, code: int, why: str) -> None:
        await self.ws.send_text(json.dumps({"type": "refused", "why": why[:500]}))
        await self.ws.close(code)


def serve(engine: Engine, listening: socket.socket, token: str | None, ping_seconds: float = 15.0) -> Any:
    """A server for uvicorn's `Server.run(sockets=[listening])`, which ends at Ctrl-C or SIGTERM.

    ping_seconds: a page that does not answer a ping for so long is taken to be gone.
    """
    import uvicorn

    host, limits = listening.getsockname()[0], engine.limits
    config = uvicorn.Config(
        make_app(engine, token, is_loopback(host)),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        limit_concurrency=limits.sessions * limits.viewers + SPARE_CONNECTIONS,
        ws_max_size=MESSAGE_BYTES,
        ws_per_message_deflate=False,
        ws_ping_interval=ping_seconds,
        ws_ping_timeout=ping_seconds,
        timeout_graceful_shutdown=2,
    )
    return uvicorn.Server(config)


def is_loopback(host: str) -> bool:
    """Whether only this machine is called by this name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_loopback
    except ValueError:
        return False


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _refusal(code: int, why: str) -> Response:
    return JSONResponse({"why": why}, status_code=code, headers=HEADERS)
