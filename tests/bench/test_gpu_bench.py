"""`make gpu-bench` in parts: every case has one, a part keeps to its time, and what breaks ends its process alone."""

import sys
import textwrap
import time

import pytest
import torch

from memflow_ops.bench import gpu_bench, run
from memflow_ops.bench.cases import registry
from memflow_ops.bench.harness import clock
from memflow_ops.bench.harness.outcomes import lines
from memflow_ops.bench.parts import PARTS, cases_of

CEILINGS = {"tflops_float32": 1.0, "gbs": 1.0}


def on_cuda():
    return [case for case in registry.registry() if "cuda" in case.devices and not case.group.startswith("tiny")]


def test_every_case_has_one_part():
    cases = on_cuda()
    parts = {part: [case.name for case in cases_of(part, cases)] for part in PARTS}
    assert sorted(name for names in parts.values() for name in names) == sorted(case.name for case in cases)
    for part, names in parts.items():
        for start in PARTS[part].starts:
            assert any(name.startswith(start) for name in names), f"{part}: no case begins with {start}"


def test_the_most_telling_cases_come_first():
    first = [case.name.split("/")[1] for case in cases_of("first", on_cuda())]
    assert next(iter(PARTS)) == "first" and first[:2] == ["window", "attend"]
    assert {"memory_attention", "backward", "select", "host"} <= set(first)


def session(tmp_path, named="op/select"):
    made = run.Session("cpu", ["tiny"], named, 2, tmp_path)
    made.ceilings = CEILINGS
    return made


def test_a_part_whose_time_is_over_says_what_it_has_not_measured(tmp_path):
    made = session(tmp_path)
    assert gpu_bench.measure(made, made.cases, tmp_path / "outcomes", time.monotonic() - 1) == 0
    (line,) = lines(tmp_path / "outcomes")
    assert line["outcome"] == "late" and not made.target.exists()


def test_what_is_measured_is_kept_with_the_clock(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nwhile true; do echo '1755, 640.5, 61'; sleep 0.02; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpu_bench, "_TIMED_SECONDS", 0.5)
    made = session(tmp_path)
    assert gpu_bench.measure(made, made.cases, tmp_path / "outcomes", time.monotonic() + 60) == 0
    begun, line = lines(tmp_path / "outcomes")
    assert begun["outcome"] == "begun" and line["outcome"] == "measured" and line["rounds"] > 2
    for row in run.stored(tmp_path, "cpu")["rows"]:
        assert (row["sm_mhz"], row["watts"], row["degrees"]) == (1755, 640.5, 61)


def test_without_nvidia_smi_there_is_no_clock(monkeypatch):
    monkeypatch.setattr(clock.shutil, "which", lambda name: None)
    with clock.Clock() as found:
        assert found.between(0, time.perf_counter()) == {}


@pytest.mark.parametrize("lost, code, outcome", [("", 0, "failed"), ("an illegal access", gpu_bench.ENDED, "lost")])
def test_a_case_that_breaks_the_device_ends_its_process(tmp_path, monkeypatch, lost, code, outcome):
    made = session(tmp_path)

    def broken(case):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(made, "contest", broken)
    monkeypatch.setattr(gpu_bench, "why_lost", lambda device: lost)
    assert gpu_bench.measure(made, made.cases, tmp_path / "outcomes", time.monotonic() + 60) == code
    (done,) = gpu_bench.outcomes_of(lines(tmp_path / "outcomes")).values()
    assert done["outcome"] == outcome


ENDS_EARLY = """
    import os, sys
    out, without = sys.argv[1], sys.argv[sys.argv.index("--without") + 1:]
    def say(case, outcome):
        open(out, "a").write('{"case": "%s", "outcome": "%s"}\\n' % (case, outcome))
    for case in ("a", "b", "c", "d"):
        if case in without:
            continue
        say(case, "begun")
        if case == "b":
            os._exit(11)
        if case == "c":
            say(case, "lost")
            os._exit(70)
        say(case, "measured")
"""


def test_another_process_measures_what_is_left(tmp_path):
    program = [sys.executable, "-S", "-c", textwrap.dedent(ENDS_EARLY), str(tmp_path / gpu_bench.OUTCOMES)]
    done = gpu_bench.run_part("first", tmp_path, 1.0, program)
    assert {name: of["outcome"] for name, of in done.items()} == {
        "a": "measured", "b": "died", "c": "lost", "d": "measured",
    }  # fmt: skip
    assert "status 11" in done["b"]["words"]


def test_a_device_that_is_lost_says_why(monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert gpu_bench.why_lost(torch.device("cuda")).endswith("an illegal memory access was encountered")
    assert gpu_bench.why_lost(torch.device("cpu")) == ""
