"""The rows of the table: what every distinct launch of some cases takes, compiled with this process's triton."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton

from memflow_ops.bench.aot.hazards import hazards
from memflow_ops.bench.aot.jit import jit_finds
from memflow_ops.bench.aot.shipped import REPRESENTATIVE, Plan, shipped
from memflow_ops.bench.aot.swept import swept
from memflow_ops.kernels.aot import SHARED_MEMORY_LIMIT, compile_launch, launch_source

CAPABILITIES = tuple(SHARED_MEMORY_LIMIT)
OPCODES = ("HMMA", "HGMMA", "UTCHMMA", "LDGSTS")

Row = dict[str, Any]
Table = dict[str, dict[str, Row]]
"""Architecture -> case and kernel -> figures."""


def cases(capability: int, own: bool) -> dict[str, Plan]:
    """What is compiled for an architecture. own: with the triton that comes with this torch, not with another one."""
    everything = {90, 80, 100} if own else {90}
    return {name: plan for name, plan in shipped().items() if capability in everything or name in REPRESENTATIVE}


def figures(capability: int, case: str, index: int) -> Row:
    """What one launch of a case takes, or the error of the compiler."""
    launch = (shipped() | swept())[case](capability)[index]
    try:
        machine = compile_launch(launch, capability)
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    row: Row = {
        "registers": machine.registers,
        "spills": machine.spills,
        "shared_bytes": machine.shared_bytes,
        **{name: machine.opcodes[name] for name in OPCODES if machine.opcodes[name]},
        "instructions": machine.opcodes.total(),
        "loop_instructions": machine.loop_opcodes.total(),
        "loop_spills": machine.loop_spills,
        "barriers_outside": machine.opcodes["BAR"] - machine.loop_opcodes["BAR"],
    }
    if machine.remarks:
        row["remarks"] = list(machine.remarks)
    if found := hazards(machine.code):
        row["hazards"] = found
    if not jit_finds(launch, capability):
        row["jit_compiles_anew"] = True
    return row


def compile_all(plans: dict[int, dict[str, Plan]], jobs: int, only: str) -> Table:
    """The rows of the cases of each capability. Only those with `only` in their name."""
    # Cases share launches: each is compiled once, and its row has the name of the first case with it.
    rows: dict[tuple[int, str], tuple[int, str, int]] = {}
    known = set()
    for capability, planned in plans.items():
        for case, plan in planned.items():
            for index, launch in enumerate(plan(capability)):
                source = launch_source(launch)
                key, name = (capability, source.hash(), str(launch.options)), f"{case}: {launch.kernel.fn.__name__}"
                if key not in known and only in name:
                    rows[capability, name] = (capability, case, index)
                known.add(key)
    result: Table = {f"sm_{capability}": {} for capability in plans}
    if not rows:
        return result
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.map(figures, *zip(*rows.values(), strict=True))
        for (capability, name), row in zip(rows, done, strict=True):
            result[f"sm_{capability}"][name] = row
            print(f"triton {triton.__version__} sm_{capability} {name} {row}", file=sys.stderr, flush=True)
    return result
