"""What the kernels' launches on the stand-in need of the compiler: recorded one by one, compiled ahead of time.

A recorded launch is a kernel with all that Triton's just-in-time compiler would be given, as Triton itself made it of
the arguments. So compiling it fills Triton's cache on disk with what the same launch on a GPU finds there.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from memflow_ops.bench.stand_in.gpu import Gpu, is_on_gpu
from memflow_ops.files import write_atomically
from memflow_ops.kernels.launch import Launch, tensors_in


@dataclass(frozen=True)
class Kernel:
    """A kernel as the just-in-time compiler is asked for it."""

    module: str
    name: str
    capability: int
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Equal for equal kernels."""
        said = (self.module, self.name, self.capability, self.signature, self.constants, self.attributes, self.options)
        return hashlib.sha256(repr(said).encode()).hexdigest()


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel: the seconds that the compiler took, whether it was compiled before, and its error."""

    kernel: Kernel
    seconds: float
    known: bool = False
    error: str = ""


class Driver:
    """Of Triton, for a GPU that need not be there: it compiles for it and launches nothing."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Recorder:
    """The kernels that were launched since `start`, and by what: name of a test or a case -> keys of kernels."""

    def __init__(self, gpu: Gpu):
        self._capability = gpu.capability
        self.kernels: dict[str, Kernel] = {}
        self.launched: dict[str, set[str]] = {}
        self.launches = 0
        self.now = ""
        """The name of what is running."""
        self._known: dict[Any, str] = {}  # Triton's key of a kernel -> ours

    def start(self) -> None:
        """Record every launch of this process instead of compiling and running it."""
        from triton import knobs
        from triton.runtime.driver import driver

        driver.set_active(Driver(self._capability))
        knobs.runtime.jit_cache_hook = self._asked
        run = Launch.run

        def checked(launch: Launch) -> None:
            strangers = [x for x in tensors_in(launch.arguments.values()) if not is_on_gpu(x)]
            if strangers:
                raise ValueError(f"{launch.kernel.fn.__name__} is launched with {len(strangers)} tensors of the host")
            self.launches += 1
            run(launch)

        Launch.run = checked  # type: ignore[assignment, method-assign]

    def _asked(self, *, key: Any, fn: Any, compile: dict[str, Any], **more: Any) -> bool:
        """Triton's hook before it compiles. True: it is to compile and run nothing."""
        if (known := self._known.get((fn.module, fn.name, key))) is None:
            given = json.loads(compile["specialization_data"])["options"]
            options = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
            parts = (compile["signature"], compile["constants"], compile["configs"][0])
            kernel = Kernel(fn.module, fn.name, self._capability, *parts, options)
            known = self._known[fn.module, fn.name, key] = kernel.key
            self.kernels[known] = kernel
        self.launched.setdefault(self.now, set()).add(known)
        return True

    def write(self, target: Path) -> None:
        """Write everything to a file for `read`."""
        write_atomically(target, pickle.dumps((self.kernels, self.launched, self.launches)))


@dataclass
class Recorded:
    """What one or several recorders have written."""

    kernels: dict[str, Kernel]
    launched: dict[str, set[str]]
    launches: int


def read(*files: Path) -> Recorded:
    """The recordings of several processes together."""
    whole = Recorded({}, {}, 0)
    for file in files:
        kernels, launched, launches = pickle.loads(file.read_bytes())
        whole.kernels |= kernels
        for name, keys in launched.items():
            whole.launched[name] = whole.launched.get(name, set()) | keys
        whole.launches += launches
    return whole


def compile_kernel(kernel: Kernel, stubs: bool = False) -> Compiled:
    """Compile for its GPU, which need not be there, into Triton's cache on disk.

    stubs: whether the C code that launches it is compiled too, which needs CUDA's driver.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.runtime.driver import driver

    driver.set_active(Driver(kernel.capability))
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    made_of = GluonASTSource if function.is_gluon() else ASTSource
    source = made_of(function, kernel.signature, kernel.constants, kernel.attributes)
    known = False

    def listen(*, cache_hit: bool, **_: Any) -> None:
        nonlocal known
        known = cache_hit

    triton.knobs.compilation.listener = listen
    started = time.perf_counter()
    try:
        target = GPUTarget("cuda", kernel.capability, 32)
        compiled = triton.compile(source, target=target, options=kernel.options)
        if stubs:
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(source, compiled.metadata)
    except Exception as error:  # Whatever it is, the other kernels are to be compiled.
        lines = str(error).strip().splitlines() or [""]
        return Compiled(kernel, time.perf_counter() - started, error=f"{type(error).__name__}: {lines[0][:200]}")
    return Compiled(kernel, time.perf_counter() - started, known)


def compile_all(
    kernels: dict[str, Kernel], jobs: int, stubs: bool = False, report: Callable[[Compiled], None] = lambda _: None
) -> dict[str, Compiled]:
    """Compile kernels in so many processes. report: called after each. Returns what became of each, by key."""
    done = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(compile_kernel, kernel, stubs): key for key, kernel in kernels.items()}
        for future in as_completed(running):
            done[running[future]] = future.result()
            report(done[running[future]])
    return done
