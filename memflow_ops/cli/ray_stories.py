"""`memflow generate --ray`: streams of stories wait in a queue, and actors of a Ray cluster make them.

An actor loads the parts of the pipeline once and makes one stream after another, with the names, seeds and files of a
serial run. Every stream has a folder of snapshots. When an actor dies, another one takes its place, and its stream goes
on from the last snapshot; what is complete is not made again. So after Ctrl-C, or when the driver is killed, the same
command goes on.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Protocol

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from memflow_ops.cli.errors import fail
from memflow_ops.cli.options import SPEED
from memflow_ops.files import InUse
from memflow_ops.model.pipeline import generate as pipeline
from memflow_ops.model.pipeline.plan import WanPlan, open_snapshots
from memflow_ops.model.pipeline.sources import Parts, Sources

RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        help="Make the stories with actors of this Ray cluster: its address, auto (the one that this machine belongs "
        "to) or local (one that is started here). Needs --history-dir, and always goes on with what is there.",
        metavar="ADDRESS",
        rich_help_panel=SPEED,
    ),
]
CpusPerStory = Annotated[
    float,
    typer.Option(
        "--cpus-per-story",
        help="How many CPUs an actor of --ray takes; where the cluster has GPUs, and unless --device is cpu, it takes "
        "one of them too.",
        min=0.1,
        metavar="X",
        rich_help_panel=SPEED,
    ),
]
ATTEMPTS = 3
"""How often a stream is given to an actor before it is reported as failed, if the actors die of it."""
STOPPING_SECONDS = 120.0
"""How long Ctrl-C waits for the chunks that are being made."""
IN_USE_SECONDS = 60.0
"""How long an actor waits for a stream that another process has open."""
POLL_SECONDS = 0.5


class Work(Protocol):
    """What an actor is to do, as the driver sends it."""

    @property
    def sources(self) -> Sources: ...

    def load(self, sharing: int) -> tuple[list[str], Parts, list[list[WanPlan]]]:
        """Plans all streams on the actor's machine, whose memory so many actors divide, and loads the parts. The first
        are words for the user. A ValueError, TypeError or OSError for what cannot be."""

    def described(self, run: pipeline.WanRun) -> str:
        """The files of a story that is made, in words."""


class Made(NamedTuple):
    """What an actor says of a stream that it has ended."""

    words: list[str]
    """Per story, for the user."""
    error: str | None
    refused: bool = False
    """Whether the actor can make no stream at all, where its machine lacks a file for one."""


class Crew(NamedTuple):
    """The actors of a command."""

    cpus: float
    """That an actor takes."""
    gpus: int
    """That an actor takes, 0 or 1."""
    most: int
    """Actors at a time."""

    def room(self, resources: Mapping[str, float]) -> int:
        """How many actors so many CPUs and GPUs are enough for."""
        cpus = int(resources.get("CPU", 0) / self.cpus + 1e-6)  # 1 / 0.1 are ten, although 1 // 0.1 is nine
        return min(self.most, cpus, int(resources.get("GPU", 0) / self.gpus) if self.gpus else cpus)

    def on_cluster(self, nodes: Iterable[Mapping[str, Any]]) -> int:
        """How many actors these nodes, as `ray.nodes` tells them, have room for at a time."""
        return min(self.most, sum(self.room(node["Resources"]) for node in nodes if node["Alive"]))

    def beside(self, nodes: Iterable[Mapping[str, Any]], node_id: str) -> int:
        """How many actors may come to be on the machine of a node at a time, one there included. Nodes of one address
        are one machine.

        It is what there is room for and not what is there, because an actor takes its share of the memory when it
        begins, and others may come later, also in place of those that have died.
        """
        alive = [node for node in nodes if node["Alive"]]
        address = next((node["NodeManagerAddress"] for node in alive if node["NodeID"] == node_id), None)
        return max(1, self.on_cluster(node for node in alive if node["NodeManagerAddress"] == address))


class Worker:
    """The part of an actor: makes streams, and answers beside that how far it is."""

    def __init__(self, work: Work, crew: Crew):
        import ray

        self.work, self._stop, self._done = work, threading.Event(), 0
        self.words: list[str] = []
        self.refusal = ""
        try:
            sharing = crew.beside(ray.nodes(), ray.get_runtime_context().get_node_id())
            self.words, self.parts, self.streams = work.load(sharing)
        except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
            self.refusal = str(error) or type(error).__name__

    def about(self) -> tuple[list[str], str]:
        """What there is to say of the streams, and why they cannot be made; "" where they can."""
        return self.words, self.refusal

    def make(self, number: int) -> Made:
        """Makes the stream of this number, or goes on with it. What fails is told, and costs no other stream."""
        self._done = 0

        def report(run: pipeline.WanRun) -> None:
            self._done = len(run.chunks)
            if self._stop.is_set():
                raise KeyboardInterrupt

        if self.refusal:
            return Made([], self.refusal, refused=True)
        try:
            plans = self._open(number)
            snapshots = plans[0].snapshots
            if snapshots is not None and snapshots.finished:
                snapshots.close()
                return Made(snapshots.said(), None)
            runs = pipeline.generate_stories(self.parts, plans, self.work.sources, report)
        except Exception as error:
            return Made([], f"{type(error).__name__}: {error}")
        return Made([self.work.described(run) for run in runs], None)

    def _open(self, number: int) -> list[WanPlan]:
        """The plans of a stream with its snapshots. An actor of a command that was killed, or that has only been lost
        sight of, may have them for a while yet."""
        deadline = time.monotonic() + IN_USE_SECONDS
        while True:
            try:
                return open_snapshots(self.streams[number], self.work.sources, self.parts.device)
            except InUse:
                if self._stop.wait(POLL_SECONDS) or time.monotonic() > deadline:
                    raise

    def chunks(self) -> int:
        """How many chunks the current stream has."""
        return self._done

    def stop(self) -> None:
        """Ends the current stream after its chunk, and takes a snapshot."""
        self._stop.set()


def make_stories(work: Work, names: Sequence[str], chunks: Sequence[int], address: str, cpus: float, gpu: bool) -> None:
    """Makes all streams, and prints each when it is complete. Ends the command with exit code 1 where one has failed,
    and 130 after Ctrl-C.

    names, chunks: of every stream. address: see `RayAddress`. cpus: that an actor takes. gpu: whether it takes a GPU
    too, where the cluster has any. There are as many actors as streams, or as the cluster has room for.
    """
    try:
        import ray
    except ModuleNotFoundError:
        fail("--ray needs the package ray: pip install 'memflow-ops[ray]'", code=2)
    place = {} if address == "local" else {"address": address}
    try:
        ray.init(**place, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises bare ones too, for a node that does not come up in time for one
        fail(f"no Ray cluster at {address}: {_brief(error)}", code=2)
    try:
        nodes = ray.nodes()
        crew = Crew(cpus, 1 if gpu and ray.cluster_resources().get("GPU", 0) else 0, len(names))
        count = crew.on_cluster(nodes)
        if count < 1:
            has = max((node["Resources"].get("CPU", 0) for node in nodes if node["Alive"]), default=0)
            beside = " beside its GPU" if crew.gpus else ""
            fail(f"an actor takes {cpus:g} CPUs{beside}, and a machine of the Ray cluster has {has:g} at most", code=2)
        # Two calls at a time: one makes a stream, and the other answers how far it is.
        kind = ray.remote(Worker).options(num_cpus=cpus, num_gpus=crew.gpus, max_concurrency=2)
        failed = _Queue(ray, lambda: kind.remote(work, crew), names, chunks).run(count)
    finally:
        ray.shutdown()
    if failed:
        fail("; ".join(failed), code=1)


class _Queue:
    """Which stream which actor is at."""

    def __init__(self, ray: Any, start: Callable[[], Any], names: Sequence[str], chunks: Sequence[int]):
        """start: starts an actor."""
        self.ray, self.start, self.names, self.chunks = ray, start, names, chunks
        self.waiting = deque(range(len(names)))
        self.attempts = [0] * len(names)
        self.running: dict[Any, tuple[Any, int]] = {}  # reference of the result -> actor, stream
        self.done = [0] * len(names)  # chunks
        self.failed: list[str] = []
        self.refusal = ""
        """Why an actor could not make anything."""

    def run(self, count: int) -> list[str]:
        """Until nothing is left, with so many actors. Returns what has failed, in words."""
        actors = [self.start() for _ in range(count)]
        try:
            words, refusal = self.ray.get(actors[0].about.remote())
        except self.ray.exceptions.RayError as error:
            fail(f"an actor died before it had loaded anything: {_brief(error)}", code=1)
        if refusal:
            fail(refusal, code=2)
        typer.echo("\n".join(words))
        columns = TextColumn("{task.description}"), TextColumn("chunk"), MofNCompleteColumn(), BarColumn(bar_width=24)
        try:
            for actor in actors:
                self._next(actor)
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task("", total=sum(self.chunks))
                while self.running:
                    self._collect()
                    for actor, number in list(self.running.values()):
                        self._ask(actor, number)
                    words = f"{len(self.running)} actors, {len(self.waiting)} streams waiting"
                    bar.update(task, completed=sum(self.done), description=words)
        except KeyboardInterrupt:
            self._stop()
            fail("interrupted; what was made is kept, and the same command goes on", code=130)
        return [*self.failed, *(f"{self.names[number]}: {self.refusal}" for number in self.waiting)]

    def _collect(self) -> None:
        """Takes what is ready, and gives the actor of it the next stream."""
        ready, _ = self.ray.wait(list(self.running), timeout=POLL_SECONDS)
        for reference in ready:
            actor, number = self.running.pop(reference)
            try:
                made = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:  # the actor has died, or its machine has
                self._lost(number, error)
                actor = self.start() if self.waiting else None
            else:
                if made.refused:
                    self._refused(number, str(made.error))
                    actor = None
                else:
                    self._told(number, made)
            self._next(actor)

    def _next(self, actor: Any) -> None:
        """Gives an actor the next stream. One that has nothing left to do is let go."""
        if self.waiting and actor is not None:
            number = self.waiting.popleft()
            self.attempts[number] += 1
            self.running[actor.make.remote(number)] = actor, number

    def _lost(self, number: int, error: Exception) -> None:
        """The actor of a stream has died."""
        if self.attempts[number] < ATTEMPTS:
            self.waiting.appendleft(number)
            typer.echo(f"An actor died at {self.names[number]}; another one goes on.", err=True)
        else:
            self.failed.append(f"{self.names[number]}: {ATTEMPTS} actors died at it ({_brief(error)})")

    def _refused(self, number: int, why: str) -> None:
        """An actor cannot make any stream on its machine. It is let go, and its stream waits for the others."""
        self.waiting.appendleft(number)
        self.attempts[number] -= 1
        self.refusal = why
        typer.echo(f"An actor cannot make anything on its machine: {why}", err=True)

    def _told(self, number: int, made: Made) -> None:
        self.done[number] = self.chunks[number]
        for words in made.words:
            typer.echo(words)
        if made.error is not None:
            self.failed.append(f"{self.names[number]}: {made.error}")

    def _ask(self, actor: Any, number: int) -> None:
        """How far an actor is. One that does not answer may be loading, or be dead, which `_collect` sees."""
        try:
            self.done[number] = self.ray.get(actor.chunks.remote(), timeout=POLL_SECONDS)
        except self.ray.exceptions.RayError:
            return

    def _stop(self) -> None:
        for actor, _ in self.running.values():
            actor.stop.remote()
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=STOPPING_SECONDS)


def _brief(error: Exception) -> str:
    """An error in a message, which is one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
