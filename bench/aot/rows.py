"""The rows of the table: what every distinct launch of the shipped configurations takes, compiled with this triton."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton

from memflow_ops.bench.aot.jit import jit_finds
from memflow_ops.bench.aot.shipped import shipped
from memflow_ops.kernels.aot import compile_launch, launch_source

CAPABILITIES = (80, 90, 100)
OPCODES = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS")


def figures(capability: int, case: str, index: int) -> dict[str, Any]:
    """What one launch of a case takes, or the error of the compiler."""
    launch = shipped()[case](capability)[index]
    try:
        machine = compile_launch(launch, capability)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    return {
        "registers": machine.registers,
        "spills": machine.spills,
        "shared_bytes": machine.shared_bytes,
        **{name: machine.opcodes[name] for name in OPCODES if machine.opcodes[name]},
        "instructions": machine.opcodes.total(),
        "loop_instructions": machine.loop_opcodes.total(),
        "loop_spills": machine.loop_spills,
        **({} if jit_finds(launch, capability) else {"jit_compiles_anew": True}),
    }


def compile_all(jobs: int, only: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Architecture -> case and kernel -> figures, with this process's triton. Only rows with `only` in their name."""
    # Cases share launches: each is compiled once, and its row has the name of the first case with it.
    rows: dict[tuple[int, str], tuple[int, str, int]] = {}
    known = set()
    for capability in CAPABILITIES:
        for case, launches in shipped().items():
            for index, launch in enumerate(launches(capability)):
                source = launch_source(launch)
                key, name = (capability, source.hash(), str(launch.options)), f"{case}: {launch.kernel.fn.__name__}"
                if key not in known and only in name:
                    rows[capability, name] = (capability, case, index)
                known.add(key)
    result: dict[str, dict[str, dict[str, Any]]] = {f"sm_{capability}": {} for capability in CAPABILITIES}
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.map(figures, *zip(*rows.values(), strict=True))
        for (capability, name), row in zip(rows, done, strict=True):
            result[f"sm_{capability}"][name] = row
            print(f"triton {triton.__version__} sm_{capability} {name} {row}", file=sys.stderr, flush=True)
    return result
