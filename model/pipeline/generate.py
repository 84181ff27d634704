"""Videos from real checkpoints: transformer, UMT5 and VAE from disk, a stream of chunks, an mp4 at 16 frames/s."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memflow_ops.environment import environment
from memflow_ops.model.pipeline.plan import Plan
from memflow_ops.model.pipeline.settings import FRAMES_PER_SECOND
from memflow_ops.model.pipeline.sources import Parts, Sources
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.run import make_stories
from memflow_ops.model.stories.video import VideoWriter, to_pixels
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer
from memflow_ops.model.wan.vae import StreamingDecoder

"""Latent frames, 10 seconds, as MemFlow and LongLive train."""
HOW_MEASURED = (
    "Video frames, of all stories that are streamed together, over a chunk's wall time: retrieval, re-caching and all "
    "passes of the transformer; decoded: and of the VAE. Medians over chunks that have a past beyond the local window."
)
"""What few-step checkpoints of the Wan 2.1 family are streamed with; height and width of the latents of 480 x 832."""
"""The part of the free memory that is not planned with, 1 / RESERVE."""
"""What is otherwise with a kind of memory."""


@dataclass
class Run:
    """A story as far as it has been made."""

    plan: Plan
    sources: Sources
    device: torch.device
    chunks: list[Chunk] = field(default_factory=list)
    """its part of them, without frames; their seconds are those of all stories together"""
    decode_seconds: list[float] = field(default_factory=list)
    """per chunk, of all stories together"""
    frames: int = 0
    """of the video"""
    interrupted: bool = False
    error: str | None = None

    def speed(self) -> dict[str, object] | None:
        return speed(self.chunks, self.decode_seconds, self.plan.settings, self.plan.together)

    def record(self) -> dict[str, object]:
        """What run.json says."""
        plan = self.plan
        return {
            **environment(self.device),
            "prompts": plan.prompts,
            "seed": plan.seed,
            "frames_per_prompt": plan.frames_per_prompt,
            "sources": self.sources.described(),
            "settings": asdict(plan.settings),
            "memory": plan.budget.lines(),
            "compiled": plan.compiled,
            "stories_together": plan.together,
            "frames": self.frames,
            "fps": FRAMES_PER_SECOND,
            "interrupted": self.interrupted,
            "error": self.error,
            "speed": self.speed(),
            "chunks": [
                {
                    "chunk": chunk.index,
                    "first_frame": chunk.first_frame,
                    "prompt": chunk.prompts[0],
                    "seconds": chunk.seconds,
                    "decode_seconds": decoding,
                    "replayed": chunk.replayed,
                    "retrieved": chunk.retrieved[0],
                    "relevance": chunk.relevance[0],
                    "candidates": chunk.candidates[0],
                    "activation": chunk.activation[0],
                }
                for chunk, decoding in zip(self.chunks, self.decode_seconds, strict=True)
            ],
        }


def speed(
    chunks: Sequence[Chunk], decode_seconds: Sequence[float], settings: StreamSettings, together: int = 1
) -> dict[str, object] | None:
    """Medians over the chunks that have a past beyond the local window; None before there is one."""
    steady = [i for i, chunk in enumerate(chunks) if chunk.first_frame + settings.chunk_frames > settings.window_frames]
    if not steady:
        return None
    seconds = statistics.median(chunks[i].seconds for i in steady)
    decoding = statistics.median(decode_seconds[i] for i in steady)
    frames = 4 * settings.chunk_frames * together
    return {
        "seconds_per_chunk": seconds,
        "decode_seconds_per_chunk": decoding,
        "frames_per_second": frames / seconds,
        "frames_per_second_decoded": frames / (seconds + decoding),
        "chunks": len(steady),
        "how": HOW_MEASURED,
    }


def generate(
    parts: Parts, plans: Sequence[Plan], sources: Sources, report: Callable[[Run], None] | None = None
) -> list[Run]:
    """Streams stories together, each into video.mp4 and run.json in its folder; `make_stories` says how that may end.
    `report` is told the first of the runs after every chunk."""
    runs = [Run(plan, sources, parts.device) for plan in plans]
    writers = [video_writer(plan.folder / "video.mp4", plan.settings, parts.vae) for plan in plans]

    def rounds(interrupts: Interrupts) -> Iterator[None]:
        for chunk, videos, seconds in streamed(parts, plans, interrupts):
            for number, (run, writer, frames) in enumerate(zip(runs, writers, videos, strict=True)):
                writer.write(frames)
                run.chunks.append(of_story(chunk, number))
                run.decode_seconds.append(seconds)
                run.frames += len(frames)
            yield

    def files(run: Run) -> dict[str, bytes]:
        return {"run.json": (json.dumps(run.record(), indent=1) + "\n").encode()}

    make_stories(runs, writers, rounds, files, report)
    return runs


def of_story(chunk: Chunk, number: int) -> Chunk:
    """One story's part of a chunk, without its frames: the pixels are in the video."""

    def own(of_each: list[Any]) -> list[Any]:
        return [of_each[number]]

    return replace(
        chunk,
        prompts=own(chunk.prompts),
        frames=chunk.frames.new_empty(0),
        retrieved=own(chunk.retrieved),
        relevance=own(chunk.relevance),
        candidates=own(chunk.candidates),
        activation=own(chunk.activation),
    )


def video_writer(path: Path, settings: StreamSettings, vae: Any) -> VideoWriter:
    """An mp4 of the VAE's pixels, a fragment per chunk."""
    scale = vae.spatial_compression_ratio
    return VideoWriter(
        path,
        settings.height * scale,
        settings.width * scale,
        fragment_frames=settings.chunk_frames * vae.config.scale_factor_temporal,
        fps=FRAMES_PER_SECOND,
        scale=1,
    )


def streamed(
    parts: Parts, plans: Sequence[Plan], interrupts: Interrupts
) -> Iterator[tuple[Chunk, list[np.ndarray], float]]:
    """Chunk after chunk of stories that are streamed together, the video frames of each (F, H, W, 3) uint8, and the
    seconds that decoding took."""
    first = plans[0]
    streamer = Streamer(
        parts.model, len(plans), first.settings, [plan.seed for plan in plans], encode=parts.encode,
        cuda_graphs=first.cuda_graphs,
    )  # fmt: skip
    decoders = [StreamingDecoder(parts.vae) for _ in plans]
    for prompts in zip(*(plan.spoken for plan in plans), strict=True):
        with interrupts.allowed():
            chunk = streamer.next_chunk(prompts)
            started = time.perf_counter()
            latents = chunk.frames.split(1)
            videos = [to_pixels(decoder.decode(x)[0]) for decoder, x in zip(decoders, latents, strict=True)]
            seconds = time.perf_counter() - started
        yield chunk, videos, seconds
