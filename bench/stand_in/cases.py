"""The benchmarks of a part on the stand-in: every case is built, called and timed, and its launches are recorded.

PYTHONOPTIMIZE=1 python -m memflow_ops.bench.stand_in.cases PART FILE [--gpu H100]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from memflow_ops.bench.cases import attention_inputs, backward, checked_cache, selection
from memflow_ops.bench.harness import correctness
from memflow_ops.bench.harness.contest import Contest
from memflow_ops.bench.parts import cases_of
from memflow_ops.bench.run import Session
from memflow_ops.bench.stand_in.gpu import Gpu, gpu_of, install, quiet
from memflow_ops.bench.stand_in.launches import Recorder

_ROUNDS = 2


def look_at_less() -> None:
    """Check one head and query group of each contender, over one copy of the inputs: of all that a case does, only the
    calls of contenders and selections launch kernels, and these stay."""
    for module in (correctness, attention_inputs, backward, checked_cache, selection):
        module.sampled = lambda heads, groups: iter([(0, 0)])  # type: ignore[attr-defined]
    backward.Gradients.exact = (  # type: ignore[method-assign]
        lambda self, head: [x.detach()[0, :, head].double() for x in self.tensors]
    )
    Contest._copies_of_inputs = lambda self: 1  # type: ignore[method-assign]


@torch.no_grad()
def run_part(part: str, gpu: Gpu, target: Path) -> list[str]:
    """Run the cases of a part and write what was recorded. Returns the names of the cases whose Python failed."""
    if __debug__:
        raise ValueError("the stand-in computes no values that a check could hold for: set PYTHONOPTIMIZE=1")
    install(gpu)
    recorder = Recorder(gpu)
    recorder.start()
    look_at_less()
    failed = []
    with tempfile.TemporaryDirectory() as folder, quiet():
        session = Session("cuda", out=Path(folder))
        for case in cases_of(part, session.cases):
            recorder.now, began = case.name, time.monotonic()
            try:
                contest = session.contest(case)
                for _ in range(_ROUNDS):
                    contest.run_round()
                session.finish(contest)
            except Exception:  # The other cases are to be recorded.
                traceback.print_exc()
                failed.append(case.name)
            print(f"{time.monotonic() - began:7.1f} s  {case.name}", file=sys.stderr, flush=True)
    recorder.write(target)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("file", type=Path)
    parser.add_argument("--gpu", default="H100", help="as `gpu_of` takes it")
    options = parser.parse_args()
    failed = run_part(options.part, gpu_of(options.gpu), options.file)
    for name in failed:
        print(f"{name} does not run on the stand-in", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
