"""`memflow serve`: it says where it is, serves the page, and ends at Ctrl-C; what cannot be is refused in one line."""

import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from subprocess import PIPE, Popen
from urllib.error import HTTPError
from urllib.parse import parse_qs
from urllib.request import Request, urlopen

import pytest
from command_line import memflow

from memflow_ops.cli.serve import _address
from memflow_ops.model.live.server import is_loopback

ROOT = Path(__file__).parents[2]


def test_it_serves_until_ctrl_c():
    words = [sys.executable, "-m", "memflow_ops", "serve", "--port", "0", "--host", "0.0.0.0", "--steps", "2"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    with Popen(words, stdout=PIPE, stderr=PIPE, text=True, cwd=ROOT, env=variables) as process:
        line = process.stdout.readline()
        address, token = re.search(r"(http://\S+/)#token=(\S+)", line).groups()
        assert len(token) >= 32
        page = urlopen(address, timeout=20).read()
        assert b"memflow live" in page and token.encode() not in page
        figures = Request(f"{address}metrics.json", headers={"Authorization": f"Bearer {token}"})
        assert json.load(urlopen(figures, timeout=20))["sessions"] == []
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"{address}metrics.json", timeout=20)
        process.send_signal(signal.SIGINT)
        said, wrong = process.communicate(timeout=30)
    assert (process.returncode, said, wrong) == (0, "stopped\n", "")


def test_what_cannot_be_is_refused_in_one_line(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert memflow("serve", "--port", port) == 2
    assert f"cannot serve at 127.0.0.1, port {port}: Address already in use" in capfd.readouterr().err
    assert memflow("serve", "--token", "short") == 2
    assert "a token has at least 16 characters, got 5" in capfd.readouterr().err
    for token in ("sixteen letters with spaces", "sechzehn-Zeichen-mit-ü"):
        assert memflow("serve", "--token", token) == 2
        assert "no spaces" in capfd.readouterr().err
    assert memflow("serve", "--weights", "nowhere.safetensors") == 2
    assert "nowhere.safetensors" in capfd.readouterr().err


def test_the_address_carries_any_token():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = _address(listening, "a+b/c==&d%20e#f")
    fragment = address.partition("#")[2]
    assert parse_qs(fragment) == {"token": ["a+b/c==&d%20e#f"]}


def test_without_the_extra_it_says_what_to_install(capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "memflow_ops.model.live.server")
    monkeypatch.delattr("memflow_ops.model.live.server")
    assert memflow("serve") == 2
    assert "pip install 'memflow-ops[live]'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.168.1.2", False), ("localhost.example.org", False), ("", False)],
)  # fmt: skip
def test_only_this_machines_own_names_are_open(host, own):
    assert is_loopback(host) is own
