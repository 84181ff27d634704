"""The same prompts and noise streamed under several kinds of memory: speed, memory, how far the latents part, pictures.

For people with real weights: nothing here knows what the video should look like, so it ends in pictures side by side.
What must hold is checked: latents are finite, and until the local window has been left for the first time "none",
"sink" and "memflow" make the same ones, because there is nothing yet to remember.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from memflow_ops.environment import environment
from memflow_ops.files import write_atomically
from memflow_ops.model.pipeline.generate import HOW_MEASURED, speed, streamed, video_writer
from memflow_ops.model.pipeline.plan import Plan
from memflow_ops.model.pipeline.sources import Parts, Sources
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.streaming.settings import MemoryMode
from memflow_ops.model.streaming.streamer import Chunk

STORY = Path(__file__).parents[1] / "stories" / "verify.jsonl"
"""A character leaves and returns."""
MEMORIES = ("none", *(kind for kind in get_args(MemoryMode) if kind not in ("none", "full")))
SAME = ("none", "sink", "memflow")
"""Kinds of memory that have nothing to remember while the local window holds the whole past."""
TOLERANCE = 1e-3
"""On their relative difference until then; it is 0 where the same kernels run."""
COLUMNS = 8
"""Moments that the picture shows."""


@dataclass
class Outcome:
    """One kind of memory."""

    plan: Plan
    chunks: list[Chunk]
    """without their frames"""
    latents: list[Tensor]
    """per chunk (C, F, h, w) float32, on the CPU"""
    decode_seconds: list[float]
    shown: list[np.ndarray]
    """video frames (H, W, 3) uint8 at the moments of the picture"""
    peak_bytes: int | None
    """the most that was allocated on the device; None where the device does not say"""

    @property
    def memory(self) -> str:
        return self.plan.settings.memory

    def difference(self, other: "Outcome") -> list[float]:
        """Per chunk the root mean square of the difference over that of the other's latents."""
        pairs = zip(self.latents, other.latents, strict=True)
        return [((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in pairs]


def verify(
    parts: Parts, plans: Sequence[Plan], report: Callable[[str, int, int], None] | None = None
) -> Iterator[Outcome]:
    """Streams every plan, one after another, the same prompts and seed under different memory.

    Each writes <memory>.mp4 into its folder and is then yielded. report: is told the memory, the chunks made and the
    chunks to come. Ctrl-C and SIGTERM end it as a KeyboardInterrupt, with the videos that are complete.
    """
    for plan in plans:
        yield _stream(parts, plan, report)


def _stream(parts: Parts, plan: Plan, report: Callable[[str, int, int], None] | None) -> Outcome:
    memory, device = plan.settings.memory, parts.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    outcome = Outcome(plan, [], [], [], [], None)
    moments = np.linspace(0, len(plan.spoken) - 1, COLUMNS).round().astype(int)
    with Interrupts() as interrupts, video_writer(plan.folder / f"{memory}.mp4", plan.settings, parts.vae) as writer:
        try:
            for chunk, (frames,), seconds in streamed(parts, [plan], interrupts):
                writer.write(frames)
                outcome.latents.append(chunk.frames[0].float().cpu())
                outcome.chunks.append(replace(chunk, frames=chunk.frames.new_empty(0)))
                outcome.decode_seconds.append(seconds)
                outcome.shown += [frames[-1]] * int((moments == chunk.index).sum())
                if report is not None:
                    report(memory, chunk.index + 1, len(plan.spoken))
        except BaseException:
            writer.discard()
            raise
        writer.publish()
    if device.type == "cuda":
        outcome.peak_bytes = torch.cuda.max_memory_allocated(device)
    return outcome


def record(outcomes: Sequence[Outcome], sources: Sources, device: torch.device) -> dict[str, object]:
    """What report.json says; differences are to the first of the outcomes."""
    first = outcomes[0]
    rows = []
    for outcome in outcomes:
        differences = outcome.difference(first)
        rows.append(
            {
                "memory": outcome.memory,
                "speed": speed(outcome.chunks, outcome.decode_seconds, outcome.plan.settings),
                "cache_bytes": outcome.plan.budget.layout.device_bytes,
                "cache_bytes_in_host_memory": outcome.plan.budget.host_bytes,
                "peak_bytes": outcome.peak_bytes,
                "replayed_passes_per_chunk": [chunk.replayed for chunk in outcome.chunks],
                f"difference_to_{first.memory}": differences,
                "first_chunk_that_differs": next((i for i, x in enumerate(differences) if x > 0), None),
                "settings": vars(outcome.plan.settings),
            }
        )
    return {
        **environment(device),
        "sources": sources.described(),
        "prompts": first.plan.prompts,
        "frames_per_prompt": first.plan.frames_per_prompt,
        "compiled": first.plan.compiled,
        "seed": first.plan.seed,
        "how": HOW_MEASURED + " Differences: root mean square over that of the first kind's latents, per chunk.",
        "problems": problems(outcomes),
        "kinds": rows,
    }


def problems(outcomes: Sequence[Outcome]) -> list[str]:
    """What must not be, in words; empty where all is well."""
    found = []
    for outcome in outcomes:
        broken = [i for i, latents in enumerate(outcome.latents) if not latents.isfinite().all()]
        if broken:
            found.append(f"{outcome.memory}: latents of chunks {broken} are not finite")
    alike = [outcome for outcome in outcomes if outcome.memory in SAME]
    for outcome in alike[1:]:
        early = outcome.difference(alike[0])[
            : outcome.plan.settings.window_frames // outcome.plan.settings.chunk_frames
        ]
        far = [x for x in early if not x <= TOLERANCE]  # a NaN is a problem too
        if far:
            found.append(
                f"{outcome.memory} and {alike[0].memory} differ by {far[0]:.2g} while there is nothing to remember"
            )
    return found


def write_report(
    outcomes: Sequence[Outcome], sources: Sources, device: torch.device, folder: Path
) -> dict[str, object]:
    """report.json and frames.png; returns what the former says."""
    said = record(outcomes, sources, device)
    write_atomically(folder / "frames.png", _picture(outcomes))
    write_atomically(folder / "report.json", (json.dumps(said, indent=1) + "\n").encode())
    return said


def _picture(outcomes: Sequence[Outcome]) -> bytes:
    """A row of frames for each kind of memory, a column for each moment; PNG."""
    from matplotlib.figure import Figure

    height, width = outcomes[0].shown[0].shape[:2]
    figure = Figure(figsize=(2 * COLUMNS + 1, 2 * len(outcomes) * height / width + 0.6), layout="constrained")
    axes = figure.subplots(len(outcomes), COLUMNS, squeeze=False)
    spoken = len(outcomes[0].plan.spoken)
    for outcome, row in zip(outcomes, axes, strict=True):
        for i, (axis, frame) in enumerate(zip(row, outcome.shown, strict=True)):
            axis.imshow(frame)
            axis.set_xticks([])
            axis.set_yticks([])
            if axis in axes[0]:
                axis.set_title(f"chunk {round(i * (spoken - 1) / (COLUMNS - 1))}", fontsize=8)
        row[0].set_ylabel(outcome.memory)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
