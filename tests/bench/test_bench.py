"""The benchmarks: wrong results are not timed, ratios are pairwise, a slowdown is caught, the report stands alone."""

import json
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from memflow_ops import cli
from memflow_ops.bench import baselines, cases, contest, record, report, run, table
from memflow_ops.bench.contest import OURS, Built, Contender
from memflow_ops.bench.sizes import TINY
from memflow_ops.environment import environment

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def tiny(name: str) -> cases.Case:
    (found,) = cases.chosen("cpu", ["tiny"], name)
    return found


@pytest.mark.parametrize("case", cases.chosen("cpu", ["tiny"]), ids=lambda case: case.name)
@torch.no_grad()
def test_every_contender_is_right_and_timed(case):
    found = contest.Contest(case, CPU)  # which checks
    for _ in range(2):
        found.others()
        found.ours()
    rows = found.rows({"tflops_float32": 1.0, "gbs": 1.0}, {"device": "here"})
    assert rows[0]["contender"] == OURS and len(rows) >= 2
    for row in rows:
        assert row["seconds"]["p20"] > 0 and row["device"] == "here" and row["settings"]["block_size"] == 8
        assert row["contender"] != rows[0]["baseline"] or row["over_baseline"]["p50"] == 1
    assert rows[0].get("flops") or rows[0].get("bytes")


@torch.no_grad()
def test_flex_attention_of_the_same_selection_is_set_up_right(monkeypatch):
    """Its blocks, without its compilation, which takes half a minute."""
    given = baselines.Inputs.make(TINY, 4, torch.float32, CPU)
    masks = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda q, k, v, block_mask: masks.append(block_mask) or q
    )
    baselines.flex(given).call()
    (mask,) = masks
    size = TINY
    window_blocks = -(-size.window_keys // size.block_size)
    for head, group in baselines.sampled(size.heads, size.groups):
        listed = []
        for number, indices in ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)):
            listed += indices[0, head, group, : number[0, head, group]].tolist()
        expected = [*range(window_blocks), *(given.indices[0, head, group] + window_blocks).tolist()]
        assert sorted(listed) == expected


def test_a_wrong_result_is_not_timed():
    case = tiny("op/memory_attention")
    given = baselines.Inputs.make(TINY, 4, torch.float32, CPU)
    right = baselines.ours(given)
    wrong = baselines.attention_contender(given, lambda: right.call() + 1e-4, 1, given.keys_of_ours)
    with pytest.raises(AssertionError, match=r"tiny/float32, wrong: head 0, group 0: error 1\.0"):
        contest.Contest(replace(case, build=lambda *_: Built({OURS: right, "wrong": wrong})), CPU)


def test_ratios_are_taken_pair_by_pair():
    # the machine is ten times slower in the second half: the ratio does not see it, ratios of medians would
    theirs = [1.0, 1.0, 1.0, 10.0, 10.0]
    ours = [1.1, 1.1, 1.1, 11.0, 11.0]
    found = contest.paired(ours, theirs)
    assert all(abs(value - 1.1) < 1e-9 for value in found.values()) and contest.decided(found)
    assert contest.paired([2.0, 3.0], [1.0, None])["p50"] == 2.0
    assert not contest.decided(contest.paired([1.0, 1.1, 0.9], [1.0, 1.0, 1.0]))
    assert "within the spread" in table.overhead(contest.paired([1.0, 1.1, 0.9], [1.0, 1.0, 1.0]))


def row(ratio: float, **more) -> dict:
    spread = {"p20": ratio, "p50": ratio, "p80": ratio}
    return {"case": "a/case", "contender": OURS, "baseline": "none", "over_baseline": spread, "settings": {"top_k": 4},
            "commit": "c", "date": "2026-01-01", **more}  # fmt: skip


def test_more_than_a_tenth_is_worse(tmp_path):
    target = tmp_path / "bench.json"
    about = {"device": "here", "commit": "c", "date": "2026-01-01"}
    with pytest.raises(ValueError, match="run `make bench` first"):
        record.compared([row(1.0)], target)
    record.keep(target, [row(1.2)], {"gbs": 1.0}, about)
    assert record.compared([row(1.31)], target) == []
    (words,) = record.compared([row(1.33)], target)
    assert "a/case: ours takes 1.330 times none" in words and "+11 %" in words
    with pytest.raises(ValueError, match="other settings"):
        record.compared([row(1.0, settings={"top_k": 5})], target)
    with pytest.raises(ValueError, match="another/case has no stored result"):
        record.compared([row(1.0, case="another/case")], target)


def test_results_are_replaced_by_case_and_history_by_commit(tmp_path):
    target = tmp_path / "bench.json"
    about = {"device": "here", "commit": "c", "date": "2026-01-01"}
    record.keep(target, [row(1.2)], {"gbs": 1.0}, about)
    record.keep(target, [row(1.3, case="b/case")], {"tflops_float32": 2.0}, about)
    record.keep(target, [row(1.1)], {"gbs": 3.0}, {**about, "commit": "d"})
    kept = json.loads(target.read_text())
    assert {r["case"]: r["over_baseline"]["p50"] for r in kept["rows"]} == {"a/case": 1.1, "b/case": 1.3}
    assert kept["ceilings"] == {"gbs": 3.0, "tflops_float32": 2.0}
    assert [(entry["commit"], sorted(entry["ratios"])) for entry in kept["history"]] == [
        ("c", ["a/case", "b/case"]),
        ("d", ["a/case"]),
    ]


SLOWER = """
    import time
    from memflow_ops import torch_impl

    select = torch_impl.select_blocks

    def slow(*arguments, **options):
        time.sleep(0.05)
        return select(*arguments, **options)

    torch_impl.select_blocks = slow
"""


def test_a_slowdown_is_caught(tmp_path):
    """What `make bench` and `make bench-compare` run, on one case; the second time selection is slowed down."""
    (tmp_path / "slower.py").write_text(textwrap.dedent(SLOWER))
    makefile = (ROOT / "Makefile").read_text()
    words = re.search(r"^CASES := (.*?)\n\n", makefile, re.M | re.S)[1].replace("\\\n", " ").split()
    words += ["--size", "tiny", "--case", "op/select", "--device", "cpu", "--out", str(tmp_path)]

    def make(*more: str) -> subprocess.CompletedProcess:
        code = f"import sys, pytest; sys.path.insert(0, {str(tmp_path)!r}); sys.exit(pytest.main(sys.argv[3:]))"
        return subprocess.run([sys.executable, "-c", code, *words, *more], cwd=ROOT, capture_output=True, text=True)

    done = make()
    assert done.returncode == 0, done.stdout + done.stderr
    (stored,) = tmp_path.glob("bench-*.json")
    before = stored.read_text()
    done = make("--compare", "-p", "slower")
    assert done.returncode == 1 and "op/select/tiny/float32: ours takes" in done.stdout, done.stdout + done.stderr
    assert stored.read_text() == before, "comparing must not replace what it compares with"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The command, as a user calls it."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--size", "tiny", "--rounds", "2", "--out", str(folder), "--device", "cpu"])
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
    page = report.page(stored)
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
    assert not report.write_plot(run.stored(results, "cpu"), results / "plot.svg")  # no long cases
    assert report.write_plot(stored, results / "plot.svg")
    ElementTree.parse(results / "plot.svg")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--size", "huge"], "sizes are tiny, wan-1.3b, long, got huge"),
        (["--case", "nothing"], "no case of the sizes wan-1.3b, long with 'nothing' in its name runs on cpu"),
        (["--case", "stream/", "--rounds", "99"], "has room for 10 rounds, got 99"),
        (["--stored", "--out", "nowhere"], "run `memflow bench`"),
    ],
)
def test_mistakes_are_one_line(words, said, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--device", "cpu", *words])
    assert end.value.code == 2
    words = capfd.readouterr().err.strip().splitlines()
    assert len(words) == 1 and said in words[0]


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
        fit = cases.chosen(device, cases.GROUPS)
        assert len({case.name for case in fit}) == len(fit)
        for case in fit:
            level, _, size, dtype, *_ = case.name.split("/")
            assert (level, size, dtype) == (case.level, case.size.name, case.dtype)
    names = {case.name for case in cases.chosen("cuda", ["wan-1.3b"])}
    assert "stream/chunk/wan-1.3b/bfloat16/history-80" in names


def test_contenders_may_say_nothing_of_their_work():
    case = replace(tiny("op/select"), build=lambda *_: Built({OURS: Contender(lambda: None, lambda: None)}))
    found = contest.Contest(case, CPU)
    found.ours()
    (alone,) = found.rows({"tflops_float32": 1.0, "gbs": 1.0}, {})
    assert "tflops" not in alone and alone["over_baseline"]["p50"] == 1
