"""`make aot`: compiles every shipped configuration for GPUs that need not be there, and lists what each kernel takes.

    python -m memflow_ops.bench.aot [--renew] [--only "per query"] [--jobs 1] [--triton-36 .venv/triton-3.6.0]

It compiles with this triton and, where that is installed in a folder of its own, with 3.6.0, and writes
bench/results/aot.json. Compiled code stays in build/aot under a hash of its sources, so a run that was stopped goes on
where it was. It fails where a configuration in a half precision has no tensor-core products on sm_90 or spills
registers there, where a main loop has spills, where a program takes more shared memory than the device has, or where
the just-in-time compiler would not find in its cache what was compiled ahead of time, or where
registers or the instructions of the main loop have grown by more than 10 % over the stored table (--renew stores it
all the same).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import triton

from memflow_ops.bench.aot.gate import complaints
from memflow_ops.bench.aot.rows import compile_all
from memflow_ops.bench.harness.results import write_json

RESULT = Path(__file__).resolve().parents[1] / "results" / "aot.json"


def compile_elsewhere(folder: Path, options: list[str]) -> dict:
    """compile_all with the triton in `folder`, in a separate process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "memflow_ops.bench.aot", "--print", *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="store the table even where it has grown")
    parser.add_argument("--only", default="", help="compile only the rows with this in their name; the others stay")
    parser.add_argument("--triton-36", type=Path, default=None, help="folder that holds triton 3.6.0")
    parser.add_argument("--print", action="store_true", help="print the table of this triton and do no more")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--cache", type=Path, default=Path("build/aot"), help="folder of what was compiled before")
    arguments = parser.parse_args()
    # Triton names its cache entries by hashes of the kernel and all that it calls, its arguments and the compiler.
    os.environ["TRITON_CACHE_DIR"] = str(arguments.cache.resolve())
    tables = {triton.__version__: compile_all(arguments.jobs, arguments.only)}
    if arguments.print:
        print(json.dumps(tables))
        return 0
    if arguments.triton_36 is not None and (arguments.triton_36 / "triton").is_dir():
        options = ["--jobs", str(arguments.jobs), "--only", arguments.only, "--cache", str(arguments.cache)]
        tables |= compile_elsewhere(arguments.triton_36, options)
    else:
        print(f"aot: skipped triton 3.6.0, which is not installed in {arguments.triton_36}", file=sys.stderr)
    stored = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if arguments.only:  # the other rows stay
        tables = {version: {sm: stored.get(version, {}).get(sm, {}) | rows for sm, rows in table.items()}
                  for version, table in tables.items()}  # fmt: skip
    found = [line for version, table in tables.items() for line in complaints(version, table, stored)]
    print("\n".join(found) or f"aot: {sum(len(x) for t in tables.values() for x in t.values())} kernels pass")
    grown = [line for line in found if "grew from" in line]
    if len(found) > len(grown) or (grown and not arguments.renew):
        return 1
    write_json(RESULT, stored | tables)
    print(f"written to {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
