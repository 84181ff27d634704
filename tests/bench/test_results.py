"""Result files: what is kept, compared, damaged, and how the charts read it."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from memflow_ops.bench import run
from memflow_ops.bench.harness import contest, results, statistics
from memflow_ops.bench.harness.case import OURS
from memflow_ops.bench.report import svg, table, webpage
from memflow_ops.cli import main
from memflow_ops.environment import environment

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def row(ratio: float, **more) -> dict:
    spread = {"p20": ratio, "p50": ratio, "p80": ratio}
    return {
        "case": "a/case",
        "level": "op",
        "size": "tiny",
        "dtype": "float32",
        "contender": OURS,
        "baseline": "none",
        "seconds": spread,
        "over_baseline": spread,
        "ours_over_this": spread,
        "rounds": 5,
        "settings": {"top_k": 4},
        "torch": "2",
        "commit": "c",
        "date": "2026-01-01",
        **more,
    }


def test_one_round_decides_nothing(tmp_path):
    once = statistics.paired([1.4], [1.0])
    assert not statistics.decided(once, 1) and table.overhead(once, 1) == "+40.0 % (one round)"
    assert table.milliseconds(statistics.quantiles([0.02]), 1) == "20.0 (one round)"
    assert svg.spread(*webpage.percent(once)) == "40"
    about = {"device": "here", "commit": "c", "date": "2026-01-01"}
    for before, now, in_doubt in ((3, 3, False), (1, 3, True), (3, 1, True)):
        results.keep(tmp_path / "bench.json", [row(1.0, rounds=before)], {}, about)
        assert results.compared(row(1.4, rounds=now), tmp_path / "bench.json").in_doubt is in_doubt


def test_more_than_a_tenth_is_worse(tmp_path):
    target = tmp_path / "bench.json"
    about = {"device": "here", "commit": "c", "date": "2026-01-01"}
    with pytest.raises(ValueError, match="run `make bench` first"):
        results.compared(row(1.0), target)
    results.keep(target, [row(1.2)], {"gbs": 1.0}, about)
    assert results.compared(row(1.31), target) is None
    worse = results.compared(row(1.33), target)
    assert "a/case: ours takes 1.330 times none" in worse.words and "+11 %" in worse.words and not worse.in_doubt
    worse = results.compared(row(1.33, over_baseline={"p20": 1.19, "p50": 1.33, "p80": 1.4}), target)
    assert "(within the spread)" in worse.words and worse.in_doubt
    with pytest.raises(ValueError, match=r"stored with other settings in bench\.json, run .*: a/case"):
        results.compared(row(1.0, settings={"top_k": 5}), target)
    with pytest.raises(ValueError, match=r"no stored result in bench\.json, run `make bench` first: another/case"):
        results.compared(row(1.0, case="another/case"), target)


def test_results_are_replaced_by_case_and_history_by_commit(tmp_path):
    target = tmp_path / "bench.json"
    about = {"device": "here", "commit": "c", "date": "2026-01-01"}
    results.keep(target, [row(1.2)], {"gbs": 1.0}, about)
    results.keep(target, [row(1.3, case="b/case")], {"tflops_float32": 2.0}, about)
    results.keep(target, [row(1.1)], {"gbs": 3.0}, {**about, "commit": "d"})
    kept = json.loads(target.read_text())
    assert {r["case"]: r["over_baseline"]["p50"] for r in kept["rows"]} == {"a/case": 1.1, "b/case": 1.3}
    assert kept["ceilings"] == {"gbs": 3.0, "tflops_float32": 2.0}
    assert [(entry["commit"], sorted(entry["ratios"])) for entry in kept["history"]] == [
        ("c", ["a/case", "b/case"]),
        ("d", ["a/case"]),
    ]


def test_a_damaged_file_does_not_cost_what_was_just_measured(tmp_path):
    device = torch.device("cpu")
    target = results.record(tmp_path, device, "gpu_test", {"passed": 1})
    for damage in ("{", "[1, 2]"):
        target.write_text(damage)
        results.record(tmp_path, device, "gpu_bench", {"rounds": 3})
        assert target.with_suffix(".damaged").read_text() == damage
    results.record(tmp_path, device, "gpu_test", {"passed": 2})
    found = json.loads(target.read_text())
    assert (found["gpu_bench"], found["gpu_test"]) == ({"rounds": 3}, {"passed": 2})


def test_charts_keep_banks_and_sizes_apart():
    def stream(bank: int, size: str = "wan-1.3b") -> dict:
        case = f"stream/chunk/{size}/float32/history-80" + ("" if bank == 3 else f"/bank-{bank}")
        return row(1 + bank / 100, case=case, level="stream", size=size, settings={"bank_frames": bank, "history": 80})

    def op(bank: int, size: str = "wan-1.3b") -> dict:
        case = f"op/memory_attention/{size}/float32/bank-{bank}"
        return row(1.5, case=case, size=size, settings={"bank_frames": bank})

    chart = webpage.streams([stream(3), stream(64)])
    titles = re.findall("<title>(.*?)</title>", chart)
    assert titles == [f"memflow, bank {n}, float32, history 80, memflow: {n}" for n in (3, 64)]
    assert "aim: 7.9 %" in chart
    assert len(re.findall("<title>", webpage.streams([stream(3), stream(3, "tiny")]))) == 2
    chart = webpage.bank_sizes([stream(64), op(4), op(16)])
    assert chart.count("<circle") == 3 and "frames in the bank (wan-1.3b, float32)" in chart  # one is the legend's
    chart = webpage.bank_sizes([op(4), op(16, "tiny")])
    assert "memory_attention, tiny, float32" in chart and "memory_attention, wan-1.3b, float32" in chart
    assert webpage.bank_sizes([stream(64)]) == ""


def test_what_cannot_be_compared_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(contest.Contest, "__init__", lambda *_: pytest.fail("measured"))
    session = run.Session("cpu", ["tiny"], "op/", 2, tmp_path)

    def kept(**more) -> None:
        rows = [row(1.0, case=case.name, settings=case.all_settings()) for case in session.cases[1:]]
        results.keep(session.target, [*rows, row(1.0, **more)], {}, session.about)

    def compare() -> None:
        run.Session("cpu", ["tiny"], "op/", 2, tmp_path, compare=True)

    first = session.cases[0]
    with pytest.raises(ValueError, match="does not exist; run `make bench` first"):
        compare()
    kept()
    with pytest.raises(ValueError, match=f"no stored result in .* first: {first.name}$"):
        compare()
    kept(case=first.name, settings={**first.all_settings(), "top_k": 99})
    with pytest.raises(ValueError, match=f"other settings in .* again: {first.name}$"):
        compare()
    kept(case=first.name, settings=first.all_settings())
    compare()


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": [{}]},
        {"rows": [1]},
        {"rows": [row(1.0) | {"seconds": 1.0}]},
        {"rows": [row(1.0) | {"over_baseline": {"p50": "fast"}}]},
        {"rows": [{k: v for k, v in row(1.0).items() if k != "torch"}]},
        {"history": [1]},
        {"history": [{"commit": "c", "date": "d", "ratios": {"a": 1}}]},
        {"ceilings": {"gbs": None}},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_results_that_are_damaged_inside_are_one_line(damage, tmp_path, capfd):
    target = results.bench_file(tmp_path, environment(CPU))
    whole = {"device": "here", "rows": [row(1.0)], "history": [], "ceilings": {"gbs": 1.0}}
    results.write_json(target, whole)
    assert results.load_bench(target)["rows"]
    target.write_text(json.dumps(whole | damage))
    with pytest.raises(SystemExit) as end:
        main(["bench", "--device", "cpu", "--stored", "--out", str(tmp_path)])
    words = capfd.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(words) == 1 and "is damaged" in words[0]
    with pytest.raises(ValueError, match="is damaged"):
        run.Session("cpu", ["tiny"], "op/select", 2, tmp_path)


def test_two_runs_in_one_folder_keep_each_others_rows(tmp_path):
    target, about = tmp_path / "bench.json", {"device": "here", "commit": "c", "date": "2026-01-01"}

    def run_of(name: str) -> None:
        for number in range(20):
            results.keep(target, [row(1.0, case=f"{name}/{number}")], {}, about)

    with ThreadPoolExecutor(4) as pool:  # The lock keeps out other threads as well as other processes.
        list(pool.map(run_of, "abcd"))
    found = {kept["case"] for kept in results.load_bench(target)["rows"]}
    assert found == {f"{name}/{number}" for name in "abcd" for number in range(20)}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
