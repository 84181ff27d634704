"""Streams stories of the toy world, each into a folder with video.mp4, frames.npz, timeline.png and run.json.

What memory costs is measured on the way. The same story is streamed a second time with memory="none" and the same
noise, chunk by chunk in turn with the first, so that both meet the same load of the machine.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.stories.run import make_folders, write_stories
from memflow_ops.model.stories.video import VideoWriter, to_pixels
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import stream
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
) -> list[ToyPlan]:
    """Plans the stories and creates their folders. A folder that cannot be written to raises a ValueError.

    One story goes to `out` itself, several go to out/story-000, out/story-001, ... with the seeds seed, seed + 1, ...
    The history gets room for the whole story.
    """
    seed = int(seed)  # one of numpy's integers could not be written as JSON
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    plans = []
    for i, prompts in enumerate(stories):
        chunks = len(chunk_prompts([prompts], frames_per_prompt, settings.chunk_frames))
        if settings.memory == "full":
            room = replace(settings, device_frames=max(settings.device_frames, chunks))
        else:
            room = replace(settings, host_frames=max(settings.host_frames, chunks - settings.device_frames))
        folder = out if len(stories) == 1 else out / f"story-{i:03d}"
        plans.append(ToyPlan(list(prompts), folder, room, seed + i, frames_per_prompt, baseline, weights))
    make_folders([plan.folder for plan in plans], ("video.mp4", "frames.npz", "timeline.png", "run.json"))
    return plans


def stream_toy_story(model: CausalVideoModel, plan: ToyPlan, report: Callable[[ToyRun], None] | None = None) -> ToyRun:
    """Streams one story into its folder; `write_stories` says how that may end.

    `report` is called after every chunk.
    """
    settings = plan.settings
    run = ToyRun(plan, model.patch_embedding.weight.device)
    writer = VideoWriter(
        plan.folder / "video.mp4", settings.height, settings.width, fragment_frames=settings.chunk_frames
    )
    pictures = {"timeline.png": _draw_timeline}
    write_stories([run], [writer], lambda interrupts: _rounds(model, run, writer, interrupts), _files, report, pictures)
    return run


def _rounds(model: CausalVideoModel, run: ToyRun, writer: VideoWriter, interrupts: Interrupts) -> Iterator[None]:
    """Makes chunk after chunk, and with each the same chunk of the baseline. Which one is first alternates."""
    plan = run.plan
    prompts = [(prompt,) for prompt in plan.prompts_by_chunk]
    ours = stream(model, prompts, plan.settings, plan.seed, encode=embed_prompts)
    baseline = None
    if plan.baseline and plan.settings.memory != "none":
        baseline = stream(model, prompts, replace(plan.settings, memory="none"), plan.seed, encode=embed_prompts)

    def make_ours() -> None:
        with interrupts.allowed():
            chunk = next(ours)
        frames = to_pixels(chunk.frames[0])
        writer.write(frames)
        run.frames.append(frames)
        run.chunks.append(replace(chunk, frames=chunk.frames.new_empty(0)))  # the pixels are kept above

    def make_baseline() -> None:
        if baseline is not None:
            with interrupts.allowed():
                chunk = next(baseline)
            run.baseline_seconds.append(chunk.seconds)
            run.baseline_frames.append(to_pixels(chunk.frames[0]))

    for i in range(len(prompts)):
        for make in (make_ours, make_baseline) if i % 2 == 0 else (make_baseline, make_ours):
            make()
        yield


def _draw_timeline(run: ToyRun) -> bytes:
    # It brings matplotlib, which `memflow --help` does not wait for.
    from memflow_ops.model.toy.timeline import draw_timeline

    return draw_timeline(run)


def _files(run: ToyRun) -> dict[str, bytes]:
    """The content of every file beside video and timeline, by name."""
    archive = io.BytesIO()
    np.savez_compressed(archive, frames=run.video)
    return {
        "frames.npz": archive.getvalue(),
        "run.json": (json.dumps(run.record(), indent=1) + "\n").encode(),
    }
