"""Compiles a planned launch ahead of time, for a GPU that need not be there, and reads figures off the machine code.

launch, *_ = plan_attend(...)   # tensors on the "meta" device will do
compile_launch(launch, capability=90).registers
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import create_function_from_signature

from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.sass import Instruction, instructions, main_loop, products, spills

# Shared memory that one program may have, in bytes, by compute capability.
SHARED_MEMORY_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


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
    code: list[Instruction] = field(repr=False)
    remarks: tuple[str, ...]
    """What ptxas has to say about products of warpgroups (sm_90), by its numbers: C7510 and C7515, they wait for one
    another; C7517, it had to add a wait; C7519, a fence."""

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
    """Compile as the launch would on a device of this compute capability, a key of SHARED_MEMORY_LIMIT, in seconds.

    What was read off the machine code is kept beside it, in triton's cache.
    """
    source = launch_source(launch)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=launch.compiler_options)
    usage = kept(compiled, "usage", lambda: disassemble(compiled, "--dump-resource-usage"))
    code = instructions(kept(compiled, "sass", lambda: disassemble(compiled, "-sass")))
    log = kept(compiled, "ptxas", lambda: ptxas_log(compiled)) if "wgmma" in compiled.asm["ptx"] else ""
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    return Machine(
        registers=resources["REG"],
        stack_bytes=resources["STACK"],
        shared_bytes=compiled.metadata.shared,
        opcodes=Counter(instruction.opcode for instruction in code),
        loop_opcodes=main_loop(code),
        ptx=compiled.asm["ptx"],
        code=code,
        remarks=tuple(sorted(set(re.findall(r"\((C75\d\d)\)", log)))),
    )


def kept(compiled: CompiledKernel, name: str, make: Callable[[], str]) -> str:
    """A text about a compiled kernel: the one beside it in the cache, or else what `make` returns, kept there."""
    cache = get_cache_manager(compiled.hash)
    return Path(cache.get_file(name) or cache.put(make(), name, binary=False)).read_text()


def disassemble(compiled: CompiledKernel, option: str) -> str:
    """The output of NVIDIA's disassembler, which comes with triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ptxas_log(compiled: CompiledKernel) -> str:
    """What the ptxas of triton says about the kernel for sm_90; triton throws it away. Its wheels hold several."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
        Path(file.name).write_text(compiled.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def launch_source(launch: Launch) -> ASTSource:
    """The kernel with the types, constants and divisibility that the just-in-time compiler sees in this launch.

    They come from that compiler itself, so that it finds in its cache what was compiled ahead of time. A tensor counts
    as it lies: one on the "meta" device as aligned to 16 bytes, like all that torch allocates; a view may be less so.
    """
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", 90, 32))  # they are the same for every capability
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**launch.arguments, **launch.compiler_options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    made_of = GluonASTSource if kernel.is_gluon() else ASTSource
    return made_of(kernel, signature, constants, attributes)
