"""The time of one attention call per choice."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from memflow_ops import describe_blocks, memory_attention
from memflow_ops.cache.views import Memory
from memflow_ops.model.selection_profile.quality import Choice, budgets

CALLS = 3


# ----------------------------------------------------------------------------------------------------------------- time


def time_choices(
    q: Tensor,
    window: tuple[Tensor, Tensor],
    memory: Memory,
    frame_tokens: int,
    compared: Sequence[Choice],
    rounds: int,
) -> dict[tuple[int, int | None, int], list[float]]:
    """Seconds of `memory_attention` with stored descriptors, by setting and round; (0, None, 0): the window alone.

    A round goes through all settings in an order of its own, so that other load touches all alike, and takes the
    quickest of three calls. One round more is run first and not counted.
    """
    calls: dict[tuple[int, int | None, int], Callable[[], object]] = {
        (0, None, 0): lambda: memory_attention(q, *window)
    }
    frames = memory.slots.shape[1]
    for size in sorted({choice.block_size for choice in compared}):
        descriptors = describe_blocks(memory.keys, size, frame_tokens)
        for group in {c.query_group: None for c in compared if c.block_size == size and c.blocks == "top"}:
            for top_k in budgets(frames * -(-frame_tokens // size))[1:]:
                options: dict[str, Any] = {"top_k": top_k, "block_size": size, "query_group": group}
                calls[size, group, top_k] = _call(q, window, memory, descriptors, frame_tokens, options)
    taken: dict[tuple[int, int | None, int], list[float]] = {key: [] for key in calls}
    order, draw = list(calls), random.Random(0)
    for number in range(rounds + 1):
        draw.shuffle(order)
        for key in order:
            seconds = min(_seconds(calls[key], q.device) for _ in range(CALLS))
            if number:
                taken[key].append(seconds)
    return taken


def _call(
    q: Tensor,
    window: tuple[Tensor, Tensor],
    memory: Memory,
    descriptors: Tensor,
    frame_tokens: int,
    options: dict[str, Any],
) -> Callable[[], object]:
    return lambda: memory_attention(
        q,
        *window,
        memory.keys,
        memory.values,
        memory_descriptors=descriptors,
        frame_tokens=frame_tokens,
        memory_frames=memory.frames,
        memory_slots=memory.slots,
        **options,
    )


def clock(device: torch.device) -> str:
    """What time is measured by. One thread of a CPU is measured by its own time, which other processes do not touch."""
    return "CPU time of the thread" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    now = time.perf_counter if clock(device) == "wall time" else time.thread_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = now()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start
