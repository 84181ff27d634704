"""The commands that measure: `memflow bench` and `memflow profile-selection`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memflow_ops.cli.options import (
    BankFrames,
    Device,
    Dtype,
    FramesPerPrompt,
    Height,
    HistoryFrames,
    LoraAlpha,
    LoraFile,
    NumHeads,
    Steps,
    TextEncoder,
    TopK,
    Weights,
    Width,
    given,
    named,
    sources_of,
)
from memflow_ops.cli.progress import mistakes


def bench(
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="tiny (seconds; its times mean nothing), wan-1.3b or long (banks of 4 to 1000 frames); may be "
            "repeated. Default: the last two.",
            metavar="NAME",
        ),
    ] = None,
    case: Annotated[str, typer.Option(help="Part of a case's name, such as stream/ or float32.", metavar="NAME")] = "",
    rounds: Annotated[
        int | None, typer.Option(help="Of timing. Default: each case has its own.", min=1, metavar="N")
    ] = None,
    device: Device = "auto",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results. Default: bench/results in a checkout, else out/bench.", metavar="DIR"
        ),
    ] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Measure nothing, show what is stored.")] = False,
) -> None:
    """Measure what memory costs against no memory and every alternative; print a table and write report.html.

    Ctrl-C keeps the cases that are finished.
    """
    from memflow_ops.cli import bench as cli_bench

    cli_bench.bench(size or [], case, rounds, device, out, stored)


def profile_selection(
    story: Annotated[
        Path | None,
        typer.Argument(help="JSON lines, of which the first story is streamed. Default: held-out or shipped ones."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The .json file to write; a picture beside it.")] = Path(
        "out/selection.json"
    ),
    block_size: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens of a block; may be repeated. Default: 8, 16, 32, 64; with a checkpoint 16, 32, 64, 128.",
            metavar="N",
        ),
    ] = None,
    query_group: Annotated[
        list[int] | None,
        typer.Option(
            help="Queries that share a selection, 0: the whole chunk; may be repeated. Default: 1, 16, 0; with a "
            "checkpoint 1, 128, 0.",
            min=0,
            metavar="N",
        ),
    ] = None,
    chunks: Annotated[int, typer.Option(help="Chunks measured, drawn.", min=1, metavar="N")] = 12,
    calls: Annotated[
        int, typer.Option(help="Calls of attention (a layer in a pass) measured in each, drawn.", min=1, metavar="N")
    ] = 12,
    heads: Annotated[int, typer.Option(help="Heads measured in each call, drawn.", min=1, metavar="N")] = 3,
    queries: Annotated[int, typer.Option(help="Queries measured in each call, drawn.", min=1, metavar="N")] = 512,
    rounds: Annotated[int, typer.Option(help="How often each setting is timed; 0: not.", min=0, metavar="N")] = 9,
    seed: Annotated[int, typer.Option(help="Of the noise and of all that is drawn.", min=0, metavar="N")] = 0,
    stories: Annotated[
        int | None, typer.Option(help="Held-out stories of the toy world. Default: 2.", min=1, metavar="N")
    ] = None,
    bank_frames: BankFrames = None,
    top_k: TopK = None,
    frames_per_prompt: FramesPerPrompt = None,
    steps: Steps = None,
    device: Device = "auto",
    weights: Weights = None,
    checkpoint: Annotated[Path | None, typer.Option(help="As for generate.", metavar="PATH")] = None,
    text_encoder: TextEncoder = None,
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    dtype: Dtype = "auto",
    height: Height = None,
    width: Width = None,
    history_frames: HistoryFrames = None,
) -> None:
    """Measure what top_k, block_size and query_group keep of a model's attention, and what they cost: how to choose
    them.

    Streams a story and compares, at calls drawn at random, every setting with dense attention over the whole bank: the
    share of its mass that the chosen blocks hold, the error of the output, and the time of the op on these tensors;
    beside them frames chosen once for a chunk, as the released MemFlow does, blocks at random, and an oracle. Defaults
    that suit one model do not suit another. Ctrl-C keeps what has been measured.
    """
    from memflow_ops.cli import profile

    options = given(bank_frames=bank_frames, top_k=top_k, steps=steps, frames_per_prompt=frames_per_prompt)
    real = given(
        text_encoder=text_encoder, lora=lora, lora_alpha=lora_alpha, num_heads=num_heads, height=height, width=width,
        history_frames=history_frames,
    )  # fmt: skip
    with mistakes():
        watched: Any
        if checkpoint is None:
            if real:
                raise ValueError(f"{named(real)} need a --checkpoint; without one this is the toy world")
            if story and stories:
                raise ValueError("--stories would change nothing: the story is that of the file")
            watched = profile.toy(story, out, stories or 2, weights, device, block_size, query_group, options)
        else:
            toy = given(weights=weights, stories=stories)
            if toy:
                raise ValueError(f"{named(toy)} belong to the toy world, not to a --checkpoint")
            sources, rest = sources_of(checkpoint, dtype, real, ["text_encoder"])
            options |= {**rest, "device": device, "seed": seed}
            watched = profile.real(story, out, sources, block_size, query_group, options)
    drawn = {"chunks": chunks, "calls": calls, "heads": heads, "queries": queries, "rounds": rounds, "seed": seed}
    profile.profile(watched, out, drawn)
