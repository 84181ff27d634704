"""Launches for tests of the compiled kernels, to be compiled where Triton does not interpret (see conftest.py)."""

from dataclasses import replace

import torch
import triton
from triton.runtime import driver

from memflow_ops.bench.aot import shipped as table
from memflow_ops.bench.aot.jit import StandInDriver, jit_finds
from memflow_ops.bench.aot.rows import CAPABILITIES
from memflow_ops.geometry import Geometry
from memflow_ops.kernels.aot import Machine, compile_launch
from memflow_ops.kernels.attention.plan import plan_attend
from memflow_ops.kernels.launch import Launch
from memflow_ops.kernels.selection.describe import plan_block_means
from memflow_ops.kernels.selection.groups import plan_select


def compiled(launches: list[Launch]) -> list[tuple[str, Machine]]:
    """The kernel's name and its machine code for sm_90, launch by launch."""
    return [(launch.kernel.fn.__name__, compile_launch(launch, 90)) for launch in launches]


def shipped(case: str) -> list[tuple[str, Machine]]:
    return compiled(table.shipped()[case](90))


def without_fusion_by_default(case: str) -> list[tuple[str, Machine]]:
    """What the case becomes where the compiler fuses only what asks for it."""
    with triton.knobs.language.scope():
        triton.knobs.language.default_fp_fusion = False
        return shipped(case)


def attention(query_group: int) -> list[tuple[str, Machine]]:
    """The attention kernel alone, after whatever selects for it."""
    return compiled(table.memory_attention(90, query_group=query_group)[-1:])


def _window_and_blocks_of_16() -> list[Launch]:
    q, k, indices = table.meta(1, 256, 2, 64), table.cached(640, 2, 64), table.meta(1, 2, 256, 8, dtype=torch.int32)
    return plan_attend(q, k, k, k, k, indices, Geometry(16, 320, 1, 0.125), capability=90)[0]


def window_and_blocks_of_16() -> list[tuple[str, Machine]]:
    return compiled(_window_and_blocks_of_16())


def window_and_blocks_of_16_together() -> list[tuple[str, Machine]]:
    """Bank and window in one launch of the kernel, which plan_attend does not plan."""
    *_, bank, window = _window_and_blocks_of_16()
    both = {**bank.arguments, **{name: window.arguments[name] for name in ("window", "keys")}}
    return compiled([replace(bank, arguments=both)])


def backward_of_window_and_blocks_of_16() -> list[tuple[str, Machine]]:
    """Those that make the gradient of the queries."""
    launches = table.backward(90, dense=True, query_group=16, block_size=16)
    return compiled([launch for launch in launches if "queries" in launch.kernel.fn.__name__])


def float32_per_query() -> list[tuple[str, Machine]]:
    return compiled(table.memory_attention(90, dtype=torch.float32, query_group=1))


def sizes_of_one() -> list[tuple[str, Machine]]:
    meta = table.meta
    q, indices = meta(1, 1, 1, 16), meta(1, 1, 1, 1, dtype=torch.int32)
    geometry, resume = Geometry(1, 1, 1, 0.25, memory_slots=meta(1, 1).int()), (q, meta(1, 1, 1).float())
    launches = [
        *plan_attend(q, q, q, q, q, indices, geometry, resume)[0],
        plan_block_means(q, 1, 1, q.dtype)[0],
    ]
    for length in (1, 2):
        bank = meta(1, length, 1, 16)
        launches += plan_select(bank, bank, 1, Geometry(1, 1, length, 1.0, memory_frames=meta(1).int()))[0]
    return compiled(launches)


def compiled_anew() -> tuple[int, list[str]]:
    """How many launches are shipped, and those whose ahead-of-time code the just-in-time compiler would not find."""
    launches = [
        (capability, case, launch)
        for capability in CAPABILITIES
        for case, plan in table.shipped().items()
        for launch in plan(capability)
    ]
    return len(launches), [
        f"sm_{capability}, {case}: {launch.kernel.fn.__name__}"
        for capability, case, launch in launches
        if not jit_finds(launch, capability)
    ]


def found_by_the_jit(compiled_tokens: int, tokens: int) -> list[bool]:
    """Whether each compilation by a launch over `tokens` tokens found its code, when that for others was compiled."""

    def means(length: int) -> Launch:
        return plan_block_means(torch.empty(1, length, 1, 16), 64, length, torch.float32)[0]

    compile_launch(means(compiled_tokens), 90)
    launch, found = means(tokens), []
    driver.set_active(StandInDriver(90))
    triton.knobs.compilation.listener = lambda **told: found.append(told["cache_hit"])
    try:
        launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.compiler_options)
    finally:
        triton.knobs.compilation.listener = None
        driver.set_active(None)
        launch.kernel.device_caches.pop(90)
    return found
