"""Compiles a planned launch ahead of time, for a GPU that need not be there, and reads figures off the machine code.

launch, *_ = plan_attend(...)   # tensors on the "meta" device will do
compile_launch(launch, capability=90).registers
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from memflow_ops.kernels.launch import Launch

# Shared memory that one program may have, in bytes, by compute capability.
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Machine:
    """What a compiled kernel takes: registers per thread, bytes, and how often each opcode stands in its code."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Counter[str]
    loop_opcodes: Counter[str]
    """Those of the main loop alone, see main_loop. Instructions that it usually jumps over count too."""
    ptx: str = field(repr=False)

    @property
    def spills(self) -> int:
        """Loads and stores of local memory: registers that did not fit."""
        return spills(self.opcodes)

    @property
    def loop_spills(self) -> int:
        """Those of the main loop, which repeats them; a few outside it cost next to nothing."""
        return spills(self.loop_opcodes)

    @property
    def tensor_core_products(self) -> int:
        """Matrix products on tensor cores: HMMA on sm_80, HGMMA on sm_90, UTCHMMA on sm_100."""
        return products(self.opcodes)


def compile_launch(launch: Launch, capability: int) -> Machine:
    """Compile as the launch would on a device of this compute capability (80, 90, 100). It takes seconds."""
    source = launch_source(launch)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=launch.compiler_options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = cuobjdump("--dump-resource-usage", file.name)
        assembly = cuobjdump("-sass", file.name)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    # An instruction is /*address*/, a predicate (@!P0) in some, the opcode, its modifiers and operands.
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([^;]*)", assembly, re.MULTILINE)
    instructions = [(int(address, 16), opcode, rest) for address, opcode, rest in found]
    return Machine(
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        shared_bytes=compiled.metadata.shared,
        opcodes=Counter(opcode for _, opcode, _ in instructions),
        loop_opcodes=main_loop(instructions),
        ptx=compiled.asm["ptx"],
    )


def spills(opcodes: Counter[str]) -> int:
    return opcodes["LDL"] + opcodes["STL"]


def products(opcodes: Counter[str]) -> int:
    return sum(opcodes[name] for name in ("HMMA", "HGMMA", "UTCHMMA"))


def main_loop(instructions: list[tuple[int, str, str]]) -> Counter[str]:
    """The opcodes of the main loop among instructions (address, opcode, operands).

    A loop ends with a branch back to its start. The main loop is the innermost loop with the most matrix products; of
    several with as many it is the shortest, because the others are for rare cases. Without products it is the longest
    innermost loop.
    """
    loops = []
    for address, opcode, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        if target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    innermost = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [Counter(op for address, op, _ in instructions if start <= address <= end) for start, end in innermost]
    sign = -1 if any(products(body) for body in bodies) else 1
    return max(bodies, key=lambda body: (products(body), sign * body.total()), default=Counter())


def cuobjdump(*arguments: str) -> str:
    """The output of NVIDIA's disassembler, which comes with triton."""
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def launch_source(launch: Launch) -> ASTSource:
    """The kernel with the types, constants and divisibility that the just-in-time compiler sees in this launch.

    They come from that compiler itself, so that it finds in its cache what was compiled ahead of time. A tensor counts
    as it lies: one on the "meta" device as aligned to 16 bytes, like all that torch allocates; a view may be less so.
    """
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", 90, 32))  # they are the same for every capability
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.compiler_options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return ASTSource(kernel, signature, constants, attributes)
