"""`make bench` and `make bench-compare`, as processes of their own: a slowdown is caught."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from memflow_ops.bench.harness.statistics import in_turn

ROOT = Path(__file__).parents[2]


SLOWER = """
    import time
    from memflow_ops.impl import torch as torch_impl

    select = torch_impl.select_blocks

    def slow(*arguments, **options):
        time.sleep(0.05)
        return select(*arguments, **options)

    torch_impl.select_blocks = slow
"""


# Writes down which contender is timed when.
NOTED = """
    import pathlib
    from memflow_ops.bench.harness.contest import Contest

    seconds = Contest.seconds

    def noted(self, name):
        with (pathlib.Path(__file__).parent / "order").open("a") as order:
            print(name, file=order)
        return seconds(self, name)

    Contest.seconds = noted
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
        # In what it takes for one of several workers, pytest-benchmark runs everything only once.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        command = [sys.executable, "-c", code, *words, *more]
        return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)

    done = make("-p", "noted")
    assert done.returncode == 0, done.stdout + done.stderr
    contenders = ["ours", "topk", "by moments"]
    order = (tmp_path / "order").read_text().splitlines()
    assert order == [name for round in range(5) for name in in_turn(contenders, round)]
    assert len({tuple(order[i : i + 3]) for i in range(0, 15, 3)}) > 2, "every round has an order of its own"
    (stored,) = tmp_path.glob("bench-*.json")
    before = stored.read_text()
    done = make("--compare", "-p", "slower")
    assert done.returncode == 1 and "op/select/tiny/float32: ours takes" in done.stdout, done.stdout + done.stderr
    assert stored.read_text() == before, "comparing must not replace what it compares with"


def test_nothing_to_compare_with_is_one_line(tmp_path):
    words = [
        "-m",
        "pytest",
        "bench/test_cases.py",
        "-o",
        "addopts=",
        "-q",
        "--import-mode=importlib",
        "-p",
        "no:cacheprovider",
        "--compare",
        "--size",
        "tiny",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    said = done.stderr.strip().splitlines()
    assert done.returncode == 4 and len(said) == 1 and "nothing to compare with" in said[0], done.stdout + done.stderr
