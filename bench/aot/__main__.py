"""`make aot`: compiles the kernels for GPUs that need not be there, and lists what each takes.

    python -m memflow_ops.bench.aot [--renew] [--only "per query"] [--jobs 1] [--triton .venv/triton-3.6.0 ...]

With this triton: every shipped configuration for sm_80, sm_90 and sm_100, the REPRESENTATIVE ones for sm_86, sm_89 and
sm_120, and the shapes of swept.py for sm_90. With each other triton (--triton: a folder with one): every shipped
configuration for sm_90, the REPRESENTATIVE ones for the others.

It writes bench/results/aot.json, without the shapes, unless something has grown. Compiled code stays in build/aot under
a hash of its sources, so a run that was stopped goes on where it was. It fails where

- the just-in-time compiler would not find in its cache what was compiled ahead of time;
- a configuration in a half precision has no tensor-core products on sm_90 or spills registers there, a main loop has
  spills (other tritons and the shapes: spills of more than 2.5 % of its instructions), or a program takes more shared
  memory than the device has;
- on sm_90 ptxas lets products wait for one another, or the machine code touches registers or overwrites buffers of a
  product in flight (hazards.py);
- registers, the instructions of the main loop or the barriers outside of it have grown by more than 10 % over the
  stored table (--renew stores it all the same).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import triton

from memflow_ops.bench.aot.gate import complaints
from memflow_ops.bench.aot.rows import CAPABILITIES, cases, compile_all
from memflow_ops.bench.aot.swept import swept
from memflow_ops.bench.harness.results import write_json

RESULT = Path(__file__).resolve().parents[1] / "results" / "aot.json"


def compile_elsewhere(folder: Path, options: list[str]) -> dict:
    """The table of the triton in `folder`, by its version, from a separate process."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "memflow_ops.bench.aot", "--print", *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="store the table even where it has grown")
    parser.add_argument("--only", default="", help="compile only the rows with this in their name; the others stay")
    parser.add_argument("--triton", type=Path, nargs="*", default=[], help="folders that hold other tritons")
    parser.add_argument("--print", action="store_true", help="print the table of this triton, as of one of the others")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    parser.add_argument("--cache", type=Path, default=Path("build/aot"), help="folder of what was compiled before")
    arguments = parser.parse_args()
    # Triton names its cache entries by hashes of the kernel and all that it calls, its arguments and the compiler.
    os.environ["TRITON_CACHE_DIR"] = str(arguments.cache.resolve())
    plans = {capability: cases(capability, own=not arguments.print) for capability in CAPABILITIES}
    tables = {triton.__version__: compile_all(plans, arguments.jobs, arguments.only)}
    if arguments.print:
        print(json.dumps(tables))
        return 0
    shapes = compile_all({90: swept()}, arguments.jobs, arguments.only)
    for folder in arguments.triton:
        if (folder / "triton").is_dir():
            options = ["--jobs", str(arguments.jobs), "--only", arguments.only, "--cache", str(arguments.cache)]
            tables |= compile_elsewhere(folder, options)
        else:
            print(f"aot: skipped the triton of {folder}, where none is installed", file=sys.stderr)
    stored = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if arguments.only:  # the other rows stay
        tables = {version: {sm: stored.get(version, {}).get(sm, {}) | rows for sm, rows in table.items()}
                  for version, table in tables.items()}  # fmt: skip
    found = []
    for version, table in tables.items():
        found += complaints(version, table, stored, strict=version == triton.__version__)
    found += complaints(triton.__version__, shapes, {}, strict=False)
    count = sum(len(rows) for table in (*tables.values(), shapes) for rows in table.values())
    print("\n".join(found) or f"aot: {count} kernels pass")
    grown = [line for line in found if "grew from" in line]
    if grown and not arguments.renew:
        return 1  # the table that they have grown over stays
    write_json(RESULT, stored | tables)
    print(f"written to {RESULT}")
    return int(len(found) > len(grown))


if __name__ == "__main__":
    sys.exit(main())
