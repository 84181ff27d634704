"""What the commands of the toy world do, and the words they choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from memflow_ops.cli.progress import mistakes, run_stories

if TYPE_CHECKING:
    from memflow_ops.model.toy.runs import ToyPlan, ToyRun
    from memflow_ops.model.wan.transformer import CausalVideoModel


def prepare(
    story: Path,
    out: Path,
    *,
    seed: int = 0,
    frames_per_prompt: int = 12,
    device: str = "auto",
    weights: Path | None = None,
    baseline: bool | None = None,
    **settings: Any,
) -> tuple[CausalVideoModel, list[ToyPlan]]:
    """Checks everything that can be wrong, before anything is generated or written; folders come last.

    baseline: None where nobody asked for it; then the story is streamed without memory too, if it has one. settings:
    what differs from `TOY_SETTINGS`.
    """
    from memflow_ops.cli.options import check_used
    from memflow_ops.environment import pick_device
    from memflow_ops.model.stories.prompts import read_stories
    from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
    from memflow_ops.model.toy.generate import make_toy_plans
    from memflow_ops.model.toy.language import parse_prompt
    from memflow_ops.model.toy.settings import TOY_SETTINGS

    stories = read_stories(story, parse_prompt)
    bank_frames = settings.get("bank_frames", TOY_SETTINGS.bank_frames)
    room = max(TOY_SETTINGS.device_frames, bank_frames + TOY_SETTINGS.window_frames)
    chosen = replace(TOY_SETTINGS, **settings, device_frames=room)
    check_used({**settings, **({"baseline": True} if baseline else {})}, [chosen.memory])
    model = load_model(weights or TOY_WEIGHTS, pick_device(device))
    name = str(weights) if weights else f"memflow_ops/model/weights/{TOY_WEIGHTS.name}"
    measured = baseline is not False
    plans = make_toy_plans(
        stories, out, chosen, seed=seed, frames_per_prompt=frames_per_prompt, baseline=measured, weights=name
    )
    return model, plans


def stream_stories(model: CausalVideoModel, plans: Sequence[ToyPlan]) -> Iterator[ToyRun]:
    """Makes one story after another; yields each when its files are written."""
    from memflow_ops.model.toy.generate import stream_toy_story

    def speed(run: ToyRun) -> str:
        # With memory; the baseline's share of the time is not counted.
        return f"{sum(map(len, run.frames)) / sum(chunk.seconds for chunk in run.chunks):.1f} frames/s"

    streams = [[plan] for plan in plans]
    for (run,) in run_stories(streams, lambda plans, report: [stream_toy_story(model, plans[0], report)], speed, made):
        yield run


def made(run: ToyRun) -> str:
    frames = sum(map(len, run.frames))
    return (
        f"Files in {run.plan.folder}:\n"
        f"  video.mp4     the video, {frames} frames\n"
        f"  timeline.png  its frames, and what each chunk remembered\n"
        f"  frames.npz    its frames as numbers, uint8 (frames, height, width, RGB)\n"
        f"  run.json      settings, versions, times, what was retrieved and what memory cost"
    )


def cost(run: ToyRun) -> str:
    paid: dict[str, Any] | None = run.overhead()
    if paid is None:
        return ""
    return (
        f"Memory took {100 * (paid['ratio'] - 1):+.0f} % time per chunk against no memory: "
        f"{paid['seconds_per_chunk']:.2f} s against {paid['baseline_seconds_per_chunk']:.2f} s "
        f"(median of {paid['chunks_compared']} chunks made in turn; for 20 to 80 % of them it lay between "
        f"{100 * (paid['ratio_p20'] - 1):+.0f} % and {100 * (paid['ratio_p80'] - 1):+.0f} %)."
    )


def returned(there: dict[str, Any]) -> str:
    """A return in plain words, with memory and without."""
    character = there["character"]
    words = [
        f"The {character} leaves after frame {there['last_seen']} and returns at frame {there['back']}. "
        f"Judged from the pixels, hues within 30 degrees and equal patterns counting as the same:"
    ]
    for name, seen in (("With memory", there["with_memory"]), ("Without memory", there["without_memory"])):
        if seen is not None:
            words.append(f"  {name + ':':<16}{colours(seen, character)}")
    return "\n".join(words)


def colours(seen: dict[str, Any], character: str) -> str:
    from memflow_ops.model.toy.returns import colour_name

    before, after = seen["hue_before"], seen["hue_after"]
    if before is None or after is None:
        when = "when it should have left" if before is None else "when it should have returned"
        return f"the {character} was not to be seen {when}."
    verdict = "with the same look" if seen["same"] else "with ANOTHER look"
    return (
        f"it came back {verdict}: {colour_name(before)} {seen['pattern_before']}, hue {before:.0f} degrees, when it "
        f"left, {colour_name(after)} {seen['pattern_after']}, hue {after:.0f}, on return."
    )


def evaluate(
    weights: Path | None,
    stories: int,
    seed: int,
    memory: list[str] | None,
    top_k: int | None,
    steps: int | None,
    out: Path | None,
) -> None:
    """Judges the toy weights behind progress bars, prints the table and writes it to a file."""
    from rich.console import Console
    from rich.progress import Progress

    from memflow_ops.environment import pick_device
    from memflow_ops.files import check_target
    from memflow_ops.model.stories.interrupts import Interrupts
    from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS, load_model
    from memflow_ops.model.toy.evaluation import evaluate as evaluation_evaluate
    from memflow_ops.model.toy.evaluation.figures import KindFigures, KindTiming
    from memflow_ops.model.toy.evaluation.held_out import JUDGED_SEED
    from memflow_ops.model.toy.evaluation.kinds import MEMORY_KINDS
    from memflow_ops.model.toy.evaluation.report import default_results, evaluation_table, write_evaluation
    from memflow_ops.model.toy.settings import TOY_SETTINGS
    from memflow_ops.model.toy.train import HELD_OUT_SEED

    kinds = list(dict.fromkeys(memory or MEMORY_KINDS))
    used = weights or TOY_WEIGHTS
    trial = memory or top_k or steps or weights or stories != 8 or seed != JUDGED_SEED
    so_far = out or Path("out") / "evaluate.json"
    # What the repository states is only replaced by the whole of it.
    target = so_far if out or trial else default_results() or so_far
    with mistakes():
        settings = replace(TOY_SETTINGS, top_k=top_k or TOY_SETTINGS.top_k, steps=steps or TOY_SETTINGS.steps)
        model = load_model(used, pick_device("cpu"))
        evaluation_evaluate.check_evaluation(kinds, stories, seed, top_k)
        for path in (so_far, target):  # rather now than after the evaluation
            check_target(path, ".json")
            check_target(path.with_suffix(".png"), ".png")
    if seed < HELD_OUT_SEED:
        typer.echo(f"seeds below {HELD_OUT_SEED} are for training and tuning: these stories are not held out", err=True)
    rows: list[KindFigures] = []
    timings: dict[str, KindTiming] = {}

    def write(path: Path) -> None:
        write_evaluation(rows, timings, settings, seed=seed, stories=stories, weights=used, out=path)

    with Interrupts() as interrupts, Progress(console=Console(stderr=True)) as bar:
        tasks = {name: bar.add_task(name, total=None, start=False) for name in kinds}

        def report(name: str, done: int, total: int) -> None:
            if done == 1:
                bar.start_task(tasks[name])
            bar.update(tasks[name], completed=done, total=total)

        judged = evaluation_evaluate.evaluate_kinds(
            model, stories=stories, kinds=kinds, seed=seed, settings=settings, report=report
        )
        try:
            while True:
                with interrupts.allowed():
                    row = next(judged, None)
                if row is None:
                    break
                rows.append(row)
                write(so_far)
                if not bar.console.is_terminal:
                    bar.console.print(
                        f"{row.memory}: same hue in {100 * row.hue.value:.0f} % of {row.hue.count} returns"
                    )
            bar.add_task("timing", total=None)
            with interrupts.allowed():
                timings.update(evaluation_evaluate.time_kinds(model, kinds, settings, seed))
        except KeyboardInterrupt:
            bar.console.print(f"stopped; what was judged is in {so_far}" if rows else "stopped; nothing was judged yet")
            if rows:
                typer.echo(evaluation_table(rows, timings))
            raise
    write(target)
    typer.echo(evaluation_table(rows, timings))
    typer.echo(f"written to {target} and {target.with_suffix('.png').name}")
