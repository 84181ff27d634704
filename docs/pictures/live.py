"""Draw the picture of the page of `memflow serve`: live.py OUT. `make pictures` calls it; it needs a Chromium."""

import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "model" / "live"))
from browser import CHROMIUM, browsing
from served import serving

from memflow_ops.model.live.world import toy_world

STORY = (("a ball in the meadow", 5), ("a star in the desert", 5), ("the ball at night", 3))
"""Prompts, and for how many chunks each is shown."""


def draw(out: Path) -> None:
    """Play the story on the page and save what is seen at its end."""
    world = toy_world(torch.device("cpu"), chunks=100)
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(world) as served,
        browsing(folder) as browser,
        browser.tab(f"http://{served.address}/", width=1100, height=900) as tab,
    ):
        for prompt, chunks in STORY:
            tab.value(f"document.getElementById('prompt').value = '{prompt}'")
            tab.until("socket.readyState == 1")
            tab.value("document.getElementById('prompt-form').requestSubmit()")
            seen = f"[...rows.values()].filter((row) => row.prompt == '{prompt}').length"
            tab.until(f"{seen} >= {chunks} && document.getElementById('now').textContent.includes('{prompt}')")
        tab.until("document.querySelectorAll('#memory .retrieved').length == 3")
        time.sleep(0.3)
        tab.picture(out)


if __name__ == "__main__":
    if CHROMIUM is None:
        print("no Chromium here: the picture of the page is left as it is")
    else:
        draw(Path(sys.argv[1]))
