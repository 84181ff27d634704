"""A server in a thread, and a page in Python that talks to it over a real socket."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from websockets.sync.client import connect

from memflow_ops.model.live.engine import Engine
from memflow_ops.model.live.server import serve
from memflow_ops.model.live.session import Limits


class Served:
    """A running server."""

    def __init__(self, engine, port, token):
        self.engine, self.token, self.address = engine, token, f"127.0.0.1:{port}"

    @contextmanager
    def page(self, *, origin=None, **opening):
        """A page that has opened a session; what it says may be changed."""
        with connect(f"ws://{self.address}/live", origin=origin, max_size=None) as ws:
            ws.send(json.dumps({"type": "open", "token": self.token, **opening}))
            yield ws

    def get(self, path, **headers):
        """Status and content of a request."""
        if self.token and "Authorization" not in headers:
            headers["Authorization"] = f"Bearer {self.token}"
        try:
            with urlopen(Request(f"http://{self.address}{path}", headers=headers), timeout=20) as answer:
                return answer.status, answer.read(), answer.headers
        except HTTPError as error:
            return error.code, error.read(), error.headers


@contextmanager
def serving(world, token=None, ping_seconds=15.0, **limits):
    with socket.create_server(("127.0.0.1", 0)) as listening, Engine(world, Limits(**limits)) as engine:
        server = serve(engine, listening, token, ping_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            until(lambda: server.started)
            yield Served(engine, listening.getsockname()[1], token)
        finally:
            server.should_exit = True
            thread.join()


def hear(ws, kind, seconds=60.0):
    """The next message of this type as JSON."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        message = ws.recv(timeout=seconds)
        if isinstance(message, bytes):
            message = message[4 : 4 + int.from_bytes(message[:4], "big")]
        words = json.loads(message)
        if words["type"] == kind:
            return words
    raise AssertionError(f"no {kind} in {seconds} s")


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
