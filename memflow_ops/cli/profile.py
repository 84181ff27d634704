"""What `memflow profile-selection` does, and the words it chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memflow_ops.cli.progress import fail, mistakes

if TYPE_CHECKING:
    from memflow_ops.model.pipeline.sources import Sources
    from memflow_ops.model.selection_profile.figures import SelectionProfile
    from memflow_ops.model.streaming.settings import StreamSettings
    from memflow_ops.model.streaming.streamer import TextEncoder
    from memflow_ops.model.wan.transformer import CausalVideoModel

TOY_SIZES = ((8, 16, 32, 64), (1, 16, 0))
"""Block sizes, a frame of the toy's being 64 tokens, and query groups; 0: the chunk."""
WAN_SIZES = ((16, 32, 64, 128), (1, 128, 0))
STORY_LENGTH = 2
"""Which of the lengths of held-out stories the toy world streams: 24 prompts."""


@dataclass(frozen=True)
class Watched:
    """A stream that is to be profiled, checked."""

    model: CausalVideoModel
    spoken: Sequence[Sequence[str]]
    settings: StreamSettings
    encode: TextEncoder
    block_sizes: list[int]
    query_groups: list[int | None]
    name: str
    """of the model, in the picture"""
    about: dict[str, Any]
    """what the results say of it"""


def toy(
    story: Path | None,
    out: Path,
    stories: int,
    weights: Path | None,
    device: str,
    block_sizes: list[int] | None,
    query_groups: list[int] | None,
    options: dict[str, Any],
) -> Watched:
    """The toy world: held-out stories, or the first of a file. options: what differs from `TOY_SETTINGS`."""
    from memflow_ops.environment import pick_device
    from memflow_ops.files import check_target, sha256
    from memflow_ops.model.selection_profile.profile import check_profile
    from memflow_ops.model.stories.prompts import chunk_prompts, read_stories
    from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
    from memflow_ops.model.toy.evaluation.held_out import FRAMES_PER_PROMPT, make_stories
    from memflow_ops.model.toy.language import embed_prompts, parse_prompt
    from memflow_ops.model.toy.settings import TOY_SETTINGS
    from memflow_ops.model.toy.train import HELD_OUT_SEED

    check_target(out, ".json")
    check_target(out.with_suffix(".png"), ".png")
    frames = options.pop("frames_per_prompt", FRAMES_PER_PROMPT)
    told = read_stories(story, parse_prompt)[:1] if story else make_stories(stories, HELD_OUT_SEED)[STORY_LENGTH]
    spoken = chunk_prompts(told, frames, TOY_SETTINGS.chunk_frames)
    bank = options.get("bank_frames", TOY_SETTINGS.bank_frames)
    room = max(TOY_SETTINGS.device_frames, len(spoken), bank + TOY_SETTINGS.window_frames)
    settings = replace(TOY_SETTINGS, **options, device_frames=room)
    model = load_model(weights or TOY_WEIGHTS, pick_device(device))
    sizes = _sizes(block_sizes, query_groups, TOY_SIZES)
    check_profile(settings, len(spoken), model.tokens(settings.height, settings.width), *sizes)
    file = weights or TOY_WEIGHTS
    about = {"weights": {"name": file.name, "sha256": sha256(file)}, "stories": told, "frames_per_prompt": frames}
    return Watched(model, spoken, settings, embed_prompts, *sizes, "The toy world", about)


def real(
    story: Path | None,
    out: Path,
    sources: Sources,
    block_sizes: list[int] | None,
    query_groups: list[int] | None,
    options: dict[str, Any],
) -> Watched:
    """A real checkpoint. options: as for `cli_wan.prepare`."""
    from memflow_ops.cli import generate
    from memflow_ops.files import check_target
    from memflow_ops.model.pipeline import settings as pipeline_settings
    from memflow_ops.model.pipeline import verify
    from memflow_ops.model.pipeline.sources import latent_size
    from memflow_ops.model.selection_profile.profile import check_profile, first_full_chunk
    from memflow_ops.model.stories.prompts import read_stories

    check_target(out, ".json")
    check_target(out.with_suffix(".png"), ".png")
    story = story or verify.STORY
    (told,) = read_stories(story, generate.any_prompt)[:1]
    frames = options.get("frames_per_prompt", pipeline_settings.FRAMES_PER_PROMPT)
    chunks = -(-len(told) * frames // pipeline_settings.WAN_SETTINGS.chunk_frames)
    if "bank_frames" not in options:  # as large as is full for a quarter of the story
        beyond = first_full_chunk(replace(pipeline_settings.WAN_SETTINGS, bank_frames=0))
        options["bank_frames"] = max(
            0, min(pipeline_settings.WAN_SETTINGS.bank_frames, chunks - chunks // 4 - 1 - beyond)
        )
    sizes = _sizes(block_sizes, query_groups, WAN_SIZES)
    height, width = latent_size(None, options.get("height", 480), options.get("width", 832))
    if block_sizes is None:
        sizes = [size for size in sizes[0] if size <= height * width // 4] or [height * width // 4], sizes[1]
    check_profile(
        replace(pipeline_settings.WAN_SETTINGS, bank_frames=options["bank_frames"]), chunks, height * width // 4, *sizes
    )  # before the weights are read
    parts, ((plan,),) = generate.prepare(
        story, out.parent, sources, memories=["memflow"], most=1, cuda_graphs=False, **options
    )
    about = {"sources": sources.described(), "stories": [plan.prompts], "frames_per_prompt": frames}
    spoken = [(prompt,) for prompt in plan.spoken]
    return Watched(parts.model, spoken, plan.settings, parts.encode, *sizes, sources.checkpoint.name, about)


def profile(watched: Watched, out: Path, drawn: dict[str, int]) -> None:
    """Streams behind a progress bar, writes after every measured chunk, prints the table."""
    from rich.console import Console
    from rich.progress import Progress

    from memflow_ops.environment import environment
    from memflow_ops.files import write_atomically
    from memflow_ops.model.selection_profile import profile as selection_profile_profile
    from memflow_ops.model.selection_profile import timing
    from memflow_ops.model.selection_profile.figures import Sampling
    from memflow_ops.model.selection_profile.plot import draw_profile
    from memflow_ops.model.selection_profile.report import profile_json, profile_table
    from memflow_ops.model.stories.interrupts import Interrupts

    settings, device = watched.settings, watched.model.patch_embedding.weight.device
    with mistakes():
        sampling = Sampling(**drawn)
    about = {"command": "memflow profile-selection", **environment(device), **watched.about}
    about |= {"settings": asdict(settings), "clock": timing.clock(device)}
    measured: SelectionProfile | None = None
    interrupted = False

    def write() -> None:
        assert measured is not None
        said = profile_json(measured, about, sampling, interrupted=interrupted)
        write_atomically(out, said.encode())

    with Interrupts() as interrupts:
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("chunk", total=None)
            report: Callable[[int, int], None] = lambda done, of: bar.update(task, completed=done, total=of)  # noqa: E731
            try:
                for measured in selection_profile_profile.profile_selection(  # noqa: B007 - it grows
                    watched.model, watched.spoken, settings, block_sizes=watched.block_sizes,
                    query_groups=watched.query_groups, sampling=sampling, seed=sampling.seed, encode=watched.encode,
                    report=report, interrupts=interrupts,
                ):  # fmt: skip
                    write()
            except KeyboardInterrupt:
                interrupted = True
        if measured is None:
            fail("interrupted before the first chunk was measured; nothing was written", code=130)
        rows = measured.figures()
        write()
        title = (
            f"{watched.name}: {100 * measured.bank_mass:.0f} % of attention falls on a bank of {measured.frames} "
            f"frames of {measured.frame_tokens} tokens, sink included (solid: as the op selects, dashed: the oracle)"
        )
        write_atomically(out.with_suffix(".png"), draw_profile(rows, measured.frame_tokens, title, settings))
    typer.echo(profile_table(rows, measured.frame_tokens))
    typer.echo(said(measured, rows))
    typer.echo(f"written to {out} and {out.with_suffix('.png').name}")
    if interrupted:
        fail(f"interrupted after {len(measured.chunks)} measured chunks; they are kept", code=130)


def said(measured: SelectionProfile, rows: Sequence[Any]) -> str:
    """What to take from it, in words."""
    from memflow_ops.model.selection_profile.report import GOALS, cheapest, choices_of, describe_choice

    goal, reaches = list(GOALS.items())[-1]
    best = cheapest(rows, reaches)
    (choice,) = [c for c in choices_of(rows) if c == (best.blocks, best.block_size, best.query_group)]
    time = "" if best.ratio is None else f" and {best.ratio:.2f} times the time of the window alone"
    alone = next(row.error for row in rows if not row.top_k)
    return (
        f"{100 * measured.bank_mass:.0f} % of attention falls on the bank; without it the output is off by "
        f"{100 * alone:.0f} %. The {'quickest' if best.ratio else 'fewest keys'} for an {goal}: "
        f"{describe_choice(choice, measured.frame_tokens)}, top_k {best.top_k}, with {100 * best.captured:.0f} % of "
        f"the bank's mass in {100 * best.share:.0f} % of its keys{time}. Measured on {measured.calls} calls of "
        f"attention in {len(measured.chunks)} chunks."
    )


def _sizes(
    block_sizes: list[int] | None, query_groups: list[int] | None, defaults: tuple[Sequence[int], Sequence[int]]
) -> tuple[list[int], list[int | None]]:
    """Without repetitions; a query group of 0 is the whole chunk."""
    groups = [group or None for group in query_groups or defaults[1]]
    return list(dict.fromkeys(block_sizes or defaults[0])), list(dict.fromkeys(groups))
