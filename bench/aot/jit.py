"""What the just-in-time compiler asks for at a launch, found out without a GPU.

What is compiled ahead of time serves a launch only if both ask for the same: triton keeps what it compiled under a hash
of the kernel's source, the arguments' types and alignments, the constants and the options.
"""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver

from memflow_ops.kernels.aot import launch_source
from memflow_ops.kernels.launch import Launch

Request = tuple[str, dict[str, Any]]
"""Hash of the source, and the options of the compiler."""


class StandInDriver:
    """What the just-in-time compiler asks the driver for before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # an index of its own for each, because a kernel keeps the target of a device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def jit_request(launch: Launch, capability: int) -> Request:
    """What the just-in-time compiler would compile for this launch on a device of this capability. Nothing is run."""
    requests: list[Request] = []
    kernel = launch.kernel
    driver.set_active(StandInDriver(capability))
    try:
        kernel.device_caches.pop(capability, None)
        kernel.device_caches[capability]  # this sets kernel.compile
        kernel.compile = lambda source, target, options: requests.append((source.hash(), dict(options)))
        kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.compiler_options)
    finally:
        driver.set_active(None)
        kernel.compile = triton.compile
        kernel.device_caches.pop(capability, None)
    return requests[0]


def ahead_of_time_request(launch: Launch, capability: int) -> Request:
    """What compile_launch compiles for this launch."""
    options = make_backend(GPUTarget("cuda", capability, 32)).parse_options(launch.compiler_options)
    return launch_source(launch).hash(), dict(options.__dict__)


def jit_finds(launch: Launch, capability: int) -> bool:
    """Whether the just-in-time compiler finds in its cache what compile_launch compiles for this launch."""
    return jit_request(launch, capability) == ahead_of_time_request(launch, capability)
