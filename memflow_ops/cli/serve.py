"""`memflow serve`: a page on which the next prompt is typed while the video streams."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from typing import Annotated

import typer

from memflow_ops.cli.errors import one_line_errors
from memflow_ops.cli.options import (
    MEMORY,
    BankFrames,
    Device,
    Steps,
    TopK,
    ToyWeights,
    as_settings,
)
from memflow_ops.environment import pick_device
from memflow_ops.model.live.engine import Engine
from memflow_ops.model.live.session import Limits
from memflow_ops.model.live.world import toy_world
from memflow_ops.model.toy.settings import TOY_SETTINGS

DOOR = "Who may come in"
SHORTEST_TOKEN = 16


def serve(
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
    weights: ToyWeights = None,
    steps: Steps = TOY_SETTINGS.steps,
    bank_frames: BankFrames = TOY_SETTINGS.bank_frames,
    top_k: TopK = TOY_SETTINGS.top_k,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Stream without memory too, side by side from the same noise. This doubles the work.",
            rich_help_panel=MEMORY,
        ),
    ] = True,
    device: Device = "auto",
) -> None:
    """Serve a page that streams a video: type the next prompt, and see what is remembered.

    The page plays the video while it is made, with memory and without from
    the same noise. Under it are the past frames that each chunk looked back
    at, and how soon and how steadily the chunks come. The figures are also at
    /metrics.json. Without options it is the toy world, on a CPU.

    Needs the extra [live]: pip install 'memflow-ops[live]'. Ctrl-C ends it.

    Examples:

      memflow serve
      memflow serve --host 0.0.0.0 --sessions 2
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
        changes = as_settings(steps=steps, bank_frames=bank_frames, top_k=top_k)
        world = toy_world(pick_device(device), chunks, weights, changes)
        limits = Limits(sessions=sessions, chunks=chunks, keep_seconds=keep)
        listening = _listen(host, port)
    with listening:
        if token is None and not server.is_loopback(listening.getsockname()[0]):
            token = secrets.token_urlsafe(24)
        typer.echo(f"{world.about[0].upper()}{world.about[1:]} streams at {_address(listening, token)}")
        with Engine(world, limits, baseline) as engine, suppress(KeyboardInterrupt):
            server.serve(engine, listening, token).run(sockets=[listening])
    typer.echo("stopped")


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
    return f"http://{host}:{port}/" + (f"#token={token}" if token else "")
