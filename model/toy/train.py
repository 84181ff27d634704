"""Trains the toy world's model on a CPU, behind a progress bar; this is what `memflow toy train` does.

The schedule is counted in steps, and every random number comes from the seed, so a run can be repeated.
"""

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from memflow_ops.files import check_target, sha256, write_atomically
from memflow_ops.model.checkpoints.native import save_checkpoint
from memflow_ops.model.stories.interrupts import Interrupts
from memflow_ops.model.toy.schedule import STAGES, TOTAL_STEPS, TrainingSettings, scaled_stages
from memflow_ops.model.toy.trainer import Trainer

SAVE_SECONDS = 60.0
"""Time between two savings of the training state."""
LOG_INTERVAL = 250
"""Steps between two lines where the output is no terminal."""


def train(
    out: Path,
    *,
    seed: int = 0,
    steps: int = TOTAL_STEPS,
    threads: int = 2,
    device: str = "cpu",
    restart: bool = False,
) -> None:
    """Trains the toy world's model and writes its weights to `out`, with settings and loss curve in a JSON beside them.

    seed: the seed of everything random, below HELD_OUT_SEED. steps: the steps in all; fewer shorten every stage alike.
    threads: the CPU threads that torch uses.

    The state of an unfinished run lies beside `out` with the suffix .partial. It is written every minute and at Ctrl-C,
    SIGTERM and SIGHUP, which end in a KeyboardInterrupt, and the same command continues from it bit for bit. With
    `restart` the training begins anew instead. A state that was written with other settings raises a ValueError.
    """
    out = Path(out)
    check_target(out, ".safetensors")
    torch.set_num_threads(threads)
    partial = out.with_suffix(".partial")
    trainer = Trainer(TrainingSettings(seed=seed, stages=scaled_stages(STAGES, steps)), device=device)
    console = Console()
    if partial.exists() and not restart:
        machine = trainer.load(partial)
        console.print(f"continuing after step {trainer.steps_done} of {trainer.total} ({partial})")
        if machine != trainer.machine():
            console.print(f"not bit for bit: it was begun on {machine}, this is {trainer.machine()}")
    try:
        _take_steps(trainer, partial, console)
    except KeyboardInterrupt:
        trainer.save(partial)
        console.print(f"stopped after step {trainer.steps_done}; the same command continues from {partial}")
        raise
    _write_weights(trainer, out, threads, device)
    partial.unlink(missing_ok=True)
    console.print(f"{out}: {trainer.seconds / 60:.1f} minutes")


def _take_steps(trainer: Trainer, partial: Path, console: Console) -> None:
    """Takes all steps that are left, behind a progress bar, and saves the state to `partial` now and then."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    saved = time.perf_counter()
    # A signal waits for the end of the step: a state saved in the middle of one could not be continued exactly.
    with Interrupts() as interrupts, Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=trainer.total, completed=trainer.steps_done)
        while trainer.steps_done < trainer.total:
            done = trainer.step()
            if interrupts.waiting:
                raise KeyboardInterrupt
            size = done.stage.size
            description = f"{size} x {size}, loss {done.denoising:.4f}, retrieval {done.relevance:.4f}"
            bar.update(task, completed=done.step, description=description)
            if done.step % LOG_INTERVAL == 0 and not console.is_terminal:
                console.print(f"step {done.step}/{done.total}: {description}")
            if time.perf_counter() - saved > SAVE_SECONDS:
                trainer.save(partial)
                saved = time.perf_counter()


def _write_weights(trainer: Trainer, out: Path, threads: int, device: str) -> None:
    """Writes the averaged weights, and beside them a JSON that says how they were trained."""
    model = trainer.averaged_model()
    save_checkpoint(out, model.state_dict(), model.config)
    notes = {
        "settings": asdict(trainer.settings),
        "config": asdict(model.config),
        "steps_done": trainer.steps_done,
        "seconds": round(trainer.seconds, 1),
        "threads": threads,
        "device": device,
        "torch": torch.__version__,
        "sha256": sha256(out),
        "machine": platform.processor() or platform.machine(),
        "loss": trainer.curve,
    }
    write_atomically(out.with_suffix(".json"), (json.dumps(notes, indent=1, allow_nan=False) + "\n").encode())
