"""`memflow convert` and `memflow verify`: bring a real checkpoint in, and see that it streams as it should."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console
from rich.progress import Progress

from memflow_ops.cache.layout import Positions
from memflow_ops.cli.errors import fail, one_line_errors
from memflow_ops.cli.generate import HEIGHT, WIDTH, any_prompt, described, load_stories
from memflow_ops.cli.options import (
    MEMORY,
    BankScheduleName,
    BlockScore,
    Checkpoint,
    Compile,
    CudaGraphs,
    Device,
    Dtype,
    Ema,
    FramesPerPrompt,
    Height,
    HistoryFrames,
    LoraAlpha,
    LoraFile,
    NumHeads,
    Out,
    QueryGroup,
    Recache,
    Reselect,
    Seed,
    Steps,
    TextEncoder,
    TextLen,
    TokenOrder,
    TopK,
    Vae,
    WanBankFrames,
    WanPositions,
    Width,
    as_settings,
    typed,
)
from memflow_ops.files import check_target
from memflow_ops.model.checkpoints import export, pretrained
from memflow_ops.model.checkpoints.layouts import TEXT_LEN
from memflow_ops.model.pipeline import verify as pipeline
from memflow_ops.model.pipeline.budget import size
from memflow_ops.model.pipeline.plan import StreamOptions, WanPlan
from memflow_ops.model.pipeline.settings import FRAMES_PER_PROMPT, WAN_SETTINGS
from memflow_ops.model.pipeline.sources import Parts, Sources
from memflow_ops.model.stories.prompts import read_stories
from memflow_ops.model.streaming.settings import MemoryMode


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Wan 2.1's own file or folder, a .pt of Self-Forcing, LongLive or MemFlow, or a diffusers folder.",
            metavar="CHECKPOINT",
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="The .safetensors file to write, or for diffusers the folder.", metavar="OUT")
    ],
    to: Annotated[
        Literal["memflow", "diffusers"],
        typer.Option(
            help="memflow: one file with its config inside. diffusers: a folder that WanTransformer3DModel loads.",
            metavar="KIND",
        ),
    ] = "memflow",
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    text_len: TextLen = None,
    ema: Ema = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            help="The dtype of the weights in the new file: float32, bfloat16 or float16.",
            metavar="NAME",
            show_default="as they are",
        ),
    ] = None,
    memory: Annotated[
        MemoryMode | None,
        typer.Option(
            help="The kind of memory that the weights were tuned for, which `memflow generate` then uses by default. "
            "MemFlow's own weights were tuned for released.",
            metavar="KIND",
            show_default="released where the file or its folder is named MemFlow, else memflow",
        ),
    ] = None,
    positions: Annotated[
        Positions | None,
        typer.Option(
            help="The positions that the weights were tuned for, absolute or bounded, which `memflow generate --memory "
            "memflow` then uses by default.",
            metavar="NAME",
            show_default="what the checkpoint states, else absolute",
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of the Wan 2.1 family into one safetensors file with its config inside.

    The other commands take the original as well. Converting merges a LoRA
    once and for all, and makes loading quicker. No code in the file is run.
    Every weight that is missing, unexpected or of the wrong shape is named.

    With --to diffusers, OUT is a folder that
    WanTransformer3DModel.from_pretrained loads.

    Examples:

      memflow convert longlive_base.pt longlive.safetensors --lora lora.pt
      memflow convert Wan2.1-T2V-1.3B wan.safetensors --dtype bfloat16
      memflow convert self_forcing_dmd.pt transformer --to diffusers
    """
    for_diffusers = to == "diffusers"
    with one_line_errors():
        # Before the weights are read, which takes long.
        if for_diffusers:
            export.check_diffusers_folder(out)
        else:
            check_target(out, ".safetensors")
        weights = pretrained.read_pretrained(
            checkpoint,
            lora=lora,
            lora_alpha=lora_alpha,
            num_heads=num_heads,
            text_len=text_len,
            memory=memory,
            positions=positions,
            ema=ema,
        )
        typer.echo(described(weights))
        write = export.write_diffusers if for_diffusers else pretrained.convert
        write(weights, out, None if dtype is None else pretrained.DTYPES[dtype])
    written = out / export.WEIGHTS if for_diffusers else out
    typer.echo(f"Written: {written}, {size(written.stat().st_size)}")
    if for_diffusers and weights.config.text_len != TEXT_LEN:
        typer.echo(f"In diffusers, call the pipeline with max_sequence_length={weights.config.text_len}.")


def verify(
    context: typer.Context,
    checkpoint: Checkpoint,
    text_encoder: TextEncoder,
    vae: Vae,
    story: Annotated[
        Path | None,
        typer.Argument(
            help="A file of stories as for `memflow generate`; its first story is streamed.",
            metavar="STORY",
            show_default="a story that comes with the package",
        ),
    ] = None,
    out: Out = Path("out/verify"),
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
        list[str] | None,
        typer.Option(
            help="A kind of memory to stream with. May be repeated; the others are compared with the first.",
            metavar="KIND",
            autocompletion=lambda: list(get_args(MemoryMode)),
            show_default="all but full",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    bank_frames: WanBankFrames = None,
    top_k: TopK = WAN_SETTINGS.top_k,
    query_group: QueryGroup = WAN_SETTINGS.query_group or 0,
    score: BlockScore = WAN_SETTINGS.score,
    reselect: Reselect = WAN_SETTINGS.reselect,
    token_order: TokenOrder = WAN_SETTINGS.token_order,
    positions: WanPositions = None,
    bank_schedule: BankScheduleName = None,
    history_frames: HistoryFrames = None,
    recache: Recache = WAN_SETTINGS.recache,
    device: Device = "auto",
    cuda_graphs: CudaGraphs = None,
    compile: Compile = False,
) -> None:
    """Stream one story with every kind of memory, and compare speed, memory, latents and frames.

    All kinds get the same prompts and the same noise. Writes a video for
    each, frames.png (their frames side by side) and report.json (all in
    numbers). The exit code is 1 where latents are not finite, or where kinds
    differ although there is nothing to remember yet.

    Example, with a whole diffusers pipeline in the folder wan/:

      memflow verify --checkpoint wan --text-encoder wan --vae wan
    """
    kinds = list(dict.fromkeys(memory or pipeline.MEMORIES))
    settings = as_settings(
        bank_frames=bank_frames,
        top_k=top_k,
        query_group=query_group,
        score=score,
        reselect=reselect,
        token_order=token_order,
        positions=positions,
        steps=steps,
        recache=recache,
        height=height,
        width=width,
    )
    with one_line_errors():
        sources = Sources(checkpoint, text_encoder, vae, lora, lora_alpha, num_heads, dtype, text_len, ema)
        parts, streams = load_stories(
            read_stories(story or pipeline.STORY, any_prompt)[:1],
            out,
            sources,
            settings,
            StreamOptions(seed, frames_per_prompt, history_frames, cuda_graphs, compile, bank_schedule=bank_schedule),
            memories=kinds,
            given=typed(context),
            device=device,
            context=context,
            names=("frames.png", "report.json", *(f"{kind}.mp4" for kind in kinds)),
        )
    streamed: list[pipeline.VerifiedStream] = []
    ended: BaseException | None = None
    try:
        for stream in _stream_kinds(parts, [plan for (plan,) in streams]):
            streamed.append(stream)
    except (KeyboardInterrupt, OSError) as error:
        ended = error
    problems: list[str] = []
    if streamed:  # what was complete before an end is reported too
        with one_line_errors(code=1):
            report: dict[str, Any] = pipeline.write_report(streamed, sources, parts.device, out)
        typer.echo(_compared(report, out))
        problems = report["problems"]
    if isinstance(ended, KeyboardInterrupt):
        fail(f"interrupted after {len(streamed)} of {len(kinds)} kinds of memory; they are kept", code=130)
    if ended or problems:
        fail("; ".join([*([str(ended)] if ended else []), *problems]), code=1)


def _stream_kinds(parts: Parts, plans: Sequence[WanPlan]) -> Iterator[pipeline.VerifiedStream]:
    """Stream every plan behind progress bars. Yield each kind of memory when its video is written."""
    with Progress(console=Console(stderr=True)) as bar:
        tasks = {str(plan.settings.memory): bar.add_task(plan.settings.memory, total=None) for plan in plans}

        def report(kind: str, done: int, total: int) -> None:
            bar.update(tasks[kind], completed=done, total=total)

        yield from pipeline.verify(parts, plans, report)


def _compared(report: Mapping[str, Any], folder: Path) -> str:
    """What `memflow verify` found, as a table, and the files that it has written. report: as in report.json."""
    first = report["kinds"][0]["memory"]
    rows = [
        ("memory", "s/chunk", "frames/s", "with VAE", "cache", "peak", f"differs from {first}", "in the last chunk")
    ]
    for kind in report["kinds"]:
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
            report["how"],
            f"Files in {folder}:",
            "  frames.png    frames of every kind of memory, side by side",
            "  report.json   all of this in numbers",
            *(f"  {kind['memory'] + '.mp4':<13} its video" for kind in report["kinds"]),
        ]
    )
