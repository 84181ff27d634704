"""`memflow generate`: videos from a real checkpoint; and `load_stories`, which `verify` and the profile use too."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from memflow_ops.cli.errors import one_line_errors
from memflow_ops.cli.options import (
    MEMORY,
    MEMORY_HELP,
    SPEED,
    BankDtypeName,
    BankScheduleName,
    BlockScore,
    Checkpoint,
    Compile,
    CudaGraphs,
    Device,
    DeviceFrames,
    Dtype,
    Ema,
    FramesPerPrompt,
    Height,
    HistoryDir,
    HistoryFrames,
    HostFrames,
    LoraAlpha,
    LoraFile,
    NumHeads,
    Out,
    QueryGroup,
    Recache,
    Reselect,
    Resume,
    Seed,
    SnapshotEvery,
    Steps,
    Story,
    TextEncoder,
    TextLen,
    TokenOrder,
    TopK,
    Vae,
    WanBankFrames,
    WanPositions,
    Width,
    as_history,
    as_settings,
    check_used,
    typed,
)
from memflow_ops.cli.progress import run_stories
from memflow_ops.cli.ranks import (
    RankTimeout,
    ShardWeights,
    Ulysses,
    agreed_errors,
    ended_together,
    join_ranks,
    shared_memory,
)
from memflow_ops.cli.ray_stories import CpusPerStory, RayAddress, make_stories
from memflow_ops.environment import pick_device
from memflow_ops.files import locked_folders
from memflow_ops.model.checkpoints.containers import EMA
from memflow_ops.model.checkpoints.pretrained import Pretrained
from memflow_ops.model.parallel.ranks import TIMEOUT, Ranks
from memflow_ops.model.pipeline import generate as pipeline
from memflow_ops.model.pipeline.budget import FreeMemory
from memflow_ops.model.pipeline.plan import (
    StreamOptions,
    WanPlan,
    group_stories,
    open_snapshots,
    plan_streams,
    story_folders,
)
from memflow_ops.model.pipeline.settings import FRAMES_PER_PROMPT, WAN_SETTINGS, wan_settings
from memflow_ops.model.pipeline.sources import Parts, Sources, latent_size, load_parts
from memflow_ops.model.stories.prompts import chunk_prompts, read_stories
from memflow_ops.model.stories.run import make_folders
from memflow_ops.model.streaming.settings import USED_BY, MemoryMode

HEIGHT, WIDTH = 480, 832
"""The video's size in pixels by default: what Wan 2.1 1.3B is trained at."""


def generate(
    context: typer.Context,
    story: Story,
    checkpoint: Checkpoint,
    text_encoder: TextEncoder,
    vae: Vae,
    out: Out,
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    text_len: TextLen = None,
    ema: Ema = None,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    frames_per_prompt: FramesPerPrompt = FRAMES_PER_PROMPT,
    steps: Steps = WAN_SETTINGS.steps,
    height: Height = HEIGHT,
    width: Width = WIDTH,
    memory: Annotated[
        MemoryMode | None,
        typer.Option(
            help=MEMORY_HELP,
            metavar="KIND",
            show_default="what the checkpoint was tuned for",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    bank_frames: WanBankFrames = None,
    top_k: TopK = WAN_SETTINGS.top_k,
    query_group: QueryGroup = WAN_SETTINGS.query_group or 0,
    score: BlockScore = WAN_SETTINGS.score,
    bank_dtype: BankDtypeName = None,
    reselect: Reselect = WAN_SETTINGS.reselect,
    token_order: TokenOrder = WAN_SETTINGS.token_order,
    positions: WanPositions = None,
    bank_schedule: BankScheduleName = None,
    history_frames: HistoryFrames = None,
    recache: Recache = WAN_SETTINGS.recache,
    history_dir: HistoryDir = None,
    device_frames: DeviceFrames = None,
    host_frames: HostFrames = None,
    snapshot_every: SnapshotEvery = None,
    resume: Resume = False,
    device: Device = "auto",
    batch: Annotated[
        int,
        typer.Option(
            help="Stream up to this many stories together, if they have equally many prompts. Each comes out as if "
            "it were alone, except for rounding.",
            min=1,
            metavar="N",
            rich_help_panel=SPEED,
        ),
    ] = 1,
    cuda_graphs: CudaGraphs = None,
    compile: Compile = False,
    ulysses: Ulysses = None,
    shard_weights: ShardWeights = False,
    rank_timeout: RankTimeout = TIMEOUT,
    ray: RayAddress = None,
    cpus_per_story: CpusPerStory = 1,
) -> None:
    """Generate a video of every story in a file, with a checkpoint of the Wan 2.1 family.

    Writes video.mp4 and run.json (settings, times, what was retrieved). One
    story goes straight into DIR; several go into DIR/story-000,
    DIR/story-001, ... with the seeds SEED, SEED + 1, ...

    Before it starts, the command prints how much memory the stream will
    take, and refuses a stream that does not fit. The video grows as
    video.part.mp4; files of an earlier run are replaced when the new ones
    are complete. Ctrl-C keeps what has been generated, and with
    --history-dir the same command goes on from there with --resume, also
    after a kill or a reboot.

    Example, with a whole diffusers pipeline in the folder wan/:

      memflow generate story.jsonl --checkpoint wan --text-encoder wan \\
          --vae wan --out out/story
    """
    settings = as_settings(
        bank_frames=bank_frames,
        top_k=top_k,
        query_group=query_group,
        score=score,
        bank_dtype=bank_dtype,
        reselect=reselect,
        token_order=token_order,
        positions=positions,
        steps=steps,
        recache=recache,
        height=height,
        width=width,
    )
    with one_line_errors():
        ranks = join_ranks(context, ulysses, device, rank_timeout)
        if shard_weights and ranks is None:
            raise ValueError("--shard-weights deals the weights out to several processes, and there is one")
        if ray is not None and (ranks is not None or history_dir is None):
            raise ValueError(
                "--ray is for a command that torchrun has not started, and needs --history-dir, where stories go on"
            )
    count = 1 if ranks is None else ranks.count
    free = None if ranks is None else shared_memory(ranks)
    with one_line_errors() if ranks is None else agreed_errors(ranks):
        if shard_weights and compile:
            raise ValueError("--compile has not been tried with --shard-weights: leave one of them out")
        if ranks is not None and (device_frames is not None or host_frames is not None):
            raise ValueError(
                "--device-frames and --host-frames are for one process: several keep the past in memory and snapshots"
            )
        sources = Sources(checkpoint, text_encoder, vae, lora, lora_alpha, num_heads, dtype, text_len, ema)
        stories, memories, given = read_stories(story, any_prompt), () if memory is None else (memory,), typed(context)
        options = StreamOptions(
            seed,
            frames_per_prompt,
            history_frames,
            cuda_graphs,
            compile,
            batch,
            bank_schedule,
            count,
            shard_weights,
            as_history(
                None if history_dir is None else history_dir.absolute(),
                out,
                device_frames=device_frames,
                host_frames=host_frames,
                every=snapshot_every,
                resume=resume or ray is not None,
            ),
        )
        if ray is not None:
            work = RayWork(stories, out.absolute(), sources.absolute(), settings, options, memories, given, device)
            names, chunks = work.open_folders(context)
        else:
            parts, streams = load_stories(
                *(stories, out, sources, settings, options),
                memories=memories,
                given=given,
                device=device,
                context=context,
                free=free,
                ranks=ranks,
            )
    if ray is not None:
        make_stories(work, names, chunks, ray, cpus_per_story, gpu=device != "cpu")
        return
    if ranks is not None and ranks.rank:
        with ended_together(ranks):
            for plans in streams:
                pipeline.follow_stories(parts, plans, ranks)
        return

    def stream(plans: Sequence[WanPlan], report: Callable[[pipeline.WanRun], None]) -> list[pipeline.WanRun]:
        return pipeline.generate_stories(parts, plans, sources, report, ranks)

    with nullcontext() if ranks is None else ended_together(ranks):
        _report(run_stories(streams, stream, _speed_so_far, _written))


@dataclass(frozen=True)
class RayWork:
    """The stories of a command that actors of Ray make; see `ray_stories.Work`."""

    stories: Sequence[Sequence[str]]
    out: Path
    sources: Sources
    settings: Mapping[str, Any]
    options: StreamOptions
    memories: Sequence[str]
    given: Collection[str]
    device: str

    def open_folders(self, context: typer.Context) -> tuple[list[str], list[int]]:
        """Make the folders, and keep them for this command until it ends. Gives the names of the streams, and how many
        chunks each has, in the order of the plans."""
        places = story_folders(self.stories, self.out)
        groups = group_stories(self.stories, self.options.batch)
        make_folders(places, ("video.mp4", "run.json"))
        context.with_resource(locked_folders([self.out, *places]))
        size = WAN_SETTINGS.chunk_frames
        chunks = [len(chunk_prompts([self.stories[of[0]]], self.options.frames_per_prompt, size)) for of in groups]
        return [" and ".join(str(places[number]) for number in of) for of in groups], chunks

    def load(self, sharing: int) -> tuple[list[str], Parts, list[list[WanPlan]]]:
        """Plan all streams with an actor's part of the memory of its machine, and load the parts."""
        how = self.memories, self.given, self.device, FreeMemory.now(pick_device(self.device)).shared_by(sharing)
        free, pretrained, streams = plan_stories(
            self.stories, self.out, self.sources, self.settings, self.options, *how
        )
        shared = f"Up to {sharing} actors of this machine divide its memory; of one of them:"
        words = [described(pretrained), *([shared] if sharing > 1 else []), *_largest(streams).budget.lines()]
        prompts = [prompt for story in self.stories for prompt in story]
        return words, load_parts(self.sources, pretrained, prompts, free.device, self.options.compiled), streams

    def described(self, run: pipeline.WanRun) -> str:
        """The files of a story, in words."""
        return _written(run)


def _largest(streams: Sequence[Sequence[WanPlan]]) -> WanPlan:
    """A plan of the stream that takes most memory."""
    plans = [plan for stream in streams for plan in stream]
    return max(plans, key=lambda plan: plan.budget.device_bytes + plan.budget.host_bytes)


def _report(finished: Iterable[Sequence[pipeline.WanRun]]) -> None:
    """Say of every stream what it has left and how fast it was."""
    for runs in finished:
        for run in runs:
            typer.echo(_written(run))
        typer.echo(_speed(runs[0]))


def load_stories(
    stories: Sequence[Sequence[str]],
    out: Path,
    sources: Sources,
    settings: Mapping[str, Any],
    options: StreamOptions,
    *,
    memories: Sequence[str] = (),
    given: Collection[str] = (),
    device: str = "auto",
    names: Sequence[str] = ("video.mp4", "run.json"),
    context: typer.Context | None = None,
    free: FreeMemory | None = None,
    ranks: Ranks | None = None,
) -> tuple[Parts, list[list[WanPlan]]]:
    """Check everything that can be wrong, print what memory the streams will take, and load all parts of the pipeline.

    stories: the prompts of each. out: the folder that the files go to; it is created. settings: what the user asks for,
    as fields of `StreamSettings`, but height and width in pixels. memories: the kinds of memory, each of which streams
    every story; none of them means the kind that the checkpoint was tuned for. given: the names of the options that the
    user typed. names: the files that will be written for each story.
    context: the command, which keeps the folders for itself until it ends; None: they are not locked. free: the memory
    to plan with; None: what the device has. ranks: the processes that share the videos, the first of which writes.

    Gives the parts and the plans of every stream. Raises a ValueError or an OSError for what cannot work; a stream that
    does not fit into memory is refused before anything is on the device.
    """
    free, pretrained, streams = plan_stories(stories, out, sources, settings, options, memories, given, device, free)
    typer.echo(described(pretrained))
    plans = [plan for stream in streams for plan in stream]
    if ranks is not None:
        heads = ranks.heads(pretrained.config.num_heads)
        typer.echo(
            f"{ranks.count} processes make each video, each with {heads.own} of {heads.whole} heads; of one of them:"
        )
    typer.echo("\n".join(_largest(streams).budget.lines()))
    if options.batch > 1 and len(plans) > 1:
        several = "stream" if len(streams) == 1 else "streams"
        typer.echo(f"{len(plans)} stories in {len(streams)} {several}: those with equally many prompts run together")
    writes = ranks is None or ranks.rank == 0
    if writes:
        make_folders([plan.folder for plan in plans], names)
    if writes and context is not None:
        context.with_resource(locked_folders([out, *(plan.folder for plan in plans)]))
    for number, stream in enumerate(streams if writes else ()):
        streams[number] = open_snapshots(stream, sources, free.device)
        snapshots = streams[number][0].snapshots
        if snapshots is not None and context is not None:
            context.call_on_close(snapshots.close)
    streams = _unfinished(streams)
    prompts = [prompt for story in stories for prompt in story]
    return load_parts(
        sources, pretrained, prompts, free.device, options.compiled, ranks, options.shard_weights
    ), streams


def plan_stories(
    stories: Sequence[Sequence[str]],
    out: Path,
    sources: Sources,
    settings: Mapping[str, Any],
    options: StreamOptions,
    memories: Sequence[str] = (),
    given: Collection[str] = (),
    device: str = "auto",
    free: FreeMemory | None = None,
) -> tuple[FreeMemory, Pretrained, list[list[WanPlan]]]:
    """Read the weights into host memory and plan all streams; arguments and errors as for `load_stories`.

    Gives the memory that was planned with, the weights, and the plans of every stream.
    """
    sources.check()
    latent_height, latent_width = latent_size(sources.vae, settings["height"], settings["width"])
    settings = {**settings, "height": latent_height, "width": latent_width}
    for memory in memories:
        wan_settings(memory, **settings)  # refuses impossible settings before the weights are read
    if memories:
        check_used(given, memories)
    free = free or FreeMemory.now(pick_device(device))
    pretrained = sources.read()
    if not memories:
        check_used(given, [pretrained.memory], ", which this checkpoint was tuned for")
    streams = []
    for kind in dict.fromkeys(memories or (pretrained.memory,)):
        tuned = {"positions": pretrained.positions} if kind in USED_BY["positions"] else {}
        of_kind = wan_settings(kind, **{**tuned, **settings})
        streams += plan_streams(stories, out, of_kind, sources, pretrained, free, options)
    return free, pretrained, streams


def _unfinished(streams: Sequence[list[WanPlan]]) -> list[list[WanPlan]]:
    """The streams that are not complete. Says where each goes on, and ends the command where nothing is left to do."""
    left = []
    for stream in streams:
        snapshots, history = stream[0].snapshots, stream[0].options.history
        if snapshots is not None:
            for words in snapshots.said():
                typer.echo(words)
        finished = snapshots.finished if snapshots else history is not None and history.is_finished(stream[0].below)
        if not finished:
            left.append(stream)
    if not left:
        raise typer.Exit(0)
    return left


def any_prompt(prompt: str) -> None:
    """Accept every prompt for a real text encoder, except an empty one: that is a ValueError."""
    if not prompt.strip():
        raise ValueError("a prompt is empty")


def described(pretrained: Pretrained) -> str:
    """A checkpoint in words."""
    config = pretrained.config
    origin = f"{pretrained.layout} layout" + (f", its {pretrained.part}" if pretrained.part else "")
    if pretrained.other_part:
        option = "--ema" if pretrained.other_part == EMA else "--no-ema"
        origin += f" and not its {pretrained.other_part}, which {option} takes"
    words = (
        f"{pretrained.parameters:,} parameters in {str(pretrained.dtype).removeprefix('torch.')} ({origin}): "
        f"{config.num_layers} layers, width {config.dim}, {config.num_heads} heads, feed-forward {config.ffn_dim}, "
        f"text {config.text_len} x {config.text_dim}; streams with --memory {pretrained.memory} by default"
    )
    if pretrained.positions != "absolute":
        words += f", and memflow with --positions {pretrained.positions}"
    return words + (f"\nLoRA merged: {pretrained.lora}" if pretrained.lora else "")


def _written(run: pipeline.WanRun) -> str:
    """The files that a run has left, in words."""
    return (
        f"Files in {run.plan.folder}:\n"
        f"  video.mp4     the video, {run.frames} frames\n"
        f"  run.json      settings, versions, times, and what was retrieved"
    )


def _speed_so_far(run: pipeline.WanRun) -> str:
    """The speed that the progress bar shows, the VAE's time included."""
    seconds = sum(chunk.seconds for chunk in run.chunks) + sum(run.decode_seconds)
    return f"{run.frames * run.plan.together / seconds:.1f} frames/s"


def _speed(run: pipeline.WanRun) -> str:
    """The speed of a whole run in words."""
    measured: dict[str, Any] | None = run.speed()
    if measured is None:
        return "It was too short to tell its speed."
    of_stories = f" of {run.plan.together} stories" if run.plan.together > 1 else ""
    return (
        f"A chunk{of_stories} took {measured['seconds_per_chunk']:.2f} s, {measured['frames_per_second']:.1f} frames/s "
        f"(the transformer alone; with the VAE {measured['frames_per_second_decoded']:.1f}), median of "
        f"{measured['chunks']} chunks."
    )
