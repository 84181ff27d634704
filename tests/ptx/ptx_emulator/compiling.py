"""From a planned launch to an assembled program, compiled as a GPU would compile it, but for ptxas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget

from memflow_ops.kernels.aot import launch_source
from memflow_ops.kernels.launch import Launch
from ptx_emulator.assembler import assemble
from ptx_emulator.program import Program


def stop_at_ptx(backend=None, stages=None, options=None, language=None, capability=None):
    """A hook that takes ptxas out of the stages of a compilation."""
    if stages is None:
        return "stops at ptx", "stops at ptx"  # what triton adds to the key of its cache
    stages["cubin"] = lambda source, metadata: b""


@dataclass(frozen=True)
class Compiled:
    program: Program
    shared_bytes: int


_compiled: dict[str, Compiled] = {}


def compile_to_ptx(launch: Launch, capability: int) -> tuple[Compiled, list[tuple[str, Any]]]:
    """The program, and the arguments that are no constants, flat and in order, each with its type."""
    source = launch_source(launch)
    key = f"{source.hash()} {sorted(launch.compiler_options.items())} {capability}"
    if key not in _compiled:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.add_stages_inspection_hook = stop_at_ptx
            kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.compiler_options)
        if kernel.metadata.global_scratch_size:
            raise NotImplementedError(f"{source.name} needs scratch memory, which the emulator does not provide")
        _compiled[key] = Compiled(assemble(kernel.asm["ptx"]), kernel.metadata.shared)
    flat: list[tuple[str, Any]] = []
    for parameter in launch.kernel.params:
        flatten(source.signature[parameter.name], launch.arguments[parameter.name], flat)
    return _compiled[key], flat


def flatten(type_: Any, value: Any, flat: list[tuple[str, Any]]) -> None:
    """Append the arguments that the compiled kernel takes."""
    if isinstance(type_, tuple):
        for item_type, item in zip(type_, value, strict=True):
            flatten(item_type, item, flat)
    elif type_ != "constexpr":
        flat.append((type_, value))


def parameter_bytes(program: Program, flat: list[tuple[str, Any]]) -> np.ndarray:
    """The memory from which ld.param reads. Triton adds two pointers to scratch memory, which stay 0."""
    parameters = program.parameters
    if len(parameters) != len(flat) + 2:
        raise ValueError(f"{program.name} takes {len(parameters)} parameters where {len(flat)} and 2 are expected")
    buffer = np.zeros(program.parameter_bytes + 16, np.uint8)
    for (type_, value), parameter in zip(flat, parameters, strict=False):
        if isinstance(value, torch.Tensor):
            raw = np.uint64(value.data_ptr())
        elif type_ == "fp32":
            raw = np.float32(value)
        else:
            raw = np.int64(value) if parameter.size == 8 else np.int32(value)
        if raw.nbytes != parameter.size:
            raise ValueError(f"{program.name}: a {type_} does not fit in a parameter .{parameter.type}")
        buffer[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(raw.tobytes(), np.uint8)
    return buffer
