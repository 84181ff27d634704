"""The benchmarks: wrong results are not timed, ratios are pairwise, a slowdown is caught, the report stands alone."""

import re
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from memflow_ops.bench import run
from memflow_ops.bench.cases import attention, registry, streams
from memflow_ops.bench.harness import case as harness_case
from memflow_ops.bench.harness import contest, statistics
from memflow_ops.bench.harness import results as harness_results
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.bench.report import html, svg, table
from memflow_ops.bench.sizes import TINY
from memflow_ops.cli import main
from memflow_ops.environment import environment
from memflow_ops.impl import torch as implementation

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def tiny(name: str) -> harness_case.Case:
    (found,) = registry.chosen("cpu", ["tiny"], name)
    return found


@pytest.mark.parametrize("case", registry.chosen("cpu", ["tiny"]), ids=lambda case: case.name)
@torch.no_grad()
def test_every_contender_is_right_and_timed(case):
    found = contest.Contest(case, CPU)  # which checks
    for _ in range(2):
        found.run_round()
    rows = found.rows({"tflops_float32": 1.0, "gbs": 1.0}, {"device": "here"})
    assert rows[0]["contender"] == OURS and len(rows) >= 2
    for row in rows:
        assert row["seconds"]["p20"] > 0 and row["device"] == "here" and row["settings"]["block_size"] == 8
        assert row["contender"] != rows[0]["baseline"] or row["over_baseline"]["p50"] == 1
    assert rows[0].get("flops") or rows[0].get("bytes")
    assert rows[0]["settings"] == case.all_settings()


@torch.no_grad()
@pytest.mark.parametrize("level", ["layer", "stream", "op"])
def test_every_row_states_the_budget_that_was_measured(level, monkeypatch):
    kept = {}
    layout = streams.stream_settings
    monkeypatch.setattr(streams, "stream_settings", lambda size, kind, n: kept.setdefault(kind, layout(size, kind, n)))
    kinds = {OURS: streams.Kind("memflow"), "none": streams.Kind("none"), "many": streams.Kind("memflow", 4, 9, True)}
    if level == "layer":
        built = Built(streams.layer_contenders(TINY, torch.float32, CPU, kinds))
        case = tiny("layer/block")
    elif level == "stream":
        built = Built(streams.stream_contenders(TINY, torch.float32, CPU, kinds, 6, 1))
        case = tiny("stream/chunk")
    else:
        case = tiny("op/memory_attention")
        built = case.build(CPU, 0)
    found = contest.Contest(replace(case, build=lambda *_: built), CPU)
    found.run_round()
    rows = found.rows({"tflops_float32": 1.0, "gbs": 1.0}, {})
    settings = {row["contender"]: row["settings"] for row in rows}
    if level == "op":
        assert (settings[OURS]["query_group"], settings[OURS]["bank_frames"]) == (16, 4)
        assert settings["ours, one selection per chunk"]["query_group"] == TINY.queries
        return
    budgets = {name: [of[key] for key in ("bank_frames", "top_k", "query_group")] for name, of in settings.items()}
    assert budgets == {OURS: [3, 4, 16], "none": [None] * 3, "many": [4, 9, TINY.queries]}
    for name, kind in kinds.items():
        if name != "none":
            assert budgets[name] == [kept[kind].bank_frames, kept[kind].top_k, kept[kind].query_group]


@torch.no_grad()
def test_flex_attention_of_the_same_selection_is_set_up_right(monkeypatch):
    """Its blocks, without its compilation, which takes half a minute."""
    given = attention.Inputs.make(TINY, 4, torch.float32, CPU)
    masks = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda q, k, v, block_mask: masks.append(block_mask) or q
    )
    attention.flex(given).call()
    (mask,) = masks
    size = TINY
    window_blocks = -(-size.window_keys // size.block_size)
    for head, group in attention.sampled(size.heads, size.groups):
        listed = []
        for number, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
            listed += indices[0, head, group, : number[0, head, group]].tolist()
        expected = [*range(window_blocks), *(given.indices[0, head, group] + window_blocks).tolist()]
        assert sorted(listed) == expected


def test_a_wrong_result_is_not_timed():
    case = tiny("op/memory_attention")
    given = attention.Inputs.make(TINY, 4, torch.float32, CPU)
    right = attention.ours(given)
    wrong = attention.attention_contender(given, lambda: right.call() + 1e-4, 1, given.keys_of_ours)
    with pytest.raises(AssertionError, match=r"tiny/float32, wrong: head 0, group 0: error 1\.0"):
        contest.Contest(replace(case, build=lambda *_: Built({OURS: right, "wrong": wrong})), CPU)


def test_ratios_are_taken_pair_by_pair():
    # the machine is ten times slower in the second half: the ratio does not see it, ratios of medians would
    theirs = [1.0, 1.0, 1.0, 10.0, 10.0]
    ours = [1.1, 1.1, 1.1, 11.0, 11.0]
    found = statistics.paired(ours, theirs)
    assert all(abs(value - 1.1) < 1e-9 for value in found.values()) and statistics.decided(found, 5)
    assert statistics.paired([2.0, 3.0], [1.0, None])["p50"] == 2.0
    wide = statistics.paired([1.0, 1.1, 0.9], [1.0, 1.0, 1.0])
    assert not statistics.decided(wide, 3) and "within the spread" in table.overhead(wide, 3)


@pytest.mark.parametrize("count", range(1, 9))
def test_every_contender_is_in_every_place_and_after_every_other(count):
    names = [str(number) for number in range(count)]
    orders = [statistics.in_turn(names, number) for number in range(count * (1 + count % 2))]
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert Counter(order[place] for order in orders) == dict.fromkeys(names, len(orders) // count)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert pairs == dict.fromkeys(permutations(names, 2), 1 + count % 2)


def test_rounds_have_different_orders_and_ratios_stay_within_a_round():
    ran = []

    def contender(name: str, **more) -> Contender:
        return Contender(lambda: ran.append(name), lambda: None, **more)

    built = Built({OURS: contender(OURS), "window": contender("window"), "slow": contender("slow", every=2)})
    found = contest.Contest(replace(tiny("op/select"), build=lambda *_: built), CPU)
    timed = iter(range(1, 99))
    seconds = found._seconds
    found._seconds = lambda name: seconds(name) * 0 + next(timed)
    for _ in range(3):
        found.run_round()
    assert ran == [OURS, "window", "slow", "window", OURS, "slow", OURS, "window"]
    assert found.samples == {OURS: [1, 5, 7], "window": [2, 4, 8], "slow": [3, None, 6]}
    assert statistics.paired(found.samples[OURS], found.samples["slow"])["p50"] == (1 / 3 + 7 / 6) / 2


TIMED = {"p20": 0.9, "p50": 1.0, "p80": 1.3}, {"p20": 0.9, "p50": 1.0, "p80": 1.1}


@pytest.mark.parametrize(
    "name, rounds, before, ratios, measured, said",
    [
        ("op/select", 3, TIMED[0], [1.2] * 3 + [1.05] * 6, 9, ""),
        ("op/select", 3, TIMED[0], [1.2] * 3 + [1.11] * 6, 9, "+11 % (within the spread)"),
        ("op/select", 3, TIMED[1], [1.2] * 3, 3, "+20 %"),  # no doubt
        ("op/select", 3, TIMED[1], [1.09] * 3, 3, ""),
        ("stream/chunk", 10, TIMED[0], [1.2] * 10 + [1.11] * 10, 20, "+11 %"),  # as the history has room
    ],
)
def test_what_is_in_doubt_is_measured_once_more(tmp_path, name, rounds, before, ratios, measured, said):
    session = run.Session("cpu", ["tiny"], name, rounds, tmp_path)
    session._ceilings = {"tflops_float32": 1.0, "gbs": 1.0}
    ways = {"ours": Contender(lambda: None, lambda: None), "none": Contender(lambda: None, lambda: None)}
    found = session.contest(replace(session.cases[0], build=lambda *_: Built(ways)))
    left = list(ratios)
    found._seconds = lambda name: left.pop(0) if name == OURS else 1.0
    for _ in range(rounds):
        found.run_round()
    (ours, *_) = session.rows(found)
    harness_results.keep(session.target, [{**ours, "over_baseline": before}], {}, session.about)
    words = session.worse(found)
    assert len(ratios) - len(left) == measured and not left
    assert said in words and bool(said) is bool(words)


def test_the_whole_history_grows_around_what_the_case_says(monkeypatch):
    seen = {}

    class Noted(streams.Streamer):
        def next_chunk(self, prompts):
            seen.setdefault(self.settings.memory, []).append(len(self.cache.candidate_frames()[0]))
            return super().next_chunk(prompts)

    monkeypatch.setattr(streams, "Streamer", Noted)
    case = tiny("stream/chunk")
    found = contest.Contest(case, CPU)
    for _ in range(case.rounds):
        found.run_round()
    assert seen["full"] == [3, 4, 5, 6, 7, 8] and set(seen["memflow"]) == {6}
    rows = {row["contender"]: row for row in found.rows({"tflops_float32": 1.0, "gbs": 1.0}, {})}
    assert rows["full"]["history_timed"] == [4, 8] and rows["full"]["settings"]["history"] == 6
    assert "frames/s" in table.named(rows[OURS])
    assert "history 4 to 8" in table.named(rows["full"]) and "history" not in table.named(rows[OURS])
    size = case.size
    flops, _ = streams.pass_work(size, size.window_keys + (size.sink_frames + 6) * size.frame_tokens, torch.float32)
    assert rows["full"]["flops"] == (size.steps + 1) * flops


def test_dense_attention_to_a_long_history_is_timed_more_than_once():
    built = registry.attention(TINY, "float32", 256, False)(CPU, 0)
    rounds = registry.long_case(TINY, "float32", 256, "cpu").rounds
    assert sum(number % built.contenders["whole history, dense"].every == 0 for number in range(rounds)) >= 3


def test_ceilings_are_measured_once(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(run, "copy_ceiling", lambda device: measured.append("copy") or 1.0)
    monkeypatch.setattr(run, "product_ceiling", lambda device, dtype: measured.append(dtype) or 2.0)
    session = run.Session("cpu", ["tiny"], "op/select", 2, tmp_path)
    (case,) = session.cases
    for dtype in ("float32", "bfloat16", "float32"):
        session.contest(replace(case, dtype=dtype))
    assert measured == ["copy", "float32", "bfloat16"]
    assert session._ceilings == {"gbs": 1.0, "tflops_float32": 2.0, "tflops_bfloat16": 2.0}


SLOWER = """
    import time
    from memflow_ops.impl import torch as torch_impl

    select = torch_impl.select_blocks

    def slow(*arguments, **options):
        time.sleep(0.05)
        return select(*arguments, **options)

    torch_impl.select_blocks = slow
"""


# Who is timed when.
NOTED = """
    import pathlib
    from memflow_ops.bench.harness.contest import Contest

    seconds = Contest._seconds

    def noted(self, name):
        with (pathlib.Path(__file__).parent / "order").open("a") as order:
            print(name, file=order)
        return seconds(self, name)

    Contest._seconds = noted
"""


def test_a_slowdown_is_caught(tmp_path):
    """What `make bench` and `make bench-compare` run, on one case; the second time selection is slowed down."""
    (tmp_path / "slower.py").write_text(textwrap.dedent(SLOWER))
    (tmp_path / "noted.py").write_text(textwrap.dedent(NOTED))
    makefile = (ROOT / "Makefile").read_text()
    words = re.search(r"^CASES := (.*?)\n\n", makefile, re.M | re.S)[1].replace("\\\n", " ").split()
    words += ["--size", "tiny", "--case", "op/select", "--device", "cpu", "--out", str(tmp_path)]

    def make(*more: str) -> subprocess.CompletedProcess:
        code = f"import sys, pytest; sys.path.insert(0, {str(tmp_path)!r}); sys.exit(pytest.main(sys.argv[3:]))"
        return subprocess.run([sys.executable, "-c", code, *words, *more], cwd=ROOT, capture_output=True, text=True)

    done = make("-p", "noted")
    assert done.returncode == 0, done.stdout + done.stderr
    order = (tmp_path / "order").read_text().split()
    assert order == ["ours", "topk", "topk", "ours", "ours", "topk", "topk", "ours", "ours", "topk"]
    (stored,) = tmp_path.glob("bench-*.json")
    before = stored.read_text()
    done = make("--compare", "-p", "slower")
    assert done.returncode == 1 and "op/select/tiny/float32: ours takes" in done.stdout, done.stdout + done.stderr
    assert stored.read_text() == before, "comparing must not replace what it compares with"


@torch.no_grad()
def test_a_slower_write_is_caught(tmp_path, monkeypatch):
    """Streams without memory do it too, so that their ratios do not show it."""
    session = run.Session("cpu", ["tiny"], "op/write_projections", 5, tmp_path)
    session._ceilings = {"tflops_float32": 1.0, "gbs": 1.0}
    assert [case.name.split("/")[1] for case in session.cases] == ["write_projections", "write_projections_clean"]
    assert run.measure(session, lambda *_: None)[1] == {}
    right = implementation.write_projections
    monkeypatch.setattr(implementation, "write_projections", lambda *of, **more: time.sleep(0.05) or right(*of, **more))
    session = run.Session("cpu", ["tiny"], "op/write_projections", 5, tmp_path, compare=True)
    session._ceilings = {"tflops_float32": 1.0, "gbs": 1.0}
    for case in session.cases:
        slower = session.contest(case)
        for _ in range(5):
            slower.run_round()
        assert f"{case.name}: ours takes" in session.worse(slower)


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
    page = html.page(stored)
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
    assert not html.write_plot(run.stored(results, "cpu"), results / "plot.svg")  # no long cases
    assert html.write_plot(stored, results / "plot.svg")
    ElementTree.parse(results / "plot.svg")


def test_the_report_names_every_commit(results):
    stored = run.stored(results, "cpu")
    stored["rows"] = [{**row, "commit": "abc" if "select" in row["case"] else "def"} for row in stored["rows"]]
    page = html.page(stored)
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
    assert "sink: -5 (-10 to 5)" in html.streams(stored)


def test_every_line_looks_its_own():
    many = {f"line {number}": [(0, 2.0, 1.0, 3.0), (1, 2.0, 1.0, 3.0)] for number in range(20)}
    chart = svg.lines(many, "label", "x", "y", x_names=["a", "b"])
    looks = re.findall(r'<g stroke="var\(--(c\d)\)".*?stroke-dasharray="([^"]*)"', chart)
    assert len(set(looks)) == len(looks) == 20
    colours = {colour for colour, _ in looks}
    assert len(colours) == svg.COLOURS and all(svg.STYLE.count(f"--{colour}:") == 2 for colour in colours)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--size", "huge"], "sizes are tiny, wan-1.3b, long, got huge"),
        (["--case", "nothing"], "no case of the sizes wan-1.3b, long with 'nothing' in its name runs on cpu"),
        (["--case", "stream/", "--rounds", "99"], "has room for 10 rounds, got 99"),
        (["--stored", "--out", "nowhere"], "run `memflow bench`"),
        (["--out", "/proc/nowhere"], "cannot write to the folder /proc/nowhere"),
        (["--out", __file__], "test_bench.py is a file"),
    ],
)
def test_mistakes_are_one_line(words, said, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["bench", "--device", "cpu", *words])
    assert end.value.code == 2
    words = capfd.readouterr().err.strip().splitlines()
    assert len(words) == 1 and said in words[0]


def test_interrupted_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "--size", "tiny", "--case", "op/", "--device", "cpu", "--rounds", "1",
                                      "--out", str(tmp_path)])  # fmt: skip
    made = []

    def contested(session, case):
        if made:
            raise KeyboardInterrupt
        session._ceilings = {"tflops_float32": 1.0, "gbs": 1.0}
        made.append(contest.Contest(case, CPU))
        return made[0]

    monkeypatch.setattr(run.Session, "contest", contested)
    assert run.main() == 130
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("interrupted after 1 of ")
    assert {row["case"] for row in run.stored(tmp_path, "cpu")["rows"]} == {made[0].case.name}


def test_a_case_that_fails_does_not_lose_the_others(tmp_path):
    session = run.Session("cpu", ["tiny"], "op/select", 2, tmp_path)
    session._ceilings = {"tflops_float32": 1.0, "gbs": 1.0}

    def broken(*_):
        raise RuntimeError("no such kernel")

    session.cases.insert(0, replace(session.cases[0], name="broken", build=broken))
    rows, failed = run.measure(session, lambda *_: None)
    assert failed == {"broken": "RuntimeError: no such kernel"}
    assert {row["case"] for row in rows} == {"op/select/tiny/float32"}


def test_names_are_unique_and_say_what_they_are():
    for device in ("cpu", "cuda"):
        fit = registry.chosen(device, registry.GROUPS)
        assert len({case.name for case in fit}) == len(fit)
        for case in fit:
            level, _, size, dtype, *_ = case.name.split("/")
            assert (level, size, dtype) == (case.level, case.size.name, case.dtype)
    names = {case.name for case in registry.chosen("cuda", ["wan-1.3b"])}
    assert "stream/chunk/wan-1.3b/bfloat16/history-80" in names


def test_contenders_may_say_nothing_of_their_work():
    case = replace(tiny("op/select"), build=lambda *_: Built({OURS: Contender(lambda: None, lambda: None)}))
    found = contest.Contest(case, CPU)
    found.run_round()
    (alone,) = found.rows({"tflops_float32": 1.0, "gbs": 1.0}, {})
    assert "tflops" not in alone and alone["over_baseline"]["p50"] == 1
