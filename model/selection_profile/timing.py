"""The time that one call of `memory_attention` takes with each setting."""

import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from memflow_ops import describe_blocks, memory_attention
from memflow_ops.cache.views import Memory
from memflow_ops.model.selection_profile.quality import SCORE_OF, Choice, budgets

TimedSetting = tuple[Choice | None, int]
"""The choice of blocks and top_k of a timed call."""
WINDOW_ALONE: TimedSetting = (None, 0)
"""The call without memory, to which all others are compared."""
CALLS = 3
"""Calls in a row of which a round takes the quickest."""


def time_choices(
    q: Tensor,
    window: tuple[Tensor, Tensor],
    memory: Memory,
    frame_tokens: int,
    compared: Sequence[Choice],
    rounds: int,
) -> dict[TimedSetting, list[float]]:
    """Seconds of `memory_attention` with stored descriptors: setting -> the seconds of every round.

    q (B, Lq, H, D); window: its keys and values, (B, Lk, Hkv, D) each. Every choice of the highest scores is timed at
    every budget.

    A round goes through all settings in an order of its own, so that other load touches all alike. One more round is
    run first and not counted.
    """
    calls: dict[TimedSetting, Callable[[], object]] = {WINDOW_ALONE: lambda: memory_attention(q, *window)}
    frames = memory.slots.shape[1]
    for size in sorted({choice.block_size for choice in compared}):
        described = describe_blocks(memory.keys, size, frame_tokens, moments=2)
        for choice in compared:
            if choice.block_size == size and choice.blocks in SCORE_OF:
                descriptors = described[..., : q.shape[-1]].contiguous() if choice.blocks == "top" else described
                for top_k in budgets(frames * -(-frame_tokens // size))[1:]:
                    calls[choice, top_k] = _call(q, window, memory, descriptors, frame_tokens, choice, top_k)
    taken: dict[TimedSetting, list[float]] = {setting: [] for setting in calls}
    order, draw = list(calls), random.Random(0)
    for number in range(rounds + 1):
        draw.shuffle(order)
        for setting in order:
            seconds = min(_seconds(calls[setting], q.device) for _ in range(CALLS))
            if number:
                taken[setting].append(seconds)
    return taken


def _call(
    q: Tensor,
    window: tuple[Tensor, Tensor],
    memory: Memory,
    descriptors: Tensor,
    frame_tokens: int,
    choice: Choice,
    top_k: int,
) -> Callable[[], object]:
    return lambda: memory_attention(
        q,
        *window,
        memory.keys,
        memory.values,
        memory_descriptors=descriptors,
        top_k=top_k,
        block_size=choice.block_size,
        frame_tokens=frame_tokens,
        query_group=choice.query_group,
        score=SCORE_OF[choice.blocks],
        memory_frames=memory.frames,
        memory_slots=memory.slots,
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
