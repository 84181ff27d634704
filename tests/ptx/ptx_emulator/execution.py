"""Runs an assembled program on stretches of memory, and says what was found."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from ptx_emulator.build import core
from ptx_emulator.memory import Stretch
from ptx_emulator.operations import FINDING_KINDS, FindingKind
from ptx_emulator.program import Program
from ptx_emulator.structures import Finding, Job, Region

FINDINGS = 256
"""The most that are kept of one launch."""

LIMIT = 20_000_000
"""Instructions that a warp of a program may execute."""


@dataclass(frozen=True)
class Mode:
    """How the hardware may behave, within its rules."""

    warp_order: int = 0
    """In which warps take turns: 0 ascending, 1 descending, 2 random."""
    program_order: int = 0
    """0 ascending, 1 descending."""
    approximation: int = 0
    """Of ex2, rsqrt and the like: 0 correctly rounded, 1 anywhere within their bounds, 2 at the upper end, 3 at the
    lower."""
    truncate: int = 0
    """Tensor cores: 0 an exact sum rounded once; 1 products and sums cut off 25 bits below the largest, by eights."""


MODES = {
    "plain": Mode(),
    "hard": Mode(warp_order=2, program_order=1, approximation=1, truncate=1),
    "reverse": Mode(warp_order=1, program_order=1),
    "up": Mode(approximation=2, truncate=1),
    "down": Mode(approximation=3, truncate=1),
}


@dataclass(frozen=True)
class Found:
    """Something that one instruction did, `count` times."""

    kernel: str
    kind: FindingKind
    text: str
    count: int

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind.name} ({self.kind.meaning}), {self.count} times; {self.text}"


@dataclass(frozen=True)
class Execution:
    found: list[Found]
    executed: np.ndarray
    """How often each instruction was executed by a warp."""
    stopped: bool
    """At the limit of instructions."""


def execute(
    program: Program,
    grid: tuple[int, int, int],
    shared_bytes: int,
    parameters: np.ndarray,
    memory: list[Stretch],
    capability: int,
    mode: Mode,
    limit: int = LIMIT,
) -> Execution:
    """Run all programs of a grid.

    parameters: the bytes that ld.param reads. memory: all of the global memory that there is.
    """
    executed = np.zeros(len(program.code), np.uint64)
    findings = (Finding * FINDINGS)()
    regions = (Region * max(len(memory), 1))(
        *(Region(x.base, len(x.allowed), x.allowed.ctypes.data, x.defined.ctypes.data) for x in memory)
    )
    constants = program.constants
    job = Job(
        code=program.code.ctypes.data,
        code_length=len(program.code),
        operands=program.operands.ctypes.data,
        registers32=program.registers["r"],
        registers64=program.registers["d"],
        predicates=program.registers["p"],
        constants32=constants["r"].ctypes.data,
        constants32_count=len(constants["r"]),
        constants64=constants["d"].ctypes.data,
        constants64_count=len(constants["d"]),
        constants_pred=constants["p"].ctypes.data,
        constants_pred_count=len(constants["p"]),
        special=tuple(program.special),
        grid=tuple(grid),
        warps=program.threads // 32,
        parameters=parameters.ctypes.data,
        parameter_bytes=len(parameters),
        max_registers=program.max_registers,
        shared_bytes=shared_bytes,
        regions=ctypes.cast(regions, ctypes.c_void_p),
        region_count=len(memory),
        capability=capability,
        warp_order=mode.warp_order,
        program_order=mode.program_order,
        approximation=mode.approximation,
        truncate=mode.truncate,
        seed=1,
        limit=limit,
        findings=ctypes.cast(findings, ctypes.c_void_p),
        finding_capacity=FINDINGS,
        executed=executed.ctypes.data,
    )
    stopped = bool(core().run_job(ctypes.byref(job)))
    found = [describe(program, memory, finding) for finding in findings[: job.finding_count]]
    return Execution(found, executed, stopped)


def describe(program: Program, memory: list[Stretch], found: Finding) -> Found:
    where = hex(found.address)
    if found.region >= 0:
        stretch = memory[found.region]
        where = f"byte {found.address - stretch.base} of {stretch.names}"
    text = f"`{program.text[found.pc]}`, program {found.program}, warp {found.warp}, lane {found.lane}, {where}"
    if found.other_pc >= 0:
        text += f"; the other one: `{program.text[found.other_pc]}`"
    return Found(program.name, FINDING_KINDS[found.kind], text, found.count)
