"""Videos of stories from a real checkpoint, written chunk by chunk as mp4 files with a run.json beside each."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memflow_ops.environment import environment
from memflow_ops.model.parallel.ranks import Ranks
from memflow_ops.model.pipeline.plan import WanPlan
from memflow_ops.model.pipeline.settings import FRAMES_PER_SECOND
from memflow_ops.model.pipeline.sources import Parts, Sources
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.run import write_stories
from memflow_ops.model.stories.video import VideoWriter, to_pixels
from memflow_ops.model.streaming.latency import Latency
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer
from memflow_ops.model.wan.vae import StreamingDecoder

HOW_MEASURED = (
    "Video frames, of all stories that are streamed together, over a chunk's wall time: retrieval, re-caching and all "
    "passes of the transformer; decoded: and of the VAE. Medians over chunks that have a past beyond the local window."
)


@dataclass
class WanRun:
    """What has been made of a story so far."""

    plan: WanPlan
    sources: Sources
    device: torch.device
    chunks: list[Chunk] = field(default_factory=list)
    """The story's part of each, without frames. Their seconds are those of all stories that are streamed together."""
    decode_seconds: list[float] = field(default_factory=list)
    """Per chunk, of all stories that are streamed together."""
    frames: int = 0
    """Of the video."""
    interrupted: bool = False
    error: str | None = None
    problems: list[str] = field(default_factory=list)

    def speed(self) -> dict[str, object] | None:
        return speed(self.chunks, self.decode_seconds, self.plan.settings, self.plan.together)

    def record(self) -> dict[str, object]:
        """What run.json says."""
        plan = self.plan
        return {
            **environment(self.device),
            "prompts": plan.prompts,
            "seed": plan.seed,
            "frames_per_prompt": plan.options.frames_per_prompt,
            "sources": self.sources.described(),
            "settings": asdict(plan.settings),
            "memory": plan.budget.lines(),
            "cache_bytes": plan.budget.layout.device_bytes + plan.budget.host_bytes,
            "compiled": plan.options.compiled,
            "stories_together": plan.together,
            "frames": self.frames,
            "fps": FRAMES_PER_SECOND,
            "interrupted": self.interrupted,
            "error": self.error,
            "problems": self.problems,
            "speed": self.speed(),
            "latency": latency(self.chunks, self.decode_seconds, plan.settings),
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
    """What run.json says of the speed: medians over the chunks that have a past beyond the local window. None if there
    is no such chunk. together: stories that were streamed together."""
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


def latency(
    chunks: Sequence[Chunk], decode_seconds: Sequence[float], settings: StreamSettings
) -> dict[str, object] | None:
    """What run.json says of the latency of a video that is watched while it is made, decoding included; see `Latency`.
    None before the first chunk."""
    figures = Latency()
    for chunk, decoding in zip(chunks, decode_seconds, strict=True):
        frames = 4 * settings.chunk_frames - (3 if chunk.index == 0 else 0)  # the first latent frame is one video frame
        figures.add(chunk.seconds + decoding, frames / FRAMES_PER_SECOND)
    return figures.record()


def generate_stories(
    parts: Parts,
    plans: Sequence[WanPlan],
    sources: Sources,
    report: Callable[[WanRun], None] | None = None,
    ranks: Ranks | None = None,
) -> list[WanRun]:
    """Streams stories together, each into video.mp4 and run.json in its folder; `write_stories` says how that may end.
    report: is called with the first of the runs after every chunk. ranks: the processes that make the videos; this is
    the first of them, and the others `follow_stories`."""
    runs = [WanRun(plan, sources, parts.device) for plan in plans]
    writers = [video_writer(plan.folder / "video.mp4", plan.settings, parts.vae) for plan in plans]

    def rounds(interrupts: Interrupts) -> Iterator[None]:
        for chunk, videos, seconds in stream_videos(parts, plans, interrupts, ranks):
            for number, (run, writer, frames) in enumerate(zip(runs, writers, videos, strict=True)):
                writer.write(frames)
                run.chunks.append(chunk.of_story(number))
                run.decode_seconds.append(seconds)
                run.frames += len(frames)
            yield

    def files(run: WanRun) -> dict[str, bytes]:
        return {"run.json": (json.dumps(run.record(), indent=1) + "\n").encode()}

    write_stories(runs, writers, rounds, files, report)
    return runs


def follow_stories(parts: Parts, plans: Sequence[WanPlan], ranks: Ranks) -> None:
    """Does the part of this process in what the first one generates. Raises a KeyboardInterrupt where that one was
    interrupted."""
    with Interrupts() as interrupts:
        for _ in stream_chunks(parts, plans, interrupts, ranks):
            pass


def video_writer(path: Path, settings: StreamSettings, vae: Any) -> VideoWriter:
    """Writes the VAE's pixels, in one fragment per chunk."""
    scale = vae.spatial_compression_ratio
    return VideoWriter(
        path,
        settings.height * scale,
        settings.width * scale,
        fragment_frames=settings.chunk_frames * vae.config.scale_factor_temporal,
        fps=FRAMES_PER_SECOND,
        scale=1,
    )


def stream_videos(
    parts: Parts, plans: Sequence[WanPlan], interrupts: Interrupts, ranks: Ranks | None = None
) -> Iterator[tuple[Chunk, list[np.ndarray], float]]:
    """Streams stories together. Yields each chunk, the video frames (F, H, W, 3) uint8 of every story, and the seconds
    that decoding them took."""
    decoders = [StreamingDecoder(parts.vae) for _ in plans]
    for chunk in stream_chunks(parts, plans, interrupts, ranks):
        with interrupts.allowed() if ranks is None else nullcontext():
            started = time.perf_counter()
            latents = chunk.frames.split(1)
            videos = [to_pixels(decoder.decode(x)[0]) for decoder, x in zip(decoders, latents, strict=True)]
            seconds = time.perf_counter() - started
        yield chunk, videos, seconds


def stream_chunks(
    parts: Parts, plans: Sequence[WanPlan], interrupts: Interrupts, ranks: Ranks | None = None
) -> Iterator[Chunk]:
    """Streams stories together. Where several processes do, they agree between two chunks whether one of them has been
    interrupted, because none can leave a chunk that the others go on with."""
    first = plans[0]
    seeds = [plan.seed for plan in plans]
    graphs = first.options.cuda_graphs
    streamer = Streamer(
        parts.model, len(plans), first.settings, seeds, encode=parts.encode, cuda_graphs=graphs, ranks=ranks
    )
    for prompts in zip(*(plan.prompts_by_chunk for plan in plans), strict=True):
        if ranks is not None and ranks.any(interrupts.waiting):
            interrupts.waiting = False
            raise KeyboardInterrupt
        with interrupts.allowed() if ranks is None else nullcontext():
            chunk = streamer.next_chunk(prompts)
        yield chunk
