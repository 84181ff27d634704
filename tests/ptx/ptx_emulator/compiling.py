"""From a planned launch to an assembled program, compiled as a GPU would compile it, but for ptxas."""

from __future__ import annotations

from collections.abc import Iterator
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
from ptx_emulator.tensor_maps import tensor_map


def stop_at_ptx(backend=None, stages=None, options=None, language=None, capability=None):
    """A hook that takes ptxas out of the stages of a compilation."""
    if stages is None:
        return "stops at ptx", "stops at ptx"  # what triton adds to the key of its cache
    stages["cubin"] = lambda source, metadata: b""


@dataclass(frozen=True)
class Compiled:
    program: Program
    shared_bytes: int
    warps: int
    """Those of all tasks, of a kernel whose warps have different ones."""
    tensor_maps: list[dict[str, Any]]
    """What the compiler asks of the map of each tensor descriptor, in order."""


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
        maps = list(getattr(kernel.metadata, "tensordesc_meta", None) or [])
        program = assemble(kernel.asm["ptx"])
        _compiled[key] = Compiled(program, kernel.metadata.shared, kernel.metadata.num_warps, maps)
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


SWIZZLES = (0, 32, 64, 128)
"""The driver's numbers of them."""


def map_of(descriptor: Any, wanted: dict[str, Any]) -> bytes:
    """The tensor map that Triton's launcher has the driver encode for a descriptor."""
    base, size = descriptor.base, wanted["elem_size"]
    assert size == base.element_size() and descriptor.padding == "zero", descriptor
    swizzle = SWIZZLES[wanted["swizzle"]]
    return tensor_map(base.data_ptr(), size, descriptor.shape, descriptor.strides, wanted["block_size"], swizzle)


def with_maps(compiled: Compiled, flat: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The arguments as the kernel takes them: of a tensor descriptor its map, its shape and its strides."""
    wanted = iter(compiled.tensor_maps)
    for type_, value in flat:
        if not type_.startswith("tensordesc"):
            yield type_, value
            continue
        yield "map", map_of(value, next(wanted))
        yield from (("i32", size) for size in value.shape)
        yield from (("i64", stride) for stride in value.strides)


def parameter_bytes(compiled: Compiled, flat: list[tuple[str, Any]]) -> np.ndarray:
    """The memory from which ld.param reads. Triton adds two pointers to scratch memory, which stay 0."""
    program, flat = compiled.program, list(with_maps(compiled, flat))
    parameters = program.parameters
    if len(parameters) != len(flat) + 2:
        raise ValueError(f"{program.name} takes {len(parameters)} parameters where {len(flat)} and 2 are expected")
    buffer = np.zeros(program.parameter_bytes + 16, np.uint8)
    for (type_, value), parameter in zip(flat, parameters, strict=False):
        if isinstance(value, torch.Tensor):
            raw = np.uint64(value.data_ptr())
        elif type_ == "fp32":
            raw = np.float32(value)
        elif isinstance(value, bytes):
            raw = np.frombuffer(value, np.uint8)
        else:
            raw = np.int64(value) if parameter.size == 8 else np.int32(value)
        if raw.nbytes != parameter.size:
            raise ValueError(f"{program.name}: a {type_} does not fit in a parameter .{parameter.type}")
        buffer[parameter.offset : parameter.offset + parameter.size] = np.frombuffer(raw.tobytes(), np.uint8)
    return buffer
