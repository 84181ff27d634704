"""What the commands do with real checkpoints, and the words they choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memflow_ops.cli.progress import run_stories

if TYPE_CHECKING:
    from memflow_ops.model.checkpoints.pretrained import Pretrained
    from memflow_ops.model.pipeline.generate import Run
    from memflow_ops.model.pipeline.plan import Plan
    from memflow_ops.model.pipeline.sources import Parts, Sources
    from memflow_ops.model.pipeline.verify import Outcome
    from memflow_ops.model.streaming.settings import StreamSettings


def prepare(
    story: Path,
    out: Path,
    sources: Sources,
    *,
    memories: Sequence[str] | None = None,
    most: int | None = None,
    seed: int = 0,
    frames_per_prompt: int | None = None,
    history_frames: int | None = None,
    device: str = "auto",
    height: int = 480,
    width: int = 832,
    cuda_graphs: bool | None = None,
    compile: bool = False,
    batch: int = 1,
    names: Sequence[str] = ("video.mp4", "run.json"),
    **settings: Any,
) -> tuple[Parts, list[list[Plan]]]:
    """Checks everything that can be wrong, says what memory the streams will take, and loads all parts.

    memories: plans for each of them and each story (None: the one that the checkpoint was tuned for), in streams of up
    to `batch` stories. most: stories to take. names: of the files that will be written into each folder. settings: what
    differs from `WAN_SETTINGS`. What cannot fit is refused before anything is on the device.
    """
    from memflow_ops.cli.options import check_used
    from memflow_ops.environment import pick_device
    from memflow_ops.model.pipeline.plan import Free, make_plans
    from memflow_ops.model.pipeline.settings import FRAMES_PER_PROMPT
    from memflow_ops.model.pipeline.sources import latent_size, load_parts
    from memflow_ops.model.stories.prompts import read_stories
    from memflow_ops.model.stories.run import make_folders

    stories = read_stories(story, any_prompt)[:most]
    sources.check()
    size = dict(zip(("height", "width"), latent_size(sources.vae, height, width), strict=True))
    for memory in memories or ():
        _settings(memory, **settings, **size)  # refuses what cannot be before the weights are read
    asked = settings if history_frames is None else {**settings, "history_frames": history_frames}
    if memories:
        check_used(asked, memories)
    free = Free.now(pick_device(device))
    pretrained = sources.read()
    if not memories:
        check_used(asked, [pretrained.memory], ", which this checkpoint was tuned for")
    typer.echo(described(pretrained))
    streams = []
    for memory in dict.fromkeys(memories or (pretrained.memory,)):
        streams += make_plans(
            stories, out, _settings(memory, **settings, **size), sources, pretrained, free, seed=seed,
            frames_per_prompt=frames_per_prompt or FRAMES_PER_PROMPT, history_frames=history_frames,
            cuda_graphs=cuda_graphs, compiled=compile, batch=batch,
        )  # fmt: skip
    plans = [plan for stream in streams for plan in stream]
    largest = max(plans, key=lambda plan: plan.budget.device_bytes + plan.budget.host_bytes)
    typer.echo("\n".join(largest.budget.lines()))
    if batch > 1 and len(plans) > 1:
        several = "stream" if len(streams) == 1 else "streams"
        typer.echo(f"{len(plans)} stories in {len(streams)} {several}: those with equally many prompts run together")
    make_folders([plan.folder for plan in plans], names)
    prompts = [prompt for story in stories for prompt in story]
    return load_parts(sources, pretrained, prompts, free.device, compile), streams


def _settings(memory: str, **changes: Any) -> StreamSettings:
    """Those of a kind of memory, with room on the device until the history is divided."""
    from memflow_ops.model.pipeline.settings import OF_A_KIND, WAN_SETTINGS

    changes = {**OF_A_KIND.get(memory, {}), **changes, "memory": memory}
    bank = changes.get("bank_frames", WAN_SETTINGS.bank_frames)
    return replace(
        WAN_SETTINGS, **changes, device_frames=max(WAN_SETTINGS.device_frames, bank + WAN_SETTINGS.window_frames)
    )


def any_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise ValueError("a prompt is empty")


def stream_stories(parts: Parts, streams: Sequence[Sequence[Plan]], sources: Sources) -> Iterator[Sequence[Run]]:
    """Makes one stream of stories after another; yields each when its files are written."""
    from memflow_ops.model.pipeline.generate import generate

    def so_far(run: Run) -> str:
        seconds = sum(chunk.seconds for chunk in run.chunks) + sum(run.decode_seconds)
        return f"{run.frames * run.plan.together / seconds:.1f} frames/s"

    return run_stories(streams, lambda plans, report: generate(parts, plans, sources, report), so_far, made)


def verify(parts: Parts, plans: Sequence[Plan]) -> Iterator[Outcome]:
    """Streams every plan behind progress bars; yields each kind of memory when its video is written."""
    from rich.console import Console
    from rich.progress import Progress

    from memflow_ops.model.pipeline.verify import verify

    with Progress(console=Console(stderr=True)) as bar:
        tasks = {str(plan.settings.memory): bar.add_task(plan.settings.memory, total=None) for plan in plans}
        yield from verify(parts, plans, lambda kind, done, total: bar.update(tasks[kind], completed=done, total=total))


def made(run: Run) -> str:
    return (
        f"Files in {run.plan.folder}:\n"
        f"  video.mp4     the video, {run.frames} frames\n"
        f"  run.json      settings, versions, times, and what was retrieved"
    )


def speed(run: Run) -> str:
    """The run's speed in words."""
    measured: dict[str, Any] | None = run.speed()
    if measured is None:
        return "It was too short to tell its speed."
    of_stories = f" of {run.plan.together} stories" if run.plan.together > 1 else ""
    return (
        f"A chunk{of_stories} took {measured['seconds_per_chunk']:.2f} s, {measured['frames_per_second']:.1f} frames/s "
        f"(the transformer alone; with the VAE {measured['frames_per_second_decoded']:.1f}), median of "
        f"{measured['chunks']} chunks."
    )


def described(pretrained: Pretrained) -> str:
    """A checkpoint in words."""
    config = pretrained.config
    origin = f"{pretrained.layout} layout" + (f", its {pretrained.part}" if pretrained.part else "")
    words = (
        f"{pretrained.parameters:,} parameters in {str(pretrained.dtype).removeprefix('torch.')} ({origin}): "
        f"{config.num_layers} layers, width {config.dim}, {config.num_heads} heads, feed-forward {config.ffn_dim}, "
        f"text {config.text_len} x {config.text_dim}; streams with --memory {pretrained.memory} by default"
    )
    return words + (f"\nLoRA merged: {pretrained.lora}" if pretrained.lora else "")


def compared(outcomes: Sequence[Outcome], said: dict[str, Any], folder: Path) -> str:
    """What `memflow verify` found, as a table."""
    from memflow_ops.model.pipeline.budget import size

    first = outcomes[0].memory
    rows = [
        ("memory", "s/chunk", "frames/s", "with VAE", "cache", "peak", f"differs from {first}", "in the last chunk")
    ]
    for kind in said["kinds"]:
        measured = kind["speed"]
        numbers = ("-", "-", "-")
        if measured:
            numbers = (
                f"{measured['seconds_per_chunk']:.3f}",
                f"{measured['frames_per_second']:.1f}",
                f"{measured['frames_per_second_decoded']:.1f}",
            )
        start = kind["first_chunk_that_differs"]
        rows.append(
            (
                kind["memory"],
                *numbers,
                size(kind["cache_bytes"] + kind["cache_bytes_in_host_memory"]),
                size(kind["peak_bytes"]) if kind["peak_bytes"] else "-",
                "never" if start is None else f"from chunk {start} on",
                f"{kind[f'difference_to_{first}'][-1]:.3f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(f"{word:<{width}}" for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            *table,
            said["how"],
            f"Files in {folder}:",
            "  frames.png    frames of every kind of memory, side by side",
            "  report.json   all of this in numbers",
            *(f"  {outcome.memory + '.mp4':<13} its video" for outcome in outcomes),
        ]
    )
