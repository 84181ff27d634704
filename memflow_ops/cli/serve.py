"""`memflow serve`: a page on which the next prompt is typed while the video streams."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from memflow_ops.cli.errors import one_line_errors
from memflow_ops.cli.generate import HEIGHT, WIDTH, described
from memflow_ops.cli.options import (
    CHECKPOINT,
    MEMORY,
    MEMORY_HELP,
    VIDEO,
    BankDtypeName,
    Compile,
    CudaGraphs,
    Device,
    Dtype,
    Ema,
    Height,
    HistoryFrames,
    LoraAlpha,
    LoraFile,
    NumHeads,
    TextLen,
    ToyWeights,
    WanPositions,
    Width,
    as_settings,
    check_used,
    named,
    typed,
)
from memflow_ops.environment import pick_device
from memflow_ops.model.live.checkpoint import plan_wan, wan_world
from memflow_ops.model.live.engine import Engine
from memflow_ops.model.live.session import Limits
from memflow_ops.model.live.world import LiveWorld, toy_world
from memflow_ops.model.pipeline.budget import FreeMemory
from memflow_ops.model.pipeline.plan import StreamOptions
from memflow_ops.model.pipeline.settings import WAN_SETTINGS
from memflow_ops.model.pipeline.sources import Sources
from memflow_ops.model.streaming.settings import MemoryMode
from memflow_ops.model.toy.settings import TOY_SETTINGS

DOOR = "Who may come in"
SHORTEST_TOKEN = 16
FOR_CHECKPOINTS = (
    *("text_encoder", "vae", "lora", "lora_alpha", "num_heads", "text_len", "ema", "dtype", "text_device"),
    *("height", "width", "history_frames", "cuda_graphs", "compile"),
)
"""Options that the toy world does not use."""


def serve(
    context: typer.Context,
    host: Annotated[
        str,
        typer.Option(
            help="The address to serve at. Any but this machine's own needs a token.",
            metavar="ADDRESS",
            rich_help_panel=DOOR,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(help="The port; 0 for any that is free.", min=0, max=65535, metavar="N", rich_help_panel=DOOR),
    ] = 8765,
    token: Annotated[
        str | None,
        typer.Option(
            help=f"What a page must know, at least {SHORTEST_TOKEN} characters.",
            metavar="TEXT",
            show_default="none on this machine alone, else one is made and printed",
            rich_help_panel=DOOR,
        ),
    ] = None,
    sessions: Annotated[
        int, typer.Option(help="Sessions at a time, at most.", min=1, metavar="N", rich_help_panel=DOOR)
    ] = Limits.sessions,
    chunks: Annotated[
        int, typer.Option(help="Chunks of a session, at most.", min=1, metavar="N", rich_help_panel=DOOR)
    ] = Limits.chunks,
    keep: Annotated[
        float,
        typer.Option(
            help="Seconds for which a session is kept when its page has gone away.",
            min=0,
            metavar="X",
            rich_help_panel=DOOR,
        ),
    ] = Limits.keep_seconds,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A transformer that `memflow convert` reads or writes; --text-encoder and --vae go with it.",
            metavar="PATH",
            show_default="the toy world",
            rich_help_panel=CHECKPOINT,
        ),
    ] = None,
    text_encoder: Annotated[
        Path | None,
        typer.Option(
            help="The folder of its UMT5 text encoder and tokenizer, or of a whole pipeline.",
            metavar="PATH",
            rich_help_panel=CHECKPOINT,
        ),
    ] = None,
    vae: Annotated[
        Path | None,
        typer.Option(
            help="The folder of its AutoencoderKLWan, or of a whole pipeline.",
            metavar="PATH",
            rich_help_panel=CHECKPOINT,
        ),
    ] = None,
    lora: LoraFile = None,
    lora_alpha: LoraAlpha = None,
    num_heads: NumHeads = None,
    text_len: TextLen = None,
    ema: Ema = None,
    dtype: Dtype = "auto",
    text_device: Annotated[
        str,
        typer.Option(
            help="Where the text encoder stays: auto (with the rest), or cpu, where it takes seconds for a new prompt.",
            metavar="NAME",
            rich_help_panel=CHECKPOINT,
        ),
    ] = "auto",
    weights: ToyWeights = None,
    height: Height = HEIGHT,
    width: Width = WIDTH,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Denoising steps per chunk.",
            min=1,
            metavar="N",
            show_default=f"{WAN_SETTINGS.steps}; {TOY_SETTINGS.steps} in the toy world",
            rich_help_panel=VIDEO,
        ),
    ] = None,
    memory: Annotated[
        MemoryMode | None,
        typer.Option(
            help=MEMORY_HELP,
            metavar="KIND",
            show_default="memflow, or what the checkpoint was tuned for",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    bank_frames: Annotated[
        int | None,
        typer.Option(
            help="How many past frames are retrieved for each chunk.",
            min=0,
            metavar="N",
            show_default=f"{WAN_SETTINGS.bank_frames}; {TOY_SETTINGS.bank_frames} in the toy world",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="How many memory blocks each query group attends to.",
            min=1,
            metavar="N",
            show_default=f"{WAN_SETTINGS.top_k}; {TOY_SETTINGS.top_k} in the toy world",
            rich_help_panel=MEMORY,
        ),
    ] = None,
    bank_dtype: BankDtypeName = None,
    positions: WanPositions = None,
    history_frames: HistoryFrames = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Stream without memory too, side by side from the same noise. This doubles the work.",
            rich_help_panel=MEMORY,
        ),
    ] = True,
    device: Device = "auto",
    cuda_graphs: CudaGraphs = None,
    compile: Compile = False,
) -> None:
    """Serve a page that streams a video: type the next prompt, and see what is remembered.

    The page plays the video while it is made, with memory and without from
    the same noise. Under it are the past frames that each chunk looked back
    at, and how soon and how steadily the chunks come. The figures are also at
    /metrics.json. Without --checkpoint it is the toy world, which a laptop's
    CPU streams.

    Needs the extra [live]: pip install 'memflow-ops[live]'. Ctrl-C ends it.

    Examples:

      memflow serve
      memflow serve --host 0.0.0.0 --sessions 2
      memflow serve --checkpoint wan --text-encoder wan --vae wan
    """
    with one_line_errors():
        try:
            from memflow_ops.model.live import server
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{error.name} is not installed; the page needs it: pip install 'memflow-ops[live]'"
            ) from error
        if token is not None and len(token) < SHORTEST_TOKEN:
            raise ValueError(f"a token has at least {SHORTEST_TOKEN} characters, got {len(token)}")
        if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
            raise ValueError("a token has letters, digits and signs of ASCII, and no spaces: pages send it in a header")
        changes = as_settings(
            steps=steps, bank_frames=bank_frames, top_k=top_k, bank_dtype=bank_dtype, positions=positions
        )
        given = typed(context)
        if checkpoint is None:
            _check_world(given, FOR_CHECKPOINTS, "without --checkpoint")
            check_used(given, [memory or TOY_SETTINGS.memory])
            changes |= {} if memory is None else {"memory": memory}
            world = toy_world(pick_device(device), chunks, weights, changes)
        else:
            _check_world(given, ("weights",), "with --checkpoint")
            if text_encoder is None or vae is None:
                raise ValueError("--checkpoint needs --text-encoder and --vae; one folder may hold all three")
            world = _load_wan(
                Sources(checkpoint, text_encoder, vae, lora, lora_alpha, num_heads, dtype, text_len, ema),
                StreamOptions(history_frames=history_frames, cuda_graphs=cuda_graphs, compiled=compile),
                given=given,
                device=device,
                text_device=text_device,
                changes=changes,
                memory=memory,
                height=height,
                width=width,
                chunks=chunks,
                sessions=sessions,
                baseline=baseline,
            )
        limits = Limits(sessions=sessions, chunks=chunks, keep_seconds=keep)
        listening = _listen(host, port)
    with listening:
        if token is None and not server.is_loopback(listening.getsockname()[0]):
            token = secrets.token_urlsafe(24)
        typer.echo(f"{world.about[0].upper()}{world.about[1:]} streams at {_address(listening, token)}")
        with Engine(world, limits, baseline) as engine, suppress(KeyboardInterrupt):
            server.serve(engine, listening, token).run(sockets=[listening])
    typer.echo("stopped")


def _check_world(given: Collection[str], names: Collection[str], where: str) -> None:
    """Refuse options that belong to the other world."""
    unused = [name for name in names if name in given]
    if unused:
        raise ValueError(f"{named(unused)} would change nothing {where}")


def _load_wan(
    sources: Sources,
    options: StreamOptions,
    *,
    given: Collection[str],
    device: str,
    text_device: str,
    memory: MemoryMode | None,
    **planning: Any,
) -> LiveWorld:
    """Check everything that can be wrong, print what memory the server will take, and load a real checkpoint.

    planning: further arguments of `plan_wan`. Raises a ValueError or an OSError for what cannot work.
    """
    sources.check()
    if memory is not None:
        check_used(given, [memory])
    free = FreeMemory.now(pick_device(device))
    text_on = free.device if text_device == "auto" else pick_device(text_device)
    pretrained = sources.read()
    if memory is None:
        check_used(given, [pretrained.memory], ", which this checkpoint was tuned for")
    typer.echo(described(pretrained))
    budget = plan_wan(sources, pretrained, free, memory=memory, text_device=text_on, options=options, **planning)
    typer.echo("\n".join(budget.lines()))
    return wan_world(sources, pretrained, budget.settings, free.device, text_on, options)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the address. An OSError with a sentence where that cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(f"cannot serve at {host}, port {port}: {error.strerror or error}") from error


def _address(listening: socket.socket, token: str | None) -> str:
    """What is typed into a browser."""
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/" + (f"#token={quote(token, safe='')}" if token else "")
