"""The command `memflow`: stream stories, look at what they remembered, train and judge the toy world.

Errors that the user can mend are one line on stderr and exit code 2; Ctrl-C is exit code 130. What a command needs is
imported when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from memflow_ops.model.generate import Plan, Run
    from memflow_ops.model.transformer import CausalVideoModel

app = typer.Typer(
    help="Long memory for streaming video: make a video from a story, chunk by chunk, and see what it remembered.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path, typer.Option(help="Folder to write to.", metavar="DIR")]
Seed = Annotated[int, typer.Option(help="Of the noise. The same seed makes the same video.", min=0, metavar="N")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda or cuda:N.", metavar="NAME")]
Weights = Annotated[
    Path | None,
    typer.Option(help="A checkpoint of `memflow train`. Default: the toy weights that come with the package."),
]

Recache = Annotated[
    bool,
    typer.Option(
        "--recache/--no-recache",
        help="At a prompt switch pass the local window again under the new prompt. The toy weights do better without.",
    ),
]


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        import memflow_ops

        typer.echo(f"memflow-ops {memflow_ops.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def generate(
    story: Annotated[Path, typer.Argument(help='JSON lines, a story each: {"prompts": ["a ball in the meadow", ...]}')],
    out: Out,
    memory: Annotated[
        str,
        typer.Option(
            help="How a chunk sees the past: none (only the frames just before it), sink (the first frames too), full "
            "(every remembered frame), memflow (what each query picks of the first frames and the retrieved ones).",
            metavar="KIND",
        ),
    ] = "memflow",
    seed: Seed = 0,
    bank_frames: Annotated[int, typer.Option(help="Past frames retrieved for a chunk.", min=0, metavar="N")] = 3,
    top_k: Annotated[int, typer.Option(help="Memory blocks that each query group attends to.", min=1, metavar="N")] = 8,
    frames_per_prompt: Annotated[int, typer.Option(help="How long each prompt lasts.", min=1, metavar="N")] = 12,
    steps: Annotated[int, typer.Option(help="Denoising passes per chunk.", min=1, metavar="N")] = 16,
    recache: Recache = False,
    device: Device = "auto",
    weights: Weights = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Stream the story without memory too, in turn, to measure what memory costs. Doubles the time.",
        ),
    ] = True,
) -> None:
    """Make a video of every story in a file.

    Writes video.mp4, frames.npz, timeline.png (what each chunk remembered) and run.json (settings, times, cost of
    memory). One story goes straight into DIR, several into DIR/story-000, DIR/story-001, ... with seeds SEED, SEED + 1,
    ... Files of an earlier run are replaced when the new ones are complete; until then the video grows as
    video.part.mp4. Ctrl-C keeps what has been made.

    Prompts say who is where: ball, box, star, ring or empty; meadow, desert, sea or night.
    """
    with _mistakes():
        model, plans = _prepare(
            story, out, memory, seed, bank_frames, top_k, frames_per_prompt, steps, recache, device, weights, baseline
        )
    for run in _generate(model, plans):
        typer.echo(_made(run))
        cost = _cost(run)
        if cost:
            typer.echo(cost)


@app.command()
def demo(
    out: Out = Path("out/demo"),
    seed: Seed = 0,
    device: Device = "auto",
    steps: Annotated[int, typer.Option(help="Denoising passes per chunk.", min=1, metavar="N")] = 16,
    weights: Weights = None,
) -> None:
    """Stream the shipped story, in which a character leaves and returns, and say in plain words what came of it."""
    with _mistakes():
        from memflow_ops.model.generate import DEMO_STORY

        model, plans = _prepare(DEMO_STORY, out, "memflow", seed, 3, 4, 12, steps, False, device, weights, True)
    for run in _generate(model, plans):
        typer.echo(f"The story: {', then '.join(run.plan.prompts)}.\n")
        for there in run.returns():
            typer.echo(_returned(there) + "\n")
        typer.echo(_cost(run) + "\n")
        typer.echo(_made(run))


@app.command()
def info() -> None:
    """Print versions, the device, and what can run here."""
    import platform

    import torch

    import memflow_ops
    from memflow_ops import environment
    from memflow_ops.model.checkpoints import TOY_WEIGHTS, load_checkpoint

    def line(name: str, words: object) -> None:
        typer.echo(f"  {name:<34}{words}")

    def available(what: dict[str, str]) -> None:
        for name, why_not in what.items():
            line(name, f"no: {why_not}" if why_not else "yes")

    typer.echo("versions")
    line("memflow-ops", memflow_ops.__version__)
    line("python", platform.python_version())
    line("torch", torch.__version__)
    line("triton", environment.version("triton") or "not installed")
    line("flash-attn", environment.version("flash-attn") or "not installed (pip install 'memflow-ops[flash]')")
    device = environment.pick_device("auto")
    typer.echo("device")
    line(device.type, environment.device_name(device))
    typer.echo("implementations of the ops")
    available(environment.implementations())
    typer.echo("dense backends for the local window")
    available(environment.dense_backends())
    typer.echo("toy weights")
    try:
        model = load_checkpoint(TOY_WEIGHTS)
    except (OSError, ValueError) as error:
        line("none", error)
    else:
        line(f"{sum(x.numel() for x in model.parameters()):,} parameters", TOY_WEIGHTS)


@app.command()
def train(
    out: Annotated[Path | None, typer.Option(help="Default: the package's own toy weights, replaced.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random, below 10000.", min=0, metavar="N")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Default: the full schedule; fewer shorten it.", min=1, metavar="N")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1, metavar="N")] = 2,
    device: Device = "cpu",
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, although an unfinished run lies there.")
    ] = False,
) -> None:
    """Train the toy world's model from scratch. After Ctrl-C or a kill the same command continues where it was."""
    from memflow_ops.environment import pick_device
    from memflow_ops.model import train as training
    from memflow_ops.model.checkpoints import TOY_WEIGHTS

    target = out or TOY_WEIGHTS
    with _mistakes():
        target.parent.mkdir(parents=True, exist_ok=True)  # rather now than after the training
        if target.is_dir():
            raise ValueError(f"{target} is a folder; --out takes a file name")
        training.train(
            target,
            seed=seed,
            steps=steps or training.TOTAL_STEPS,
            threads=threads,
            device=str(pick_device(device)),
            restart=restart,
        )


@app.command()
def evaluate(
    weights: Weights = None,
    stories: Annotated[int, typer.Option(help="Held-out stories of each length.", min=1, metavar="N")] = 8,
    seed: Annotated[int, typer.Option(help="Of the stories and their noise, 10000 or more.", metavar="N")] = 10_000,
    memory: Annotated[
        list[str] | None,
        typer.Option(help="A kind of memory, such as none, memflow or 'random frames'; may be repeated. Default: all."),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Blocks that a query group selects.", min=1, metavar="N")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising passes per chunk.", min=1, metavar="N")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file. Default: bench/results/toy-cpu.json.")] = None,
) -> None:
    """Stream held-out stories under every kind of memory and judge from the pixels who came back the same.

    Writes a JSON file and a picture beside it. Ctrl-C ends early and keeps the kinds that are finished.
    """
    from rich.console import Console
    from rich.progress import Progress

    from memflow_ops.model import evaluate as judging
    from memflow_ops.model.checkpoints import TOY_WEIGHTS, load_checkpoint
    from memflow_ops.model.stream import TOY_SETTINGS

    kinds = memory or list(judging.KINDS)
    target = out or judging.default_results()
    with _mistakes():
        settings = replace(TOY_SETTINGS, top_k=top_k or TOY_SETTINGS.top_k, steps=steps or TOY_SETTINGS.steps)
        model = load_checkpoint(weights or TOY_WEIGHTS)
        judging.check(kinds, stories, seed)
    rows: list[judging.Row] = []
    with Progress(console=Console(stderr=True)) as bar:
        tasks = {name: bar.add_task(name, total=None, start=False) for name in kinds}

        def report(name: str, done: int, total: int) -> None:
            if done == 1:
                bar.start_task(tasks[name])
            bar.update(tasks[name], completed=done, total=total)

        try:
            for row in judging.evaluate(
                model, stories=stories, kinds=kinds, seed=seed, settings=settings, report=report
            ):
                rows.append(row)
        except KeyboardInterrupt:
            if not rows:
                raise
    typer.echo(judging.table(rows))
    if target is not None:
        name = weights.name if weights else TOY_WEIGHTS.name
        judging.write_results(rows, settings, seed=seed, stories=stories, weights=name, out=target)
        typer.echo(f"written to {target} and {target.with_suffix('.png').name}")
    if len(rows) < len(kinds):
        raise KeyboardInterrupt


# ------------------------------------------------------------------------------------------------------------ the steps


def _prepare(
    story: Path,
    out: Path,
    memory: str,
    seed: int,
    bank_frames: int,
    top_k: int,
    frames_per_prompt: int,
    steps: int,
    recache: bool,
    device: str,
    weights: Path | None,
    baseline: bool,
) -> tuple[CausalVideoModel, list[Plan]]:
    """Checks everything that can be wrong, before anything is generated or written; folders come last."""
    from memflow_ops.environment import pick_device
    from memflow_ops.model.checkpoints import TOY_WEIGHTS
    from memflow_ops.model.generate import load_model, make_plans, read_stories
    from memflow_ops.model.stream import TOY_SETTINGS, StreamSettings

    stories = read_stories(story)
    settings = replace(
        TOY_SETTINGS,
        memory=memory,  # type: ignore[arg-type]
        bank_frames=bank_frames,
        top_k=top_k,
        steps=steps,
        recache=recache,
        device_frames=max(StreamSettings.device_frames, bank_frames + StreamSettings.window_frames),
    )
    model = load_model(weights or TOY_WEIGHTS, pick_device(device))
    name = str(weights) if weights else f"memflow_ops/model/weights/{TOY_WEIGHTS.name}"
    plans = make_plans(
        stories, out, settings, seed=seed, frames_per_prompt=frames_per_prompt, baseline=baseline, weights=name
    )
    return model, plans


def _generate(model: CausalVideoModel, plans: Sequence[Plan]) -> Iterator[Run]:
    """Makes one story after another behind a progress bar; yields each when its files are written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from memflow_ops.model.generate import generate

    text, speed = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[speed]}")
    columns = (text, TextColumn("chunk"), MofNCompleteColumn(), BarColumn(bar_width=24), speed, TimeRemainingColumn())
    for i, plan in enumerate(plans):
        spoken = plan.spoken
        with Progress(*columns, console=Console(stderr=True)) as bar:
            which = f"story {i + 1}/{len(plans)}, " if len(plans) > 1 else ""
            task = bar.add_task(which + spoken[0], total=len(spoken), speed="")

            def report(run: Run) -> None:
                done = len(run.chunks)
                # The speed with memory; the baseline's share of the time is not counted.
                speed = sum(map(len, run.frames)) / sum(chunk.seconds for chunk in run.chunks)
                prompt = run.plan.spoken[min(done, len(run.plan.spoken) - 1)]
                bar.update(task, completed=done, description=which + prompt, speed=f"{speed:.1f} frames/s")  # noqa: B023

            try:
                run = generate(model, plan, report)
            except OSError as error:
                _fail(f"{error}; what was made is in {plan.folder}", code=1)
        if run.interrupted and not run.chunks:
            _fail("interrupted before the first chunk was made; nothing was written", code=130)
        if run.interrupted:
            typer.echo(_made(run))
            _fail(f"interrupted after chunk {len(run.chunks)} of {len(spoken)}; what was made is kept", code=130)
        yield run


def _made(run: Run) -> str:
    frames = sum(map(len, run.frames))
    return (
        f"Files in {run.plan.folder}:\n"
        f"  video.mp4     the video, {frames} frames\n"
        f"  timeline.png  its frames, and what each chunk remembered\n"
        f"  frames.npz    its frames as numbers, uint8 (frames, height, width, RGB)\n"
        f"  run.json      settings, versions, times, what was retrieved and what memory cost"
    )


def _cost(run: Run) -> str:
    cost: dict[str, Any] | None = run.overhead()
    if cost is None:
        return ""
    return (
        f"Memory took {100 * (cost['ratio'] - 1):+.0f} % time per chunk against no memory: "
        f"{cost['seconds_per_chunk']:.2f} s against {cost['baseline_seconds_per_chunk']:.2f} s "
        f"(median of {cost['chunks_compared']} chunks made in turn; for 20 to 80 % of them it lay between "
        f"{100 * (cost['ratio_p20'] - 1):+.0f} % and {100 * (cost['ratio_p80'] - 1):+.0f} %)."
    )


def _returned(there: dict[str, Any]) -> str:
    """A return in plain words, with memory and without."""
    character = there["character"]
    words = [
        f"The {character} leaves after frame {there['last_seen']} and returns at frame {there['back']}. "
        f"Judged from the pixels, hues within 30 degrees and equal patterns counting as the same:"
    ]
    for name, seen in (("With memory", there["with_memory"]), ("Without memory", there["without_memory"])):
        if seen is not None:
            words.append(f"  {name + ':':<16}{_colours(seen, character)}")
    return "\n".join(words)


def _colours(seen: dict[str, Any], character: str) -> str:
    from memflow_ops.model.returns import colour_name

    before, after = seen["hue_before"], seen["hue_after"]
    if before is None or after is None:
        when = "when it should have left" if before is None else "when it should have returned"
        return f"the {character} was not to be seen {when}."
    verdict = "with the same look" if seen["same"] else "with ANOTHER look"
    return (
        f"it came back {verdict}: {colour_name(before)} {seen['pattern_before']}, hue {before:.0f} degrees, when it "
        f"left, {colour_name(after)} {seen['pattern_after']}, hue {after:.0f}, on return."
    )


@contextmanager
def _mistakes() -> Iterator[None]:
    """What the user can mend becomes one line and exit code 2."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error), code=2)


def _fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and the end."""
    typer.echo(f"memflow: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; always ends in SystemExit."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(args=words, prog_name="memflow", standalone_mode=False)
    except typer.TyperException as error:  # an option that does not exist, a number out of range, ...
        typer.echo(f"memflow: {' '.join(error.format_message().split())} (see --help)", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("memflow: interrupted", err=True)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
