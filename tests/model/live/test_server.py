"""The server over real sockets: who may come in, what hostile messages do, and what two viewers do to one another."""

import json
import socket
import threading
import time
from pathlib import Path

import pytest
from served import Served, hear, serving, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from memflow_ops.model.live.messages import MESSAGE_BYTES

TOKEN = "a-token-of-enough-letters"


@pytest.fixture(scope="module")
def served(world):
    with serving(world, sessions=60, keep_seconds=10.0) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(world):
    with serving(world, token=TOKEN) as running:
        yield running


def closed_with(ws, seconds=60.0):
    """The code with which the server ends the connection, and the last thing that it said."""
    last = None
    try:
        while True:
            message = ws.recv(timeout=seconds)
            last = json.loads(message) if isinstance(message, str) else last
    except ConnectionClosed as end:
        return end.rcvd.code, last


def test_a_page_watches_steers_and_saves(served: Served):
    with served.page(seed=3) as ws:
        about = hear(ws, "session")
        assert about["seed"] == 3 and about["kinds"] == ["memflow", "none"] and about["mime"].startswith("video/mp4")
        assert hear(ws, "chunk")["prompt"] == "a ball in the meadow"
        ws.send(json.dumps({"type": "prompt", "prompt": "an empty sea"}))
        takes_effect = hear(ws, "prompt")["takes_effect"]
        prompts = [hear(ws, "chunk")["prompt"] for _ in range(2)]
        assert "an empty sea" in prompts  # within two chunks
        ws.send(json.dumps({"type": "pause"}))
        assert hear(ws, "paused")["paused"]
        name = about["session"]
        status, content, headers = served.get(f"/sessions/{name}/timeline.json")
        rows = json.loads(content)["chunks"]
        assert status == 200 and [row["prompt"] for row in rows[takes_effect - 1 : takes_effect + 1]] == [
            "a ball in the meadow",
            "an empty sea",
        ]
        status, video, headers = served.get(f"/sessions/{name}/video.mp4")
        assert status == 200 and headers["Content-Type"] == "video/mp4" and video[4:8] == b"ftyp"
        assert served.get(f"/sessions/{name}/pictures/0")[1][:4] == b"\x89PNG"
        ws.send(json.dumps({"type": "restart", "seed": 8}))
        assert hear(ws, "session")["seed"] == 8 and hear(ws, "chunk")["chunk"] == 0
        figures = json.loads(served.get("/metrics.json")[1])
        mine = figures["sessions"][-1]
        assert mine["viewers"] == 1 and mine["latency"]["chunk_p95"] >= mine["latency"]["chunk_p50"] > 0
        assert name not in json.dumps(figures)


def test_only_the_page_is_served_whatever_is_asked_for(served: Served):
    for path, kind in (("/", "text/html"), ("/live.js", "text/javascript"), ("/live.css", "text/css")):
        status, content, headers = served.get(path)
        assert status == 200 and headers["Content-Type"].startswith(kind) and len(content) > 1000
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"http://" not in content and b"https://" not in content.replace(b'"https:"', b"")
    for path in ("/server.py", "/../server.py", "/%2e%2e/server.py", "/sessions/..%2f..%2fsetup/video.mp4",
                 "/sessions/x/../../etc/passwd", "/sessions/nobody/video.mp4", "/page/live.js",
                 "/sessions/nobody/pictures/-1", "/sessions/nobody/pictures/" + "1" * 5000):  # fmt: skip
        assert served.get(path)[0] == 404


HOSTILE = {
    "broken JSON": '{"type": "prompt", "prompt": ',
    "bytes": b"\x00\xff" * 100,
    "deeply nested": "[" * 10_000,
    "an unknown word": '{"type": "prompt", "prompt": "a dragon at sea"}',
    "a long prompt": json.dumps({"type": "prompt", "prompt": "ball " * 2000}),
    "a path": '{"type": "prompt", "prompt": "a ball at sea", "file": "/etc/passwd"}',
    "opened again": '{"type": "open"}',
}


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_wrong_message_is_refused_and_the_session_goes_on(served: Served, message):
    with served.page() as ws, served.page() as other:
        hear(ws, "chunk")
        ws.send(message)
        assert hear(ws, "refused")["why"]
        assert hear(ws, "chunk")["prompt"] == "a ball in the meadow" and hear(other, "chunk")


def test_a_megabyte_ends_its_own_connection_and_nothing_else(served: Served):
    with served.page() as other, served.page() as ws:
        name = hear(ws, "session")["session"]
        ws.send(json.dumps({"type": "prompt", "prompt": "a" * 1_000_000}))
        assert closed_with(ws)[0] == 1009 and MESSAGE_BYTES < 1_000_000
        assert hear(other, "chunk")
        with served.page(session=name) as again:
            assert hear(again, "session")["session"] == name and hear(again, "chunk")


def test_who_is_wrong_all_the_time_is_sent_away(served: Served):
    with served.page() as ws:
        for _ in range(60):
            try:
                ws.send("{")
            except ConnectionClosed:
                break
        assert closed_with(ws)[0] == 4400


def test_a_token_is_needed_everywhere_but_for_the_page_itself(guarded: Served):
    assert guarded.get("/", Authorization="")[0] == 200
    for path in ("/metrics.json", "/sessions/x/video.mp4", "/sessions/x/pictures/0"):
        assert guarded.get(path, Authorization="")[0] == 401
        assert guarded.get(path, Authorization="Bearer " + TOKEN[:-1])[0] == 401
    assert guarded.get("/metrics.json")[0] == 200
    with guarded.page() as good:
        hear(good, "chunk")
        for wrong in (None, "", TOKEN[:-1], TOKEN + "x", "\ud800"):
            with guarded.page(token=wrong) as ws:
                code, said = closed_with(ws)
                assert code == 4401 and "token" in said["why"]
        hear(good, "chunk")
        assert len(guarded.engine._sessions) == 1


def test_other_sites_cannot_open_a_session(served: Served):
    with pytest.raises(InvalidStatus) as refusal, served.page(origin="http://example.org"):
        pass
    assert refusal.value.response.status_code == 403
    with served.page(origin=f"http://{served.address}") as ws:
        hear(ws, "session")
    # A name of somebody else that leads to this machine.
    assert served.get("/", Host="example.org")[0] == 421
    assert served.get("/metrics.json", Host=f"example.org:{served.address[-5:]}")[0] == 421
    assert served.get("/", Host="[::1")[0] == 421
    with pytest.raises(InvalidStatus, match="403"), served.page(origin="http://[::1"):
        pass
    port = served.address.rpartition(":")[2]
    assert served.get("/metrics.json", Host=f"localhost:{port}")[0] == 200


def test_sessions_that_are_not_there_and_places_that_are_taken(world):
    with serving(world, sessions=1, viewers=1) as served, served.page() as ws:
        name = hear(ws, "session")["session"]
        for opening, why in (({}, "all 1 places are taken"), ({"session": name}, "takes no more"),
                             ({"session": "nobody-of-this-name"}, "is over")):  # fmt: skip
            with served.page(**opening) as other:
                code, said = closed_with(other)
                assert code == 4409 and why in said["why"]
        hear(ws, "chunk")


def test_a_viewer_who_stalls_holds_up_nobody_and_is_dropped(world):
    with serving(world, ping_seconds=1.5, chunks=400) as served, served.page() as quick:
        name = hear(quick, "session")["session"]
        stalled = socket.create_connection(tuple(served.address.split(":")))
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall(
            f"GET /live HTTP/1.1\r\nHost: {served.address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in stalled.recv(4096, socket.MSG_PEEK):
            time.sleep(0.01)
        words = json.dumps({"type": "open", "session": name}).encode()
        # A masked text frame, whose mask is 0; nothing is read from here on.
        stalled.sendall(bytes([0x81, 0x80 | len(words), 0, 0, 0, 0]) + words)
        live = served.engine.find(name)
        until(lambda: live.viewers == 2)
        begun = hear(quick, "chunk")["chunk"]
        assert [hear(quick, "chunk")["chunk"] for _ in range(6)] == list(range(begun + 1, begun + 7))
        until(lambda: live.viewers == 1)
        hear(quick, "chunk")
        stalled.close()


def test_a_lost_connection_comes_back_to_its_session(served: Served):
    with served.page(seed=5) as ws:
        name = hear(ws, "session")["session"]
        last = hear(ws, "chunk")["chunk"]
        ws.socket.close()  # without a word
    time.sleep(0.3)
    with served.page(session=name) as ws:
        about = hear(ws, "session")
        assert about["session"] == name and about["seed"] == 5 and len(about["rows"]) > last
        next_one = hear(ws, "chunk")["chunk"]
        assert hear(ws, "chunk")["chunk"] == next_one + 1


def test_sessions_come_and_go_without_growth(world):
    def held():
        """Open files and threads of this process."""
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    with serving(world, sessions=3, keep_seconds=0.0) as served:
        for number in range(20):
            with served.page() as ws:
                hear(ws, "chunk")
            until(lambda: not served.engine._sessions)
            if number == 1:
                early = held()
        until(lambda: held() <= early)
        assert served.engine.opened == 20 and served.engine.failed == 0
        with connect(f"ws://{served.address}/live") as ws:  # who says nothing has no session
            assert not served.engine._sessions
            ws.close()
