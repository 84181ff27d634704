"""`make gpu-test` survives tests that hang, break the device or end their process, and tells what became of each."""

import shutil
import sys
import time
from pathlib import Path

import pytest

from memflow_ops.bench import gpu_test
from memflow_ops.bench.harness.outcomes import append, lines

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The result and the summary of a run of planted_gpu_tests.py, and the file of outcomes."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copy(HERE / "planted_gpu_tests.py", folder / "test_planted.py")
    shutil.copy(HERE.parent / "gpu" / "conftest.py", folder / "conftest.py")
    ptxas = folder / "ptxas"
    ptxas.touch(0o755)
    outcomes = folder / "out" / "gpu-test.jsonl"
    python = (sys.executable, "-B")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_test, "system_ptxas", lambda: str(ptxas))
        patch.setattr(gpu_test, "_PROCESSES", 2)
        patch.setattr(gpu_test, "_PYTEST", (*gpu_test._PYTEST, "--rootdir", str(folder)))
        run = gpu_test.Run(str(folder / "test_planted.py"), outcomes, time.monotonic() + 900, limit=15.0, python=python)
        patch.setattr(gpu_test, "ROOT", folder)
        patch.setenv("PYTHONPATH", str(HERE.parents[1]))
        patch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this test may itself run in such a process
        result = gpu_test.run_all(run)
    return result, gpu_test.summary(result), outcomes


def names(tests):
    return {test.rpartition("::")[2] for test in tests}


def test_every_end_is_told_from_the_others(planted):
    result, _, _ = planted
    assert result["passed"] == 4 and result["skipped"] == 1 and not result["not_run"]
    assert names(result["failed"]) == {"test_wrong", "test_whose_failure_is_only_reported"}
    assert names(result["hung"]) == {"test_that_hangs"}
    assert names(result["lost"]) == {"test_that_breaks_the_device"}
    assert names(result["died"]) == {"test_that_ends_its_process", "test_that_needs_another_ptxas"}
    assert result["skip_reasons"] == {"Skipped: for a reason": 1}


def test_what_broke_is_tried_again_with_another_ptxas(planted):
    result, words, _ = planted
    (ptxas, *tries) = result["second_try"].values()
    assert ptxas.endswith("ptxas") and sorted(tries) == ["died", "lost", "passed"]
    assert f"tried again with {ptxas}" in words


def test_the_summary_names_every_test_that_is_not_right(planted):
    result, words, _ = planted
    assert "one is not two" in words and "an illegal memory access" in result["words"][result["lost"][0]]
    assert "failed (reported only)" in words and "as the sanitizer says" in words
    assert len(gpu_test.failures(result)) == 5 and "5 tests are not right" in words


def test_every_test_has_a_line_on_disk(planted):
    _, _, outcomes = planted
    assert len(names(line["test"] for line in lines(outcomes))) == 11


def test_a_line_that_was_cut_off_does_not_hide_the_others(tmp_path):
    target = tmp_path / "some" / "outcomes.jsonl"
    append(target, test="a", outcome="passed")
    with target.open("a") as file:
        file.write('{"test": "b", "outc\n')
    append(target, test="c", outcome="failed")
    assert [line["test"] for line in lines(target)] == ["a", "c"]


def test_time_that_is_over_leaves_tests_out_and_says_so(tmp_path):
    run = gpu_test.Run("tests/gpu", tmp_path / "outcomes.jsonl", time.monotonic())
    run.alone(["tests/gpu/test_triton.py::test_that_is_not_run"])
    result = {
        **{name: [] for name in gpu_test._BAD},
        "passed": 1,
        "skipped": 0,
        "not_run": ["a test"],
        "skip_reasons": {},
    }
    result |= {"report_only": {}, "words": {}, "second_try": {}, "seconds": 1}
    assert not lines(run.outcomes) and "because time was over: a test" in gpu_test.summary(result)
    assert gpu_test.failures(result) == ["a test"]
