"""Does the emulator see what is missing? Barriers, waits and fences are taken out of compiled kernels, one by one."""

from __future__ import annotations

from collections.abc import Collection
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
    "mbarrier_arrive",
    "mbarrier_arrive_expect_tx",
    "mbarrier_try_wait",
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
    "mbarrier_arrive": "Nobody waits for the phase that then does not end.",
    "mbarrier_arrive_expect_tx": "Nobody waits for the phase that then does not end.",
    "mbarrier_try_wait": "A slot is filled for the first time, or a wait for a later phase covers this one.",
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
        code[self.pc]["opcode"] = OPCODES["waited" if self.kind == "mbarrier_try_wait" else "removed"]
        return replace(program, code=code)


@dataclass(frozen=True)
class Subject:
    """A case on one architecture, which is right when nothing is taken out."""

    case: str
    capability: int
    mutations: list[Mutation]
    """What can be taken out of its kernels, as far as it was executed."""
    notes: set[str]
    """Kinds of finding that it has anyway, none of them a fault."""

    @classmethod
    def of(cls, case: str, capability: int) -> Subject:
        error, emulator = ptx_cases.execute_case(case, capability)
        assert not error and not emulator.faults, (error, emulator.faults)
        executed: dict[tuple[str, int], np.ndarray] = {}
        programs: dict[tuple[str, int], Program] = {}
        for program, execution in emulator.executions:
            key = program.name, len(program.code)
            executed[key] = executed.get(key, 0) + execution.executed
            programs[key] = program
        kinds = {OPCODES[kind]: kind for kind in REMOVABLE}
        found = [
            Mutation(*key, pc, kinds[opcode], program.text[pc])
            for key, program in programs.items()
            for pc, opcode in enumerate(program.code["opcode"].tolist())
            if opcode in kinds and executed[key][pc]
        ]
        return cls(case, capability, found, {found.kind.name for found in emulator.found})

    def verdict(self, mutation: Mutation) -> str:
        """`seen` by a fault, `noted` by a new kind of finding that is none, `wrong` by the result, or `unseen`."""
        error, emulator = ptx_cases.execute_case(self.case, self.capability, change=mutation.apply)
        if emulator.faults:
            return "seen"
        if error:
            return "wrong"
        return "noted" if {found.kind.name for found in emulator.found} - self.notes else "unseen"


def verdicts(case: str, capability: int) -> list[tuple[Mutation, str]]:
    """Of all mutations of a case."""
    subject = Subject.of(case, capability)
    return [(mutation, subject.verdict(mutation)) for mutation in subject.mutations]


def kinds_seen(case: str, capability: int, kernel: str, kinds: Collection[str] = REMOVABLE) -> dict[str, set[str]]:
    """By kind of instruction, the verdicts until one of them is seen."""
    subject, found = Subject.of(case, capability), {}
    for mutation in subject.mutations:
        if mutation.kind not in kinds:
            continue
        kind = found.setdefault(mutation.kind, set())
        if mutation.kernel == kernel and "seen" not in kind:
            kind.add(subject.verdict(mutation))
    return found


def without_all(case: str, capability: int, kernel: str, kind: str) -> set[str]:
    """The kinds of finding where every instruction of a kind is taken out of a kernel."""
    taken = [m for m in Subject.of(case, capability).mutations if (m.kernel, m.kind) == (kernel, kind)]

    def apply(program: Program) -> Program:
        for mutation in taken:
            program = mutation.apply(program)
        return program

    _, emulator = ptx_cases.execute_case(case, capability, change=apply)
    return {found.kind.name for found in emulator.found}
