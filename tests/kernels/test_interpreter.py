"""Runs the tests in interpreter/ in a process of their own (why: interpreter/conftest.py) and shows their output."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreter")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process collects the tests itself")
def test_kernels_in_the_interpreter(capsys, record_property):
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-p", "no:cacheprovider", "--durations=5"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True)
    summary = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else "no output"
    passed = re.search(r"(\d+) passed", summary)
    assert run.returncode == 0, run.stdout + run.stderr
    assert passed and int(passed[1]) >= 30, f"too few tests ran in the interpreter: {run.stdout}"
    record_property("interpreter_tests", int(passed[1]))
    with capsys.disabled():
        print(f"\nin the interpreter: {summary}")
