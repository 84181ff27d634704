"""Commands that torchrun has started in several processes, which make one video together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated

import typer

from memflow_ops.cli.errors import fail
from memflow_ops.cli.options import SPEED
from memflow_ops.environment import pick_device
from memflow_ops.model.parallel.ranks import TIMEOUT, LostRanks, Ranks, joined, launched_ranks, rank_device
from memflow_ops.model.pipeline.budget import FreeMemory

Ulysses = Annotated[
    int | None,
    typer.Option(
        "--ulysses",
        help="Make each video with this many processes, each with a part of the tokens and of the attention heads; "
        "they are started together: torchrun --nproc-per-node N -m memflow_ops generate ...",
        min=1,
        metavar="N",
        show_default="as many as torchrun has started",
        rich_help_panel=SPEED,
    ),
]
ShardWeights = Annotated[
    bool,
    typer.Option(
        "--shard-weights",
        help="Leave each of several processes a part of the weights, and gather those of a block when it runs.",
        rich_help_panel=SPEED,
    ),
]
RankTimeout = Annotated[
    float,
    typer.Option(
        "--rank-timeout",
        help="How many seconds one of several processes waits for another one before all end.",
        min=1,
        metavar="SECONDS",
        rich_help_panel=SPEED,
    ),
]


def join_ranks(context: typer.Context, asked: int | None, device: str, timeout: float = TIMEOUT) -> Ranks | None:
    """The processes that torchrun has started, until the command ends; None where there is one.

    asked: how many the user wants (None: as many as there are); a ValueError says how to start them. Only the first
    process prints to stdout from here on.
    """
    launched = launched_ranks()
    if asked not in (None, launched):
        start = f"torchrun --nproc-per-node {asked} -m memflow_ops generate ..."
        there = "this is one" if launched == 1 else f"torchrun has started {launched}"
        raise ValueError(f"--ulysses {asked} needs {asked} processes, and {there}: start them with {start}")
    if launched == 1:
        return None
    ranks = context.with_resource(joined(rank_device(pick_device(device)), timeout))
    if ranks.rank:
        context.with_resource(_silent())
    return ranks


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing goes to stdout."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def shared_memory(ranks: Ranks) -> FreeMemory:
    """What every process may plan with: the least that one of them has, where those of one machine divide its host
    memory."""
    free = FreeMemory.now(ranks.device).shared_by(int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)))
    host = None if free.host_bytes is None else ranks.least(free.host_bytes)
    return FreeMemory(free.device, ranks.least(free.bytes), host)


@contextmanager
def agreed_errors(ranks: Ranks) -> Iterator[None]:
    """As `one_line_errors`, for all processes: where the code inside fails in one of them, the first such process
    prints its line, and all end. There must be no collective inside."""
    words, leaving = "", None
    try:
        yield
    except typer.Exit as end:  # there is nothing to do
        leaving = end
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        words = str(error) or type(error).__name__
    said = ranks.tell(words)
    failed = [rank for rank, other in enumerate(said) if other]
    if failed and failed[0] == ranks.rank:
        fail(words if ranks.rank == 0 else f"process {ranks.rank} of {ranks.count}: {words}", code=2)
    if failed:
        raise typer.Exit(2)
    if leaving is not None:
        raise leaving


@contextmanager
def ended_together(ranks: Ranks) -> Iterator[None]:
    """Ends the command with one line where another process has died or does not answer. Of an interruption the first
    process alone speaks."""
    try:
        yield
    except KeyboardInterrupt:
        if ranks.rank:
            raise typer.Exit(130) from None
        raise
    except LostRanks as error:
        fail(f"process {ranks.rank} of {ranks.count}: {error}", code=1)
