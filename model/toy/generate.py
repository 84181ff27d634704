"""Streams stories of the toy world, each into a folder with video.mp4, frames.npz, timeline.png and run.json.

What memory costs is measured on the way. The same story is streamed a second time with memory="none" and the same
noise, chunk by chunk in turn with the first, so that both meet the same load of the machine.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from memflow_ops.model.stories.fragments import FragmentWriter
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.stories.run import make_folders, write_stories
from memflow_ops.model.stories.snapshots import HistoryOptions, Snapshots
from memflow_ops.model.stories.video import VideoWriter, to_pixels
from memflow_ops.model.streaming.chunk import Chunk
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Streamer
from memflow_ops.model.toy.language import embed_prompts
from memflow_ops.model.toy.runs import ToyPlan, ToyRun
from memflow_ops.model.wan.transformer import CausalVideoModel

DEMO_STORY = Path(__file__).parents[1] / "stories" / "demo.jsonl"
"""A story in which a character that is not in the sink leaves and returns after 24 frames."""


def make_toy_plans(
    stories: Sequence[Sequence[str]],
    out: Path,
    settings: StreamSettings,
    *,
    seed: int = 0,
    frames_per_prompt: int = 12,
    baseline: bool = True,
    weights: str = "",
    weights_sha256: str = "",
    device: str = "",
    history: HistoryOptions | None = None,
) -> list[ToyPlan]:
    """Plans the stories and creates their folders. A folder that cannot be written to raises a ValueError.

    One story goes to `out` itself, several go to out/story-000, out/story-001, ... with the seeds seed, seed + 1, ...
    The history gets room for the whole story.

    history: keeps it on disk too, in a folder for each story, from which an interrupted run can go on. A ValueError
        where such a folder cannot be used, or holds another run.
    """
    seed = int(seed)  # one of numpy's integers could not be written as JSON
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    plans = []
    for i, prompts in enumerate(stories):
        chunks = len(chunk_prompts([prompts], frames_per_prompt, settings.chunk_frames))
        room = _room(settings, chunks, history)
        folder = out if len(stories) == 1 else out / f"story-{i:03d}"
        of_model = weights, weights_sha256, device
        plans.append(ToyPlan(list(prompts), folder, room, seed + i, frames_per_prompt, baseline, *of_model))
    make_folders([plan.folder for plan in plans], ("video.mp4", "frames.npz", "timeline.png", "run.json"))
    if history is not None:
        with ExitStack() as closed_on_error:
            for i, plan in enumerate(plans):
                snapshots = history.snapshots(plan.folder.relative_to(out))
                closed_on_error.callback(snapshots.close)
                plans[i] = replace(plan, snapshots=snapshots)
            for plan in plans:
                assert plan.snapshots is not None
                plan.snapshots.begin(plan.identity(), history.resume)
                plan.snapshots.check_made([plan.folder / "video.mp4"])
            closed_on_error.pop_all()
    return plans


def _room(settings: StreamSettings, chunks: int, history: HistoryOptions | None) -> StreamSettings:
    """The settings with room for the prototypes of so many chunks, divided as `history` asks."""
    if settings.memory == "full":
        return replace(settings, device_frames=max(settings.device_frames, chunks))
    on_device = settings.device_frames
    if history is not None and history.device_frames is not None:
        on_device = history.device_frames
    in_host = max(settings.host_frames, chunks - on_device)
    if history is None or history.host_frames is None or settings.memory != "memflow":
        return replace(settings, device_frames=on_device, host_frames=in_host)
    kept = min(in_host, history.host_frames)
    return replace(settings, device_frames=on_device, host_frames=kept, disk_frames=in_host - kept)


def stream_toy_story(model: CausalVideoModel, plan: ToyPlan, report: Callable[[ToyRun], None] | None = None) -> ToyRun:
    """Streams one story into its folder; `write_stories` says how that may end.

    `report` is called after every chunk.
    """
    layout = plan.settings.cache_layout(model, 1)
    run = ToyRun(plan, model.patch_embedding.weight.device, layout.device_bytes + layout.host_bytes)
    writer = _writer(plan)
    if plan.snapshots is None:
        rounds = partial(_rounds, run, _streams(model, plan), writer)
        write_stories([run], [writer], rounds, _files, report, PICTURES)
        return run
    assert isinstance(writer, FragmentWriter)
    with closing(plan.snapshots) as snapshots:
        streams = _streams(model, plan)
        with closing(streams[0]):
            _stream_with_snapshots(run, streams, writer, snapshots, report)
    return run


def _stream_with_snapshots(
    run: ToyRun,
    streams: Sequence[Streamer],
    writer: FragmentWriter,
    snapshots: Snapshots,
    report: Callable[[ToyRun], None] | None,
) -> None:
    """Goes on where the last snapshot is, or begins, and takes others on the way."""
    if snapshots.found is not None:
        with writer.closed_on_error():
            run.restore(snapshots.found["run"])
            writer.cut_back(snapshots.found["video"])
            for stream, saved in zip(streams, snapshots.found["streams"], strict=True):
                stream.load_state_dict(saved)
        snapshots.found = None

    def state() -> dict[str, Any]:
        states = [stream.state_dict() for stream in streams]
        made = {"done": len(run.chunks), "run": run.saved(), "video": writer.position()}
        return {**made, "streams": states, "stores": states[0]["cache"].get("stores", [])}

    def snapshot(now: bool) -> None:
        # A stream that was interrupted between commit and return is ahead of the video, and the last snapshot stays.
        made = len(run.chunks), len(run.baseline_frames)
        in_step = all(stream.cache.committed == count for stream, count in zip(streams, made, strict=False))
        if in_step and (now or snapshots.is_due(len(run.chunks))):
            snapshots.save(state)

    write_stories([run], [writer], partial(_rounds, run, streams, writer), _files, report, PICTURES, snapshot)
    if not run.interrupted:
        snapshots.finish(run.plan.identity())
        writer.discard()


def _streams(model: CausalVideoModel, plan: ToyPlan) -> list[Streamer]:
    """The stream of a story and, where it is asked for, that of its baseline."""
    folder = None if plan.snapshots is None else plan.snapshots.folder
    streams = [Streamer(model, 1, plan.settings, plan.seed, encode=embed_prompts, history_dir=folder)]
    if plan.baseline and plan.settings.memory != "none":
        without = replace(plan.settings, memory="none")
        streams.append(Streamer(model, 1, without, plan.seed, encode=embed_prompts))
    return streams


def _writer(plan: ToyPlan) -> VideoWriter | FragmentWriter:
    """What writes the video; one that can go on where the run can."""
    path, sizes = plan.folder / "video.mp4", (plan.settings.height, plan.settings.width)
    if plan.snapshots is not None:
        return FragmentWriter(path, *sizes)
    return VideoWriter(path, *sizes, fragment_frames=plan.settings.chunk_frames)


def _rounds(
    run: ToyRun, streams: Sequence[Streamer], writer: VideoWriter | FragmentWriter, interrupts: Interrupts
) -> Iterator[None]:
    """Makes chunk after chunk, and with each the same chunk of the baseline. Which one is first alternates."""
    prompts = [(prompt,) for prompt in run.plan.prompts_by_chunk]

    def make(stream: Streamer, index: int) -> Chunk:
        with interrupts.allowed():
            return stream.next_chunk(prompts[index], prompts[min(index + 1, len(prompts) - 1)])

    def make_ours(index: int) -> None:
        chunk = make(streams[0], index)
        frames = to_pixels(chunk.frames[0])
        writer.write(frames)
        run.frames.append(frames)
        run.chunks.append(replace(chunk, frames=chunk.frames.new_empty(0)))  # the pixels are kept above

    def make_baseline(index: int) -> None:
        chunk = make(streams[1], index)
        run.baseline_seconds.append(chunk.seconds)
        run.baseline_frames.append(to_pixels(chunk.frames[0]))

    # A run that goes on may have been stopped between the two.
    for i in range(min(len(run.chunks), len(run.baseline_frames) if streams[1:] else len(prompts)), len(prompts)):
        for ours in (True, False) if i % 2 == 0 else (False, True):
            if ours and len(run.chunks) == i:
                make_ours(i)
            elif not ours and streams[1:] and len(run.baseline_frames) == i:
                make_baseline(i)
        yield


def _draw_timeline(run: ToyRun) -> bytes:
    # It brings matplotlib, which `memflow --help` does not wait for.
    from memflow_ops.model.toy.timeline import draw_timeline

    return draw_timeline(run)


PICTURES = {"timeline.png": _draw_timeline}


def _files(run: ToyRun) -> dict[str, bytes]:
    """The content of every file beside video and timeline, by name."""
    archive = io.BytesIO()
    np.savez_compressed(archive, frames=run.video)
    return {
        "frames.npz": archive.getvalue(),
        "run.json": (json.dumps(run.record(), indent=1) + "\n").encode(),
    }
