"""Videos of stories from a real checkpoint, written chunk by chunk as mp4 files with a run.json beside each."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.store import HistoryFolder
from memflow_ops.environment import environment
from memflow_ops.model.parallel.ranks import OF_A_COLLECTIVE, Ranks, lost_if_it_fails
from memflow_ops.model.pipeline.plan import WanPlan, identity
from memflow_ops.model.pipeline.settings import FRAMES_PER_SECOND
from memflow_ops.model.pipeline.sources import Parts, Sources
from memflow_ops.model.stories.fragments import FragmentWriter
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.run import write_stories
from memflow_ops.model.stories.snapshots import Snapshots
from memflow_ops.model.stories.video import VideoWriter, to_pixels
from memflow_ops.model.streaming.chunk import Chunk
from memflow_ops.model.streaming.latency import Latency
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
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
    memory: list[str] = field(default_factory=list)
    """What the plan said of memory when the run began."""

    def __post_init__(self) -> None:
        self.memory = self.plan.budget.lines()

    def saved(self) -> dict[str, Any]:
        """What has been made so far, for a snapshot."""
        chunks, memory = [chunk.saved() for chunk in self.chunks], self.memory
        return {"chunks": chunks, "decode_seconds": self.decode_seconds, "frames": self.frames, "memory": memory}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on where another run was when it returned `saved`."""
        self.chunks = [Chunk.restored(chunk) for chunk in saved["chunks"]]
        self.decode_seconds, self.frames, self.memory = saved["decode_seconds"], saved["frames"], saved["memory"]

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
            "memory": self.memory,
            "cache_bytes": plan.options.ranks * (plan.budget.layout.device_bytes + plan.budget.host_bytes),
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
    snapshots = plans[0].snapshots
    if snapshots is not None:
        with closing(snapshots):
            _generate_with_snapshots(parts, runs, snapshots, report, ranks)
        return runs
    writers = [video_writer(plan.folder / "video.mp4", plan.settings, parts.vae) for plan in plans]

    def rounds(interrupts: Interrupts) -> Iterator[None]:
        return _add_to(runs, writers, stream_videos(parts, plans, interrupts, ranks))

    write_stories(runs, writers, rounds, _files, report)
    return runs


def _generate_with_snapshots(
    parts: Parts,
    runs: Sequence[WanRun],
    snapshots: Snapshots,
    report: Callable[[WanRun], None] | None,
    ranks: Ranks | None,
) -> None:
    """Goes on where the last snapshot is, or begins, and takes others on the way."""
    plans = [run.plan for run in runs]
    writers = [fragment_writer(plan.folder / "video.mp4", plan.settings, parts.vae) for plan in plans]
    with ExitStack() as opened:
        for writer in writers:
            opened.enter_context(writer.closed_on_error())
        streamer, decoders = make_streamer(parts, plans, ranks), [StreamingDecoder(parts.vae) for _ in plans]
        if ranks is not None:
            if snapshots.found is not None and snapshots.found["stores"]:
                _take_in_history(parts, plans, snapshots)
            ranks.any(snapshots.found is not None)  # tells the others
        if snapshots.found is not None:
            for run, writer, decoder, saved in zip(runs, writers, decoders, snapshots.found["stories"], strict=True):
                run.restore(saved["run"])
                writer.cut_back(saved["video"])
                decoder.load_state_dict(saved["decoder"])
            streamer.load_state_dict(snapshots.found["stream"])
            snapshots.found = None

    def rounds(interrupts: Interrupts) -> Iterator[None]:
        videos = stream_videos(parts, plans, interrupts, ranks, streamer, decoders)
        return _add_to(runs, writers, videos)

    def state() -> dict[str, Any]:
        stream = streamer.state_dict()
        stories = [
            {"run": run.saved(), "video": writer.position(), "decoder": decoder.state_dict()}
            for run, writer, decoder in zip(runs, writers, decoders, strict=True)
        ]
        stores = stream["cache"].get("stores", [])
        return {"done": len(runs[0].chunks), "stories": stories, "stream": stream, "stores": stores}

    def snapshot(now: bool) -> None:
        done = len(runs[0].chunks)
        # Where the decoding of a chunk was interrupted, the stream is ahead of the videos, and the last snapshot stays.
        due = streamer.cache.committed == done and (now or snapshots.is_due(done))
        if due if ranks is None else ranks.any(due):
            snapshots.save(state)

    with closing(streamer):
        write_stories(runs, writers, rounds, _files, report, snapshot=snapshot)
    if not runs[0].interrupted:
        snapshots.finish(identity(plans, runs[0].sources, parts.device))
        for writer in writers:
            writer.discard()


def _take_in_history(parts: Parts, plans: Sequence[WanPlan], snapshots: Snapshots) -> None:
    """Takes the history that one process has kept in files into the snapshot, where several find their heads of it."""
    found = snapshots.found
    assert found is not None
    layout = plans[0].settings.cache_layout(parts.model, len(plans))
    with closing(FrameCache(layout, "cpu", snapshots.folder)) as cache:
        cache.load_state_dict(found["stream"]["cache"])
        history = cache.state_dict(in_full=True)
    snapshots.take_in({**found, "stream": {**found["stream"], "cache": history}, "stores": []})


def _add_to(
    runs: Sequence[WanRun],
    writers: Sequence[VideoWriter | FragmentWriter],
    videos_by_chunk: Iterator[tuple[Chunk, list[np.ndarray], float]],
) -> Iterator[None]:
    """Adds every chunk to all runs and videos."""
    for chunk, videos, seconds in videos_by_chunk:
        for number, (run, writer, frames) in enumerate(zip(runs, writers, videos, strict=True)):
            writer.write(frames)
            run.chunks.append(chunk.of_story(number))
            run.decode_seconds.append(seconds)
            run.frames += len(frames)
        yield


def _files(run: WanRun) -> dict[str, bytes]:
    """The content of every file beside the video, by name."""
    return {"run.json": (json.dumps(run.record(), indent=1) + "\n").encode()}


def follow_stories(parts: Parts, plans: Sequence[WanPlan], ranks: Ranks) -> None:
    """Does the part of this process in what the first one generates, snapshots included. Raises a KeyboardInterrupt
    where that one was interrupted."""
    streamer, history = make_streamer(parts, plans, ranks), plans[0].options.history

    def join_snapshot() -> None:
        if history is not None and ranks.any(False):
            streamer.state_dict()

    if history is not None and ranks.any(False):
        streamer.load_state_dict(history.snapshot(plans[0].below)["stream"])
    with Interrupts() as interrupts:
        try:
            for _ in stream_chunks(parts, plans, interrupts, ranks, streamer):
                join_snapshot()
        except KeyboardInterrupt:
            if streamer.cache.committed:
                join_snapshot()
            raise


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


def fragment_writer(path: Path, settings: StreamSettings, vae: Any) -> FragmentWriter:
    """As `video_writer`, for a video that can go on."""
    scale = vae.spatial_compression_ratio
    return FragmentWriter(path, settings.height * scale, settings.width * scale, fps=FRAMES_PER_SECOND, scale=1)


def stream_videos(
    parts: Parts,
    plans: Sequence[WanPlan],
    interrupts: Interrupts,
    ranks: Ranks | None = None,
    streamer: Streamer | None = None,
    decoders: Sequence[StreamingDecoder] | None = None,
) -> Iterator[tuple[Chunk, list[np.ndarray], float]]:
    """Streams stories together. Yields each chunk, the video frames (F, H, W, 3) uint8 of every story, and the seconds
    that decoding them took.

    streamer, decoders: go on where they are; None: new ones begin.
    """
    decoders = decoders or [StreamingDecoder(parts.vae) for _ in plans]
    for chunk in stream_chunks(parts, plans, interrupts, ranks, streamer):
        with interrupts.allowed() if ranks is None else nullcontext():
            started = time.perf_counter()
            latents = chunk.frames.split(1)
            videos = [to_pixels(decoder.decode(x)[0]) for decoder, x in zip(decoders, latents, strict=True)]
            seconds = time.perf_counter() - started
        yield chunk, videos, seconds


def _history_folder(snapshots: Snapshots | None) -> HistoryFolder | None:
    """Where a stream of one process keeps its history; None where it has none on disk, or goes on from a snapshot of
    several processes, which have it in there."""
    if snapshots is None or (snapshots.found is not None and not snapshots.found["stores"]):
        return None
    return snapshots.folder


def make_streamer(parts: Parts, plans: Sequence[WanPlan], ranks: Ranks | None = None) -> Streamer:
    """The stream of stories that are streamed together."""
    first = plans[0]
    return Streamer(
        parts.model,
        len(plans),
        first.settings,
        [plan.seed for plan in plans],
        encode=parts.encode,
        cuda_graphs=first.options.cuda_graphs,
        ranks=ranks,
        history_dir=None if ranks is not None else _history_folder(first.snapshots),
    )


def stream_chunks(
    parts: Parts,
    plans: Sequence[WanPlan],
    interrupts: Interrupts,
    ranks: Ranks | None = None,
    streamer: Streamer | None = None,
) -> Iterator[Chunk]:
    """Streams stories together. Where several processes do, they agree between two chunks whether one of them has been
    interrupted, because none can leave a chunk that the others go on with."""
    streamer = streamer or make_streamer(parts, plans, ranks)
    every = list(zip(*(plan.prompts_by_chunk for plan in plans), strict=True))
    for index in range(streamer.cache.committed, len(every)):
        if ranks is not None and ranks.any(interrupts.waiting):
            interrupts.waiting = False
            raise KeyboardInterrupt
        with interrupts.allowed() if ranks is None else lost_if_it_fails(OF_A_COLLECTIVE):
            chunk = streamer.next_chunk(every[index], every[min(index + 1, len(every) - 1)])
        yield chunk
