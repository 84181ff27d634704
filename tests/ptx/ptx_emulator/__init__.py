"""Runs compiled kernels on a CPU: PTX of sm_80 and sm_90, instruction by instruction, with everything checked.

    make ptx PTX_OPTIONS="--only window"

assembler.py turns PTX into arrays, core/ (C++) executes them, and runner.py runs planned launches on tensors of the CPU
and keeps what was found. core/findings.def says what can be found.

Who may see what of shared memory follows from barriers (of all threads or of some), mbarriers and the copies that
report to them, by vector clocks: a race is found in whatever order the warps take turns. Copies of tiles of a tensor
(TMA) need a tensor map, see tensor_maps.py; where no warp can go on any more, that is found too.

What it takes for granted: PTX is what runs (what ptxas contracts, reorders or spills is not seen); lanes of a warp run
in lockstep; warps take turns, each until it has to wait, and programs run one after the other; in global memory only a
barrier of all threads orders the warps of a program. There are no atomics, no clusters and no bulk copies to global
memory: the assembler refuses what it does not know.
"""
