"""Small programs of PTX for the emulator, written by hand."""

import numpy as np
from ptx_emulator.assembler import assemble
from ptx_emulator.execution import MODES, execute
from ptx_emulator.memory import Stretch

THREADS = 64


def run(
    body,
    buffers=(),
    *,
    tensor_map=None,
    address_bits=64,
    threads=THREADS,
    max_registers=0,
    grid=1,
    shared=512,
    capability=80,
    mode="plain",
    limit=100_000,
    gap=slice(0),
):
    """The names of what is found. buffers: arrays and whether they have been written; %rd30 and on point to them.

    gap: bytes of each that belong to no element.

    tensor_map: 128 bytes; %rd29 has their address, which comes from one in 32 bits or in 64 (`address_bits`).

    %r1 is the thread, %r2 and %rd1 four times that.
    """
    declared = [f".param .u64 .ptr .global .align 1 p{i}" for i in range(len(buffers))]
    if tensor_map is not None:
        declared = [".param .align 64 .b8 map[128]", *declared]
    loads = "\n".join(f"ld.param.b64 %rd{30 + i}, [p{i}];" for i in range(len(buffers)))
    if tensor_map is not None:
        wide = "mov.b64 %rd28, map;" if address_bits == 64 else "mov.b32 %r299, map; cvt.u64.u32 %rd28, %r299;"
        loads += wide + "cvta.param.u64 %rd29, %rd28;"
    maximum = f".maxnreg {max_registers}" if max_registers else ""
    program = assemble(f""".version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry k(
{", ".join(declared)}
)
.reqntid {threads} {maximum}
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<20>;
    .reg .b32 %r<300>;
    .reg .b64 %rd<40>;
    {loads}
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    cvt.u64.u32 %rd1, %r2;
    {body}
    ret;
}}
""")
    memory = [
        Stretch(array.ctypes.data, np.ones(array.nbytes, np.uint8), np.full(array.nbytes, written, np.uint8), "x", None)
        for array, written in buffers
    ]
    for stretch in memory:
        stretch.allowed[gap] = 0
    pointers = (tensor_map or b"") + np.array([x.base for x in memory] + [0], np.uint64).tobytes()
    given = np.frombuffer(pointers, np.uint8).copy()
    done = execute(program, (grid, 1, 1), shared, given, memory, capability, MODES[mode], limit)
    return {found.kind.name for found in done.found}


def out():
    return np.zeros(THREADS, np.int32)


STORE = """
    add.s64 %rd2, %rd30, %rd1;
    st.global.b32 [%rd2], %r10;
"""
