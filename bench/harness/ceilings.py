"""What the device can do at best: products, copies and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from memflow_ops.bench.harness.timing import seconds_of

# The operands of the measured ceilings: rows of a square product, and bytes of a copy.
_PRODUCT_ROWS = {"cpu": 2048, "cuda": 8192}
_COPY_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
_ROUNDS = 7


def product_ceiling(device: torch.device, dtype: str) -> float:
    """TFLOP/s that a large square product reaches on this device."""
    rows = _PRODUCT_ROWS[device.type]
    a, b = (torch.randn(rows, rows, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * rows**3 / _shortest(lambda: torch.mm(a, b, out=out), device) / 1e12


def copy_ceiling(device: torch.device) -> float:
    """GB/s, read and written, of a large copy."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / _shortest(lambda: target.copy_(source), device) / 1e9


def _shortest(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return min(seconds_of(call, device) for _ in range(_ROUNDS))


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that one call holds at a time, its own scratch included."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, profile_memory=True) as profiled:
        call()
    result = profiled.profiler
    assert result is not None and result.kineto_results is not None
    events = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
