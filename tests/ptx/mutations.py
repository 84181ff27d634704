"""Does the emulator see what is missing? Barriers, waits and fences are taken out of compiled kernels, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import ptx_cases
from ptx_emulator.operations import OPCODES
from ptx_emulator.program import Program

REMOVABLE = (
    "bar_sync",
    "bar_warp_sync",
    "cp_async_commit_group",
    "cp_async_wait_group",
    "fence_proxy_async",
    "wgmma_fence",
    "wgmma_commit_group",
    "wgmma_wait_group",
)
HARMLESS = {
    "bar_sync": "Between two barriers that remain nothing is exchanged that they do not order, or both sides write the "
    "same values.",
    "bar_warp_sync": "Lanes of a warp run in lockstep here, so that such an exchange is noted and called no fault.",
    "cp_async_commit_group": "Copies that are not committed join the next group; where that one is waited for too, or "
    "nothing was copied, nothing changes.",
    "cp_async_wait_group": "The wait before it or after it also covers these copies before they are read.",
    "fence_proxy_async": "Another fence stands between the store and the product.",
    "wgmma_fence": "No register of the product was written since the fence before, or ptxas orders the write.",
    "wgmma_commit_group": "The product joins the next group, which is waited for.",
    "wgmma_wait_group": "The next wait comes before registers or shared memory are touched.",
}
"""Why taking one out may change nothing."""


@dataclass(frozen=True)
class Mutation:
    """One instruction of one compiled kernel of a case."""

    kernel: str
    length: int
    """Instructions of the program: a kernel may be compiled in several forms."""
    pc: int
    kind: str
    text: str

    def apply(self, program: Program) -> Program:
        if (program.name, len(program.code)) != (self.kernel, self.length):
            return program
        code = program.code.copy()
        code[self.pc]["opcode"] = OPCODES["removed"]
        return replace(program, code=code)


def mutations(case: str, capability: int) -> list[Mutation]:
    """What can be taken out of the kernels of a case, as far as it was executed. The case must be right."""
    error, emulator = ptx_cases.execute_case(case, capability)
    assert not error and not emulator.faults, (error, emulator.faults)
    executed: dict[tuple[str, int], np.ndarray] = {}
    programs: dict[tuple[str, int], Program] = {}
    for program, execution in emulator.executions:
        key = program.name, len(program.code)
        executed[key] = executed.get(key, 0) + execution.executed
        programs[key] = program
    kinds = {OPCODES[kind]: kind for kind in REMOVABLE}
    return [
        Mutation(*key, pc, kinds[opcode], program.text[pc])
        for key, program in programs.items()
        for pc, opcode in enumerate(program.code["opcode"].tolist())
        if opcode in kinds and executed[key][pc]
    ]


def verdict(case: str, capability: int, mutation: Mutation) -> str:
    """`seen` by a fault, `noted` by a new kind of finding that is none, `wrong` by the result alone, or `unseen`."""
    error, emulator = ptx_cases.execute_case(case, capability, change=mutation.apply)
    if emulator.faults:
        return "seen"
    if error:
        return "wrong"
    _, before = ptx_cases.execute_case(case, capability)
    kinds = {found.kind for found in emulator.found} - {found.kind for found in before.found}
    return "noted" if kinds else "unseen"


def verdicts(case: str, capability: int) -> Iterator[tuple[Mutation, str]]:
    """Of all mutations of a case."""
    for mutation in mutations(case, capability):
        yield mutation, verdict(case, capability, mutation)


def kinds_seen(case: str, capability: int, kernel: str) -> dict[str, set[str]]:
    """By kind of instruction, the verdicts until one of them is seen."""
    found: dict[str, set[str]] = {}
    for mutation in mutations(case, capability):
        kind = found.setdefault(mutation.kind, set())
        if mutation.kernel == kernel and "seen" not in kind:
            kind.add(verdict(case, capability, mutation))
    return found


def without_all(case: str, capability: int, kernel: str, kind: str) -> set[str]:
    """The kinds of finding where every instruction of a kind is taken out of a kernel."""

    def apply(program: Program) -> Program:
        for mutation in taken:
            program = mutation.apply(program)
        return program

    taken = [m for m in mutations(case, capability) if (m.kernel, m.kind) == (kernel, kind)]
    _, emulator = ptx_cases.execute_case(case, capability, change=apply)
    return {found.kind.name for found in emulator.found}
