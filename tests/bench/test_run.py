"""A session: what is measured again, what is measured once, and what fails without losing the rest."""

import time
from dataclasses import replace

import pytest
import torch

from memflow_ops.bench import run
from memflow_ops.bench.harness import results
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.impl import torch as torch_impl

CEILINGS = {"tflops_float32": 1.0, "gbs": 1.0}


TIMED = {"p20": 0.9, "p50": 1.0, "p80": 1.3}, {"p20": 0.9, "p50": 1.0, "p80": 1.1}


@pytest.mark.parametrize(
    "name, rounds, before, ratios, measured, said",
    [
        ("op/select", 3, TIMED[0], [1.2] * 3 + [1.05] * 6, 9, ""),
        ("op/select", 3, TIMED[0], [1.2] * 3 + [1.11] * 6, 9, "+11 % (within the spread)"),
        ("op/select", 3, TIMED[1], [1.2] * 3, 3, "+20 %"),  # no doubt
        ("op/select", 3, TIMED[1], [1.09] * 3, 3, ""),
        ("stream/chunk", 10, TIMED[0], [1.2] * 10 + [1.11] * 10, 20, "+11 %"),  # as the history has room
        ("stream/chunk", 20, TIMED[0], [1.2] * 20 + [1.11] * 40, 60, "+11 %"),  # no history grows
    ],
)
def test_what_is_in_doubt_is_measured_once_more(tmp_path, name, rounds, before, ratios, measured, said):
    session = run.Session("cpu", ["tiny"], name, rounds, tmp_path, contenders=["sink"] if rounds == 20 else [])
    session.ceilings = CEILINGS
    ways = {"ours": Contender(lambda: None, lambda: None), "none": Contender(lambda: None, lambda: None)}
    found = session.contest(replace(session.cases[0], build=lambda *_: Built(ways)))
    left = list(ratios)
    found.seconds = lambda name: left.pop(0) if name == OURS else 1.0
    for _ in range(rounds):
        found.run_round()
    (ours, *_) = session.rows(found)
    results.keep(session.target, [{**ours, "over_baseline": before}], {}, session.about)
    words = session.worse(found)
    assert len(ratios) - len(left) == measured and not left
    assert said in words and bool(said) is bool(words)


def test_ceilings_are_measured_once(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(run, "copy_ceiling", lambda device: measured.append("copy") or 1.0)
    monkeypatch.setattr(run, "product_ceiling", lambda device, dtype: measured.append(dtype) or 2.0)
    session = run.Session("cpu", ["tiny"], "op/select", 2, tmp_path)
    (case,) = session.cases
    for dtype in ("float32", "bfloat16", "float32"):
        session.contest(replace(case, dtype=dtype))
    assert measured == ["copy", "float32", "bfloat16"]
    assert session.ceilings == {"gbs": 1.0, "tflops_float32": 2.0, "tflops_bfloat16": 2.0}


def test_only_some_contenders_are_timed_and_the_rows_of_others_stay(tmp_path):
    names = ["ours", "none", "sink", "memflow, chosen once"]
    ways = {name: Contender(lambda: None, lambda: None) for name in names}

    def rows_of(**options):
        session = run.Session("cpu", ["tiny"], "op/select", 1, tmp_path, **options)
        session.ceilings = CEILINGS
        contest = session.contest(replace(session.cases[0], build=lambda *_: Built(dict(ways))))
        contest.run_round()
        session.finish(contest)
        return list(contest.calls), [row["contender"] for row in results.load_bench(session.target)["rows"]]

    assert rows_of() == (names, names)
    some = ["ours", "none", "memflow, chosen once"]
    assert rows_of(contenders=["chosen once"]) == (some, [*some, "sink"])
    del ways["sink"]
    assert rows_of() == (some, some)


@torch.no_grad()
def test_a_slower_write_is_caught(tmp_path, monkeypatch):
    """Streams without memory do it too, so that their ratios do not show it."""
    session = run.Session("cpu", ["tiny"], "op/write_projections", 5, tmp_path)
    session.ceilings = CEILINGS
    assert [case.name.split("/")[1] for case in session.cases] == ["write_projections", "write_projections_clean"]
    assert run.measure(session, lambda *_: None)[1] == {}
    right = torch_impl.write_projections
    monkeypatch.setattr(torch_impl, "write_projections", lambda *of, **more: time.sleep(0.05) or right(*of, **more))
    session = run.Session("cpu", ["tiny"], "op/write_projections", 5, tmp_path, compare=True)
    session.ceilings = CEILINGS
    for case in session.cases:
        slower = session.contest(case)
        for _ in range(5):
            slower.run_round()
        assert f"{case.name}: ours takes" in session.worse(slower)


def test_a_case_that_fails_does_not_lose_the_others(tmp_path):
    session = run.Session("cpu", ["tiny"], "op/select", 2, tmp_path)
    session.ceilings = CEILINGS

    def broken(*_):
        raise RuntimeError("no such kernel")

    session.cases.insert(0, replace(session.cases[0], name="broken", build=broken))
    rows, failed = run.measure(session, lambda *_: None)
    assert failed == {"broken": "RuntimeError: no such kernel"}
    assert {row["case"] for row in rows} == {"op/select/tiny/float32"}
