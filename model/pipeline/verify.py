"""Streams the same prompts and noise under several kinds of memory; compares speed, memory use, latents and pictures.

This is for real weights. Nothing here knows what the video should look like, so it ends in pictures side by side. What
must hold is checked: latents are finite, and "none", "sink" and "memflow" make the same ones until the video is longer
than the local window, because until then there is nothing to remember.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from memflow_ops.environment import environment
from memflow_ops.files import write_atomically, write_picture
from memflow_ops.model.pipeline.generate import HOW_MEASURED, speed, stream_videos, video_writer
from memflow_ops.model.pipeline.plan import WanPlan
from memflow_ops.model.pipeline.sources import Parts, Sources
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.streaming.settings import MemoryMode
from memflow_ops.model.streaming.streamer import Chunk

STORY = Path(__file__).parents[1] / "stories" / "verify.jsonl"
"""In this story a character leaves and returns."""
MEMORIES = ("none", *(kind for kind in get_args(MemoryMode) if kind not in ("none", "full")))
SAME = ("none", "sink", "memflow")
"""Kinds of memory that make the same latents while the local window holds the whole past."""
TOLERANCE = 1e-3
"""Of their relative difference until then, which is 0 where the same kernels run."""
COLUMNS = 8
"""Frames that the picture shows of each video."""


@dataclass
class VerifiedStream:
    """The stream of one kind of memory, to be compared with others."""

    plan: WanPlan
    chunks: list[Chunk]
    """Without their frames."""
    latents: list[Tensor]
    """Per chunk (C, F, h, w) float32, on the CPU."""
    decode_seconds: list[float]
    shown: list[np.ndarray]
    """Video frames (H, W, 3) uint8 for the picture."""
    peak_bytes: int | None
    """The most that was allocated on the device; None where the device does not tell."""

    @property
    def memory(self) -> str:
        return self.plan.settings.memory

    def difference(self, other: "VerifiedStream") -> list[float]:
        """Per chunk the root mean square of the difference, divided by that of the other's latents."""
        pairs = zip(self.latents, other.latents, strict=True)
        return [((a - b).square().mean() / b.square().mean()).sqrt().item() for a, b in pairs]


def verify(
    parts: Parts, plans: Sequence[WanPlan], report: Callable[[str, int, int], None] | None = None
) -> Iterator[VerifiedStream]:
    """Streams every plan, one after another, the same prompts and seed under different memory.

    Each writes <memory>.mp4 into its folder and is then yielded. report: is called with the memory, the number of
    finished chunks and that of all chunks. Ctrl-C, SIGTERM and SIGHUP raise a KeyboardInterrupt; complete videos are
    kept.
    """
    for plan in plans:
        yield _stream(parts, plan, report)


def _stream(parts: Parts, plan: WanPlan, report: Callable[[str, int, int], None] | None) -> VerifiedStream:
    memory, device = plan.settings.memory, parts.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stream = VerifiedStream(plan, [], [], [], [], None)
    moments = np.linspace(0, len(plan.prompts_by_chunk) - 1, COLUMNS).round().astype(int)
    with Interrupts() as interrupts, video_writer(plan.folder / f"{memory}.mp4", plan.settings, parts.vae) as writer:
        try:
            for chunk, (frames,), seconds in stream_videos(parts, [plan], interrupts):
                writer.write(frames)
                stream.latents.append(chunk.frames[0].float().cpu())
                stream.chunks.append(chunk.of_story(0))
                stream.decode_seconds.append(seconds)
                stream.shown += [frames[-1]] * int((moments == chunk.index).sum())
                if report is not None:
                    report(memory, chunk.index + 1, len(plan.prompts_by_chunk))
        except BaseException:
            writer.discard()
            raise
        writer.publish()
    if device.type == "cuda":
        stream.peak_bytes = torch.cuda.max_memory_allocated(device)
    return stream


def record(streams: Sequence[VerifiedStream], sources: Sources, device: torch.device) -> dict[str, object]:
    """What report.json says. Differences are to the first of the streams."""
    first = streams[0]
    rows = []
    for stream in streams:
        differences = stream.difference(first)
        rows.append(
            {
                "memory": stream.memory,
                "speed": speed(stream.chunks, stream.decode_seconds, stream.plan.settings),
                "cache_bytes": stream.plan.budget.layout.device_bytes,
                "cache_bytes_in_host_memory": stream.plan.budget.host_bytes,
                "peak_bytes": stream.peak_bytes,
                "replayed_passes_per_chunk": [chunk.replayed for chunk in stream.chunks],
                f"difference_to_{first.memory}": differences,
                "first_chunk_that_differs": next((i for i, x in enumerate(differences) if x > 0), None),
                "settings": vars(stream.plan.settings),
            }
        )
    return {
        **environment(device),
        "sources": sources.described(),
        "prompts": first.plan.prompts,
        "frames_per_prompt": first.plan.options.frames_per_prompt,
        "compiled": first.plan.options.compiled,
        "seed": first.plan.seed,
        "how": HOW_MEASURED + " Differences: root mean square over that of the first kind's latents, per chunk.",
        "problems": problems(streams),
        "kinds": rows,
    }


def problems(streams: Sequence[VerifiedStream]) -> list[str]:
    """What must not happen and did, in words; empty if all is well."""
    found = []
    for stream in streams:
        broken = [i for i, latents in enumerate(stream.latents) if not latents.isfinite().all()]
        if broken:
            found.append(f"{stream.memory}: latents of chunks {broken} are not finite")
    alike = [stream for stream in streams if stream.memory in SAME]
    for stream in alike[1:]:
        early = stream.difference(alike[0])[: stream.plan.settings.window_frames // stream.plan.settings.chunk_frames]
        far = [x for x in early if not x <= TOLERANCE]  # a NaN is a problem too
        if far:
            found.append(
                f"{stream.memory} and {alike[0].memory} differ by {far[0]:.2g} while there is nothing to remember"
            )
    return found


def write_report(
    streams: Sequence[VerifiedStream], sources: Sources, device: torch.device, folder: Path
) -> dict[str, object]:
    """Writes report.json and frames.png; returns what the former says."""
    said = record(streams, sources, device)
    lost = write_picture(folder / "frames.png", lambda: _picture(streams))
    said["problems"] = [*problems(streams), *([lost] if lost else [])]
    write_atomically(folder / "report.json", (json.dumps(said, indent=1) + "\n").encode())
    return said


def _picture(streams: Sequence[VerifiedStream]) -> bytes:
    """A row of frames for each kind of memory, a column for each moment; PNG."""
    from matplotlib.figure import Figure

    from memflow_ops.model.plot_style import own_style

    height, width = streams[0].shown[0].shape[:2]
    with own_style():
        figure = Figure(figsize=(2 * COLUMNS + 1, 2 * len(streams) * height / width + 0.6), layout="constrained")
        axes = figure.subplots(len(streams), COLUMNS, squeeze=False)
        chunks = len(streams[0].plan.prompts_by_chunk)
        for stream, row in zip(streams, axes, strict=True):
            for i, (axis, frame) in enumerate(zip(row, stream.shown, strict=True)):
                axis.imshow(frame)
                axis.set_xticks([])
                axis.set_yticks([])
                if axis in axes[0]:
                    axis.set_title(f"chunk {round(i * (chunks - 1) / (COLUMNS - 1))}", fontsize=8)
            row[0].set_ylabel(stream.memory)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=100)
        return content.getvalue()
