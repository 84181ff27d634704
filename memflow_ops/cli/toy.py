"""`memflow toy demo`, `generate`, `train` and `evaluate`: the toy world, which runs on a laptop's CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from memflow_ops.cli.errors import fail, one_line_errors
from memflow_ops.cli.options import (
    MEMORY,
    MEMORY_HELP,
    BankDtypeName,
    BankFrames,
    BlockScore,
    Device,
    DeviceFrames,
    FramesPerPrompt,
    HistoryDir,
    HostFrames,
    Out,
    PositionsName,
    QueryGroup,
    Recache,
    Reselect,
    Resume,
    Seed,
    SnapshotEvery,
    Steps,
    Story,
    TokenOrder,
    TopK,
    ToyWeights,
    as_history,
    as_settings,
    check_used,
    typed,
)
from memflow_ops.cli.progress import run_stories
from memflow_ops.environment import pick_device
from memflow_ops.files import check_target, locked_folders, sha256
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.stories.prompts import read_stories
from memflow_ops.model.streaming.settings import MemoryMode, StreamSettings
from memflow_ops.model.toy import train as training
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
from memflow_ops.model.toy.evaluation import evaluate as evaluation
from memflow_ops.model.toy.evaluation.figures import KindFigures, KindTiming
from memflow_ops.model.toy.evaluation.held_out import FRAMES_PER_PROMPT, JUDGED_SEED
from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS
from memflow_ops.model.toy.evaluation.report import default_results, evaluation_table, write_evaluation
from memflow_ops.model.toy.generate import DEMO_STORY, make_toy_plans, stream_toy_story
from memflow_ops.model.toy.language import parse_prompt
from memflow_ops.model.toy.returns import colour_name
from memflow_ops.model.toy.runs import ToyPlan, ToyRun
from memflow_ops.model.toy.schedule import HELD_OUT_SEED, TOTAL_STEPS
from memflow_ops.model.toy.settings import TOY_SETTINGS
from memflow_ops.model.wan.transformer import CausalVideoModel


def demo(
    context: typer.Context,
    out: Out = Path("out/demo"),
    seed: Seed = 0,
    steps: Steps = TOY_SETTINGS.steps,
    weights: ToyWeights = None,
    device: Device = "auto",
) -> None:
    """Stream a story in which a character leaves and returns, and say whether it came back the same.

    The story comes with the package and takes less than a minute on a CPU.
    It is streamed with memory and without, so that you see the difference.

    Example:

      memflow toy demo --out out/demo
    """
    with one_line_errors():
        stories = read_stories(DEMO_STORY, parse_prompt)
        model, plans = _prepare(context, stories, out, {"steps": steps}, weights=weights, device=device, seed=seed)
    for run in _stream(model, plans):
        typer.echo(f"The story: {', then '.join(run.plan.prompts)}.\n")
        for there in run.returns():
            typer.echo(_returned(there) + "\n")
        typer.echo(_cost(run) + "\n")
        typer.echo(_written(run))


def generate(
    context: typer.Context,
    story: Story,
    out: Out,
    weights: ToyWeights = None,
    seed: Seed = 0,
    frames_per_prompt: FramesPerPrompt = FRAMES_PER_PROMPT,
    steps: Steps = TOY_SETTINGS.steps,
    memory: Annotated[
        MemoryMode,
        typer.Option(
            help=MEMORY_HELP,
            metavar="KIND",
            rich_help_panel=MEMORY,
        ),
    ] = TOY_SETTINGS.memory,
    bank_frames: BankFrames = TOY_SETTINGS.bank_frames,
    top_k: TopK = TOY_SETTINGS.top_k,
    query_group: QueryGroup = TOY_SETTINGS.query_group or 0,
    score: BlockScore = TOY_SETTINGS.score,
    bank_dtype: BankDtypeName = None,
    reselect: Reselect = TOY_SETTINGS.reselect,
    token_order: TokenOrder = TOY_SETTINGS.token_order,
    positions: PositionsName = TOY_SETTINGS.positions,
    recache: Recache = TOY_SETTINGS.recache,
    history_dir: HistoryDir = None,
    device_frames: DeviceFrames = None,
    host_frames: HostFrames = None,
    snapshot_every: SnapshotEvery = None,
    resume: Resume = False,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline",
            help="Stream the story without memory too, chunk by chunk in turn, to measure what memory costs. This "
            "doubles the time.",
            rich_help_panel=MEMORY,
        ),
    ] = True,
    device: Device = "auto",
) -> None:
    """Generate a video of every story in a file, in the toy world.

    A prompt says who is where: a ball, a box, a star, a ring, two of these, or
    nobody (empty), in the meadow, in the desert, at sea or at night.

    Writes video.mp4, timeline.png (what each chunk remembered), frames.npz
    (the frames as numbers) and run.json (settings, times, what was
    retrieved). One story goes straight into DIR; several go into
    DIR/story-000, DIR/story-001, ... with the seeds SEED, SEED + 1, ...

    The video grows as video.part.mp4; files of an earlier run are replaced
    when the new ones are complete. Ctrl-C keeps what has been generated, and
    with --history-dir the same command goes on from there with --resume,
    also after a kill or a reboot.

    Examples:

      memflow toy generate story.jsonl --out out/story
      memflow toy generate story.jsonl --out out/sink --memory sink
    """
    given = typed(context) - (set() if baseline else {"baseline"})
    settings = as_settings(
        memory=memory,
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
    )
    with one_line_errors():
        stories = read_stories(story, parse_prompt)
        check_used(given, [memory])
        model, plans = _prepare(
            context,
            stories,
            out,
            settings,
            weights=weights,
            device=device,
            seed=seed,
            frames_per_prompt=frames_per_prompt,
            baseline=baseline,
            history=as_history(
                history_dir,
                out,
                device_frames=device_frames,
                host_frames=host_frames,
                every=snapshot_every,
                resume=resume,
            ),
        )
        plans = _unfinished(plans)
    for run in _stream(model, plans):
        typer.echo(_written(run))
        if cost := _cost(run):
            typer.echo(cost)


def train(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The .safetensors file to write.",
            metavar="FILE",
            show_default="the package's own weights; out/toy.safetensors with --seed or --training-steps",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(help=f"The seed of everything random, below {HELD_OUT_SEED}.", min=0, metavar="N"),
    ] = 0,
    training_steps: Annotated[
        int, typer.Option(help="Training steps in all; fewer shorten every stage of the schedule.", min=1, metavar="N")
    ] = TOTAL_STEPS,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1, metavar="N")] = 2,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, even where an unfinished run could be continued.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Train the toy world's model from scratch.

    Without options it replaces the weights that come with the package. The
    full training takes about an hour on a CPU. The state of an unfinished
    run is saved every minute: after Ctrl-C or a kill, the same command
    continues where it was.

    Examples:

      memflow toy train
      memflow toy train --training-steps 50 --out out/short.safetensors
    """
    # Only the whole of their training replaces the weights that come with the package.
    target = out or (Path("out") / TOY_WEIGHTS.name if typed(context) & {"seed", "training_steps"} else TOY_WEIGHTS)
    with one_line_errors():
        check_target(target, ".safetensors")  # before the training, which takes long
        training.train(
            target, seed=seed, steps=training_steps, threads=threads, device=str(pick_device(device)), restart=restart
        )


def evaluate(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The .json file to write; a picture goes beside it.",
            metavar="FILE",
            show_default="bench/results/toy-cpu-seed-30000.json, or out/evaluate.json with any other option",
        ),
    ] = None,
    weights: ToyWeights = None,
    stories: Annotated[int, typer.Option(help="How many held-out stories of each length.", min=1, metavar="N")] = 8,
    seed: Annotated[
        int,
        typer.Option(
            help=f"The seed of the stories and their noise; stories are held out from {HELD_OUT_SEED} on.",
            min=0,
            metavar="N",
        ),
    ] = JUDGED_SEED,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            help="A kind of memory, such as none, memflow or 'random frames'. May be repeated.",
            metavar="KIND",
            show_default="all",
            autocompletion=lambda: list(MEMORY_KINDS),
            rich_help_panel=MEMORY,
        ),
    ] = None,
    top_k: TopK = TOY_SETTINGS.top_k,
    steps: Steps = TOY_SETTINGS.steps,
) -> None:
    """Measure how often characters come back the same, with every kind of memory.

    Streams held-out stories in which characters leave and return, and judges
    from the pixels alone. Prints a table, and writes it as JSON with a
    picture. Ctrl-C ends early and keeps the kinds that are finished.

    Examples:

      memflow toy evaluate
      memflow toy evaluate --stories 2 --memory none --memory memflow
    """
    given = typed(context)
    kinds = list(dict.fromkeys(memory or MEMORY_KINDS))
    used = weights or TOY_WEIGHTS
    so_far = out or Path("out") / "evaluate.json"
    # Only the whole evaluation replaces the results that the repository states.
    target = so_far if given else default_results() or so_far
    with one_line_errors():
        settings = replace(TOY_SETTINGS, top_k=top_k, steps=steps)
        model = load_model(used, pick_device("cpu"))
        evaluation.check_evaluation(kinds, stories, seed, top_k if "top_k" in given else None)
        for path in (so_far, target):  # before the evaluation, which takes long
            check_target(path, ".json")
            check_target(path.with_suffix(".png"), ".png")
    if seed < HELD_OUT_SEED:
        words = f"seeds below {HELD_OUT_SEED} are for training and tuning: these stories are not held out"
        typer.echo(words, err=True)
    rows: list[KindFigures] = []
    timings: dict[str, KindTiming] = {}

    def write(path: Path) -> str:
        return write_evaluation(rows, timings, settings, seed=seed, stories=stories, weights=used, out=path)

    def keep(row: KindFigures) -> None:
        rows.append(row)
        write(so_far)

    try:
        timings.update(_judge(model, kinds, stories, seed, settings, keep))
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was judged is in {so_far}" if rows else "stopped; nothing was judged yet", err=True)
        if rows:
            typer.echo(evaluation_table(rows, timings))
        raise
    lost = write(target)
    typer.echo(evaluation_table(rows, timings))
    typer.echo(f"written to {target}" + ("" if lost else f" and {target.with_suffix('.png').name}"))
    if lost:
        fail(lost, code=1)


def _judge(
    model: CausalVideoModel,
    kinds: Sequence[str],
    stories: int,
    seed: int,
    settings: StreamSettings,
    keep: Callable[[KindFigures], None],
) -> dict[str, KindTiming]:
    """Judge every kind of memory behind progress bars, then time all of them. Gives the timings.

    keep: is called with the figures of every kind when they are complete. Ctrl-C does not interrupt it.
    """
    with Interrupts() as interrupts, Progress(console=Console(stderr=True)) as bar:
        judged = evaluation.evaluate_kinds(
            model, stories=stories, kinds=kinds, seed=seed, settings=settings, report=_kind_bars(bar, kinds)
        )
        while True:
            with interrupts.allowed():
                row = next(judged, None)
            if row is None:
                break
            keep(row)
            if not bar.console.is_terminal:
                share = f"{100 * row.hue.value:.0f} % of {row.hue.count} returns"
                bar.console.print(f"{row.memory}: same hue in {share}")
        bar.add_task("timing", total=None)
        with interrupts.allowed():
            return evaluation.time_kinds(model, kinds, settings, seed)


def _kind_bars(bar: Progress, kinds: Sequence[str]) -> Callable[[str, int, int], None]:
    """A progress bar for each kind of memory. Gives what moves one on: a function of name, chunks done and chunks."""
    tasks = {name: bar.add_task(name, total=None, start=False) for name in kinds}

    def report(name: str, done: int, total: int) -> None:
        if done == 1:
            bar.start_task(tasks[name])
        bar.update(tasks[name], completed=done, total=total)

    return report


def _prepare(
    context: typer.Context,
    stories: Sequence[Sequence[str]],
    out: Path,
    changes: Mapping[str, Any],
    *,
    weights: Path | None,
    device: str,
    **planning: Any,
) -> tuple[CausalVideoModel, list[ToyPlan]]:
    """Load the model and plan every story, so that what cannot work is refused before anything is written.

    changes: what differs from `TOY_SETTINGS`. planning: arguments of `make_toy_plans`.
    """
    bank_frames = changes.get("bank_frames", TOY_SETTINGS.bank_frames)
    least = bank_frames + TOY_SETTINGS.window_frames
    settings = replace(TOY_SETTINGS, **changes, device_frames=max(TOY_SETTINGS.device_frames, least))
    model = load_model(weights or TOY_WEIGHTS, pick_device(device))
    settings.cache_layout(model, 1).check_room(model.patch_embedding.weight.device)
    name = str(weights) if weights else f"memflow_ops/model/weights/{TOY_WEIGHTS.name}"
    digest, kind = sha256(weights or TOY_WEIGHTS), model.patch_embedding.weight.device.type
    plans = make_toy_plans(stories, out, settings, weights=name, weights_sha256=digest, device=kind, **planning)
    for plan in plans:
        if plan.snapshots is not None:
            context.call_on_close(plan.snapshots.close)
    context.with_resource(locked_folders([out, *(plan.folder for plan in plans)]))
    return model, plans


def _unfinished(plans: Sequence[ToyPlan]) -> list[ToyPlan]:
    """The plans of the stories that are not complete. Says where each history lies, and where its run goes on."""
    left = []
    for plan in plans:
        snapshots = plan.snapshots
        if snapshots is not None:
            for words in (*_tiers(plan), *snapshots.said()):
                typer.echo(words)
            if snapshots.finished:
                continue
        left.append(plan)
    return left


def _tiers(plan: ToyPlan) -> list[str]:
    """Where the history of a story lies, in words."""
    settings = plan.settings
    if settings.memory != "memflow" or plan.snapshots is None:
        return []
    tiers = f"{settings.device_frames} on the device, {settings.host_frames} in host memory, {settings.disk_frames}"
    return [f"Past frames, all of them in {plan.snapshots.path}: up to {tiers} nowhere else."]


def _stream(model: CausalVideoModel, plans: Sequence[ToyPlan]) -> Iterator[ToyRun]:
    """Generate one story after another. Yield each when its files are written."""

    def stream(plans: Sequence[ToyPlan], report: Callable[[ToyRun], None]) -> list[ToyRun]:
        return [stream_toy_story(model, plan, report) for plan in plans]

    for (run,) in run_stories([[plan] for plan in plans], stream, _speed, _written):
        yield run


def _speed(run: ToyRun) -> str:
    """The speed with memory; the time of the baseline does not count."""
    return f"{sum(map(len, run.frames)) / sum(chunk.seconds for chunk in run.chunks):.1f} frames/s"


def _written(run: ToyRun) -> str:
    """The files that a run has left, in words."""
    frames = sum(map(len, run.frames))
    return (
        f"Files in {run.plan.folder}:\n"
        f"  video.mp4     the video, {frames} frames\n"
        f"  timeline.png  its frames, and what each chunk remembered\n"
        f"  frames.npz    its frames as numbers, uint8 (frames, height, width, RGB)\n"
        f"  run.json      settings, versions, times, what was retrieved and what memory cost"
    )


def _cost(run: ToyRun) -> str:
    """What memory has cost, in words; empty where it was not measured."""
    measured: dict[str, Any] | None = run.overhead()
    if measured is None:
        return ""
    return (
        f"Memory took {100 * (measured['ratio'] - 1):+.0f} % time per chunk against no memory: "
        f"{measured['seconds_per_chunk']:.2f} s against {measured['baseline_seconds_per_chunk']:.2f} s "
        f"(median of {measured['chunks_compared']} chunks made in turn; for 20 to 80 % of them it lay between "
        f"{100 * (measured['ratio_p20'] - 1):+.0f} % and {100 * (measured['ratio_p80'] - 1):+.0f} %)."
    )


def _returned(there: Mapping[str, Any]) -> str:
    """A return in plain words, with memory and without. there: an entry of `ToyRun.returns`."""
    character = there["character"]
    lines = [
        f"The {character} leaves after frame {there['last_seen']} and returns at frame {there['back']}. "
        f"Judged from the pixels, hues within 30 degrees and equal patterns counting as the same:"
    ]
    for name, seen in (("With memory", there["with_memory"]), ("Without memory", there["without_memory"])):
        if seen is not None:
            lines.append(f"  {name + ':':<16}{looks(seen, character)}")
    return "\n".join(lines)


def looks(seen: Mapping[str, Any], character: str) -> str:
    """How a character looked before it left and after it came back, in words. seen: a `Judgement` as a dict."""
    before, after = seen["hue_before"], seen["hue_after"]
    if before is None or after is None:
        when = "when it should have left" if before is None else "when it should have returned"
        return f"the {character} was not to be seen {when}."
    verdict = "with the same look" if seen["same"] else "with ANOTHER look"
    return (
        f"it came back {verdict}: {colour_name(before)} {seen['pattern_before']}, hue {before:.0f} degrees, when it "
        f"left, {colour_name(after)} {seen['pattern_after']}, hue {after:.0f}, on return."
    )
