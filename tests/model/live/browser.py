"""A headless Chromium, driven over its own protocol (CDP) by a WebSocket; nothing else is needed."""

import base64
import json
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page of the browser."""

    def __init__(self, ws):
        self._ws, self._last = ws, 0

    def call(self, method, **parameters):
        self._last += 1
        self._ws.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._ws.recv(timeout=60))
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]

    def value(self, expression):
        """What a JavaScript expression is, as JSON takes it; a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def until(self, expression, seconds=60.0):
        """Waits until the expression is true; returns the seconds that it took."""
        started = time.monotonic()
        while not self.value(f"(() => {{ try {{ return Boolean({expression}); }} catch {{ return false; }} }})()"):
            assert time.monotonic() - started < seconds, f"waited in vain for {expression}"
            time.sleep(0.05)
        return time.monotonic() - started

    def look(self, width=1100, height=900, scheme="light", motion="no-preference"):
        """Sets the size of the page and what its user prefers."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path):
        """Saves what is seen as PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def press(self, key):
        """Presses Tab or Enter."""
        more = {"Tab": {"windowsVirtualKeyCode": 9}, "Enter": {"windowsVirtualKeyCode": 13, "text": "\r"}}[key]
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def type(self, text):
        self.call("Input.insertText", text=text)


class Browser:
    def __init__(self, port):
        self._port = port

    @contextmanager
    def tab(self, address="about:blank", **look):
        made = urlopen(Request(f"http://127.0.0.1:{self._port}/json/new?about:blank", method="PUT"), timeout=20)
        with connect(json.load(made)["webSocketDebuggerUrl"], max_size=None) as ws:
            tab = Tab(ws)
            tab.look(**look)
            tab.call("Page.enable")
            tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
            tab.call("Page.navigate", url=address)
            tab.until("location.href != 'about:blank' && document.readyState == 'complete'")
            yield tab
            tab.call("Page.close")


@contextmanager
def browsing(folder):
    """A browser whose files lie in the folder."""
    words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio",
             "--no-first-run", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
             "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        said = Path(folder) / "DevToolsActivePort"
        end = time.monotonic() + 60
        while not (said.exists() and len(said.read_text().split()) > 1):
            assert process.poll() is None and time.monotonic() < end, "Chromium did not start"
            time.sleep(0.05)
        yield Browser(int(said.read_text().split()[0]))
    finally:
        process.terminate()
        process.wait(10)
