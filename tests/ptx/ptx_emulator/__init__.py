"""Runs compiled kernels on a CPU: PTX of sm_80 and sm_90, instruction by instruction, with everything checked.

    make ptx PTX_OPTIONS="--only window"

assembler.py turns PTX into arrays, core/ (C++) executes them, and runner.py runs planned launches on tensors of the CPU
and keeps what was found. core/findings.def says what can be found.

What it takes for granted: PTX is what runs (what ptxas contracts, reorders or spills is not seen); lanes of a warp run
in lockstep; the warps of a program run one after the other up to the next barrier, and programs one after the other; a
barrier is `bar.sync 0` of all threads. There are no atomics, named barriers, mbarriers and no TMA: the assembler
refuses what it does not know.
"""
