"""How one call is timed: by the clock on a CPU; on CUDA by events, as a CUDA graph where it can be captured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as a CUDA graph that has been replayed once, so that the time of the host is not measured."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return graph.replay


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Run a call once and return the seconds that it took."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    call()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1e3
