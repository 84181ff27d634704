"""Puts the emulator in the place of a GPU: planned launches run as PTX on tensors of the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from unittest.mock import patch

import torch

import memflow_ops.impl
import memflow_ops.impl.triton  # all modules of the kernels, whose capability_of is replaced
from memflow_ops.kernels import configs
from memflow_ops.kernels.launch import Launch, tensors_in
from ptx_emulator.compiling import compile_to_ptx, parameter_bytes
from ptx_emulator.execution import MODES, Execution, Found, Mode, execute
from ptx_emulator.memory import Written, stretches
from ptx_emulator.program import Program


@dataclass
class Emulator:
    """Takes the place of a GPU, see `emulated`."""

    capability: int
    mode: Mode = field(default_factory=Mode)
    written: Written = field(default_factory=Written)
    executions: list[tuple[Program, Execution]] = field(default_factory=list)
    """What ran, in order."""
    change: Callable[[Program], Program] = lambda program: program
    """What is done to a program before it runs."""

    @property
    def found(self) -> list[Found]:
        return [found for _, execution in self.executions for found in execution.found]

    @property
    def faults(self) -> list[Found]:
        return [found for found in self.found if found.kind.fault]

    def run(self, launch: Launch) -> None:
        """Compile a launch to PTX and run it on its tensors."""
        if prod(launch.grid) == 0:
            return
        compiled, flat = compile_to_ptx(launch, self.capability)
        program = self.change(compiled.program)
        assert program.threads == 32 * compiled.warps
        parameters = parameter_bytes(compiled, flat)
        tensors = [(name, x) for name, value in launch.arguments.items() for x in tensors_in((value,))]
        memory = stretches(tensors, self.written)
        done = execute(program, launch.grid, compiled.shared_bytes, parameters, memory, self.capability, self.mode)
        for stretch in memory:
            if stretch.shadow is not None:
                stretch.shadow[:] = stretch.defined
        self.executions.append((program, done))
        if done.stopped:
            raise RuntimeError(f"stopped: {done.found[-1]}")


@contextmanager
def emulated(capability: int, mode: str = "plain") -> Iterator[Emulator]:
    """Within it `impl="triton"` takes tensors of the CPU, and every launch runs as PTX of this compute capability.

    Memory from torch.empty is poisoned, and nothing of it counts as written.
    """
    emulator = Emulator(capability, MODES[mode])
    empty, capability_of = torch.empty, configs.capability_of
    with (
        patch.object(Launch, "run", lambda launch: emulator.run(launch)),
        patch.object(memflow_ops.impl, "why_no_triton", lambda device: ""),
        patch.object(torch, "empty", lambda *args, **kwargs: emulator.written.poison(empty(*args, **kwargs))),
    ):
        users = [m for m in list(sys.modules.values()) if getattr(m, "capability_of", None) is capability_of]
        for module in users:
            module.capability_of = lambda tensor: capability
        try:
            yield emulator
        finally:
            for module in users:
                module.capability_of = capability_of
