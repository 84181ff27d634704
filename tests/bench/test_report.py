"""The table and the page that `memflow bench` makes of results."""

import re
from xml.etree import ElementTree

import pytest
import torch

from memflow_ops.bench import run
from memflow_ops.bench.harness.results import load_bench
from memflow_ops.bench.report import svg, table, webpage
from memflow_ops.cli import main
from memflow_ops.environment import environment

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The command, as a user calls it."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.raises(SystemExit) as end:
        main(["bench", "--size", "tiny", "--rounds", "2", "--out", str(folder), "--device", "cpu"])
    assert end.value.code == 0
    return folder


def test_the_command_writes_results_and_report(results):
    stored = run.stored(results, "cpu")
    assert {row["level"] for row in stored["rows"]} == {"op", "layer", "stream"}
    about = environment(CPU)
    for row in stored["rows"]:
        assert {name: row[name] for name in about} == about
        assert not any("predicted" in name or "by_flops" in name for name in row)
    assert "memory_attention" in (results / "report.html").read_text()


def test_the_report_stands_alone(results):
    stored = run.stored(results, "cpu")
    # as if there were long cases and another commit
    for frames in (4, 16):
        for row in [row for row in stored["rows"] if row["case"].startswith("op/memory_attention")]:
            settings = {**row["settings"], "bank_frames": frames}
            stored["rows"].append({**row, "case": f"{row['case']}/bank-{frames}", "settings": settings})
    page = webpage.page(stored)
    assert not re.search(r"(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert "prefers-color-scheme: dark" in page
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == 5
    for chart in charts:
        numbers = [
            float(x)
            for e in ElementTree.fromstring(chart).iter()
            for n, x in e.attrib.items()
            if n in ("x", "y", "cx", "cy")
        ]
        assert numbers and all(-1 <= x <= 1200 for x in numbers)
    assert not webpage.write_plot(run.stored(results, "cpu"), results / "plot.svg")  # no long cases
    assert webpage.write_plot(stored, results / "plot.svg")
    ElementTree.parse(results / "plot.svg")


def test_the_report_names_every_commit(results):
    stored = run.stored(results, "cpu")
    stored["rows"] = [{**row, "commit": "abc" if "select" in row["case"] else "def"} for row in stored["rows"]]
    page = webpage.page(stored)
    head = page[: page.index("</p>")]
    assert head.count("commit abc") == head.count("commit def") == 1
    of_case = re.findall(r"<tr class=case><td colspan=6>(\S+) <span class=faint>\S+, commit (\w+)", page)
    assert dict(of_case) == {row["case"]: row["commit"] for row in stored["rows"]}


def test_bars_show_what_is_negative_and_spreads():
    chart = svg.bars({"a": {"x": (10.0, 5.0, 20.0)}, "b": {"x": (-5.0, -10.0, 5.0)}}, "label", "x")
    shapes = [(e.tag.split("}")[1], e.attrib) for e in ElementTree.fromstring(chart).iter()]
    bars = [(float(a["x"]), float(a["width"])) for tag, a in shapes if tag == "rect" and float(a["height"]) > 12]
    ends = [re.match(r"M(\S+) .*H(\S+) ", a["d"]).groups() for tag, a in shapes if tag == "path"]
    (zero, width), (start, other) = bars
    expected = [(zero + width * low / 10, zero + width * high / 10) for low, high in ((5, 20), (-10, 5))]
    assert [tuple(map(float, end)) for end in ends] == [pytest.approx(end, abs=0.3) for end in expected]
    assert start + other == pytest.approx(zero, abs=0.3) and other == pytest.approx(width / 2, abs=0.3)
    assert "<title>b, x: -5 (-10 to 5)</title>" in chart and ">-5</text>" in chart


def test_overheads_below_zero_are_shown(results):
    below = {"p20": 0.9, "p50": 0.95, "p80": 1.05}
    stored = [{**row, "over_baseline": below} for row in run.stored(results, "cpu")["rows"]]
    assert "sink: -5 (-10 to 5)" in webpage.streams(stored)


def test_every_line_looks_its_own():
    many = {f"line {number}": [(0, 2.0, 1.0, 3.0), (1, 2.0, 1.0, 3.0)] for number in range(20)}
    chart = svg.lines(many, "label", "x", "y", x_names=["a", "b"])
    looks = re.findall(r'<g stroke="var\(--(c\d)\)".*?stroke-dasharray="([^"]*)"', chart)
    assert len(set(looks)) == len(looks) == 20
    colours = {colour for colour, _ in looks}
    assert len(colours) == svg.COLOURS and all(svg.STYLE.count(f"--{colour}:") == 2 for colour in colours)


def test_the_committed_results_can_be_shown():
    """`memflow bench --stored` reads the files that were measured with earlier versions."""
    files = sorted(run.RESULTS.glob("bench-*.json"))
    assert files
    for path in files:
        stored = load_bench(path)
        assert "All figures" in webpage.page(stored) and stored["rows"][0]["case"] in table.cases_of(stored["rows"])
        assert webpage.bank_sizes(stored["rows"]).startswith("<svg")
