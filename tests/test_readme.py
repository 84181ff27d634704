"""The README's Python runs as it stands, and its figures are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def results(name):
    return json.loads((ROOT / "bench" / "results" / name).read_text(encoding="utf-8"))["rows"]


def percent(share):
    """A share of a count in whole percent; the file has the share rounded to four digits."""
    return f"{100 * round(share['value'] * share['count']) / share['count']:.0f} %"


def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["out"].shape == names["q"].shape and names["out"].isfinite().all()


@pytest.mark.parametrize(
    ("memory", "words"),
    [("none", "none"), ("sink", "the first frames"), ("memflow", r"\*\*memflow"), ("full", "the whole history")],
)
def test_what_returns_is_as_judged(memory, words):
    row = next(row for row in results("toy-cpu-seed-30000.json") if row["memory"] == memory)
    (line,) = re.findall(rf"^\| {words}.*$", README, re.MULTILINE)
    hue, pattern = row["hue"], row["pattern"]
    cells = [cell.strip(" *") for cell in line.split("|")[2:4]]
    interval = f"{100 * hue['low']:.0f} to {100 * hue['high']:.0f}"
    assert cells == [f"{percent(hue)} ({interval})", percent(pattern)]


def test_what_it_costs_is_as_measured():
    streams = {
        (row["case"].rpartition("/")[2], row["contender"]): f"+{100 * (row['over_baseline']['p50'] - 1):.1f} %"
        for row in results("bench-intel-r-xeon-r-processor-2-threads.json")
        if row["case"].startswith("stream/chunk/wan-quarter/float32")
    }
    cells = re.search(r"^\| (\+.*) \|$", README, re.MULTILINE)[1].split(" | ")
    once = "memflow, one selection per chunk"
    known = (f"{once}, chosen once", once, "ours", "sink")
    assert cells[:4] == [streams["history-240", contender] for contender in known]
    assert float(cells[4].strip("+ %")) == pytest.approx(float(streams["history-24", "full"].strip("+ %")), abs=0.6)
