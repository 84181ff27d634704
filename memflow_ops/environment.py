"""What a measurement depends on (device, versions, commit), and what this machine can run."""

from __future__ import annotations

import platform
import re
import subprocess
from datetime import date
from importlib import metadata
from pathlib import Path

import torch

from memflow_ops.impl import dense, why_no_triton
from memflow_ops.version import __version__

ROOT = Path(__file__).resolve().parents[1]
"""The folder of the checkout, or else the one that the package is installed in."""


def pick_device(name: str) -> torch.device:
    """The device of a name: auto (CUDA if there is any, else the CPU), cpu, cuda or cuda:N.

    Raises a ValueError for any other name and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not found:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name != "cpu" and int(found[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r} here: torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """The model of the device; for a CPU also the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", about.read_text()) if about.is_file() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The commit of the checkout, with "-dirty" if the tree has changes; None if there is no checkout."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def version(distribution: str) -> str | None:
    """The installed version of a distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, object]:
    """The facts at the head of every result file, ready for JSON."""
    return {
        "device": device_name(device),
        "date": date.today().isoformat(),
        "commit": commit(),
        "memflow_ops": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def implementations() -> dict[str, str]:
    """For every implementation of the operators the reason why it does not run here; "" if it runs."""
    return {"reference": "", "torch": "", "triton": why_no_triton(pick_device("auto"))}


def why_not_compile(device: torch.device) -> str:
    """The reason why torch.compile cannot make code for `device`; "" if it can."""
    if device.type == "cuda":
        return why_no_triton(device)
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return "no C++ compiler was found; install g++ or set CXX"
    return ""


def dense_backends() -> dict[str, str]:
    """For everything that can attend to the local window the reason why it does not run here; "" if it runs."""
    no_device = "" if torch.cuda.is_available() else "no CUDA device"
    return {
        "torch's flash attention for CPUs": "",
        "torch's cuDNN attention": no_device or ("" if torch.backends.cudnn.is_available() else "torch has no cuDNN"),
        "torch's flash attention 2": no_device,
        "flash-attn": dense.why_no_flash_attn() or no_device,
        "our Triton kernel": why_no_triton(pick_device("auto")) or no_device,
    }
