"""Trains the toy world's model on a CPU: `memflow train`, or `python -m memflow_ops.model.train --out PATH`.

The schedule is counted in steps and every random number comes from the seed, so a run can be repeated. The model
predicts the clean chunk; the loss is that of the velocity, |x0 - target|^2 / max(sigma, 0.1)^2. Most steps run at half
resolution, where a step costs a quarter; the same weights then continue at full size.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from memflow_ops.model import checkpoints, text, world
from memflow_ops.model.sampler import shifted
from memflow_ops.model.teacher_forcing import (
    CHUNK_FRAMES,
    MemoryPlan,
    TeacherForcedAttention,
    plan_memory,
    relevance_loss,
)
from memflow_ops.model.transformer import CausalVideoModel, ModelConfig

TOY_CONFIG = ModelConfig(
    dim=64,
    ffn_dim=256,
    num_heads=2,
    num_layers=3,
    in_dim=5,
    out_dim=3,
    text_dim=text.TEXT_DIM,
    text_len=text.TEXT_LENGTH,
    patch_size=(1, 4, 4),
    prediction="x0",
)
CHUNKS = 8
"""Chunks per training clip."""
TOP_K = 4


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one resolution.

    shift: timestep shift (see sampler); more pixels need more noise to hide the same content.
    foreground: extra weight of a character's pixels; speeds up the start, then it would inflate the characters.
    """

    steps: int
    size: int
    batch: int
    shift: float
    foreground: float = 0.0


STAGES = (
    Stage(steps=500, size=16, batch=12, shift=4.0, foreground=3.0),
    Stage(steps=250, size=32, batch=6, shift=7.0, foreground=1.0),
    Stage(steps=1250, size=32, batch=6, shift=7.0),
)
TOTAL_STEPS = sum(stage.steps for stage in STAGES)


@dataclass(frozen=True)
class Settings:
    """What a run can be repeated from."""

    seed: int = 0
    stages: tuple[Stage, ...] = STAGES
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    context_noise: float = 0.3
    """Clean chunks get noise of up to this level (times u^2, u uniform): a stream's own past is never perfect."""
    relevance_weight: float = 0.1
    recached_share: float = 0.0
    """Share of the prompt switches at which the clean stream's last chunk already carries the new prompt, as when a
    stream re-caches. 0, because at this size it cannot be learned: with 0.5 all new characters took the hue of the one
    before, since a re-cached window looks like a character that stays. So the toy is streamed without re-caching."""
    dense_share: float = 0.3
    """Share of steps that attend to all of memory instead of the top k blocks."""


@dataclass(frozen=True)
class Batch:
    """One training step's clips as rows, R = clips * CHUNKS."""

    target: Tensor
    """(R, 3, CHUNK_FRAMES, size, size)"""
    who: Tensor
    """(R,)"""
    ids: Tensor
    """(R, 2) prompt of each chunk, as vocabulary indices"""
    clean_ids: Tensor
    """(R, 2) prompt that the clean stream carries: at a switch sometimes already the next one's"""
    usable: Tensor
    """(R,) bool, the clean stream carries the chunk's own prompt"""
    plan: MemoryPlan


def draw_batch(clips: int, size: int, settings: Settings, generator: torch.Generator) -> Batch:
    """Random clips with prompts and memory."""
    drawn = world.random_clips(clips, CHUNKS, generator, chunk_frames=CHUNK_FRAMES, size=size)
    ids = world.prompt_ids(drawn.who, drawn.place)  # (B, C, 2)
    following = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
    # A stream re-caches its local window under the new prompt when the prompt changes. Such chunks are never memory, so
    # a larger share would leave too few returns to learn from.
    recached = (ids != following).any(-1) & (torch.rand(clips, CHUNKS, generator=generator) < settings.recached_share)
    clean_ids = torch.where(recached[..., None], following, ids)
    target = drawn.frames.unflatten(2, (CHUNKS, CHUNK_FRAMES)).transpose(1, 2).flatten(0, 1)
    plan = plan_memory(drawn.who, recached, generator)
    return Batch(target, drawn.who.flatten(), ids.flatten(0, 1), clean_ids.flatten(0, 1), ~recached.flatten(), plan)


@dataclass(frozen=True)
class Losses:
    total: Tensor
    denoising: Tensor
    relevance: Tensor


def training_losses(
    model: CausalVideoModel, batch: Batch, stage: Stage, settings: Settings, generator: torch.Generator
) -> Losses:
    """The losses of one step; draws timesteps, noise and the kind of selection."""
    target, rows = batch.target, len(batch.target)

    def per_row(level: Tensor) -> Tensor:
        return level[:, None, None, None, None]

    def noise() -> Tensor:
        return torch.randn(target.shape, generator=generator)

    sigma = shifted(torch.rand(rows, generator=generator), stage.shift)
    noisy = (1 - per_row(sigma)) * target + per_row(sigma) * noise()
    context_level = settings.context_noise * torch.rand(rows, generator=generator) ** 2
    clean = target + per_row(context_level) * noise()

    dense, perturbed = torch.rand(2, generator=generator).tolist()
    attention = TeacherForcedAttention(
        batch.plan,
        CHUNKS,
        model.grid(stage.size, stage.size),
        model.config.head_dim,
        recached=~batch.usable,
        top_k=None if dense < settings.dense_share else TOP_K,
        selection_noise=0.5 if perturbed < 0.3 else 0.0,
        generator=generator,
    )
    encoded = model.encode_text(text.embed_ids(torch.cat([batch.clean_ids, batch.ids])))
    timesteps = torch.cat([torch.zeros(rows), 1000 * sigma])[:, None].expand(-1, CHUNK_FRAMES)
    condition = world.coordinates(CHUNK_FRAMES, stage.size, stage.size)
    x0 = model(torch.cat([clean, noisy]), timesteps, encoded, attention, condition)[rows:]

    weight = 1 / per_row(sigma.clamp(min=0.1)) ** 2
    if stage.foreground:
        mask = world.colour_mask(target.transpose(1, 2))[:, None]  # (R, 1, CHUNK_FRAMES, size, size)
        weight = weight * (1 + stage.foreground * mask)
    denoising = ((x0 - target) ** 2 * weight).mean()
    own_text = [(keys[rows:], values[rows:]) for keys, values in encoded]
    relevance = relevance_loss(attention.frame_means, own_text, batch.who, batch.usable)
    return Losses(denoising + settings.relevance_weight * relevance, denoising, relevance)


def learning_rate_factor(progress: float, step: int) -> float:
    """Warm-up over 50 steps, constant for the first half, then a cosine down to 1 %."""
    warm_up = min(1.0, (step + 1) / 50)
    return warm_up * (1.0 if progress < 0.5 else 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * (2 * progress - 1))))


class MovingAverage:
    """An exponential moving average of weights that forgets the beginning quickly."""

    def __init__(self, model: CausalVideoModel):
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: CausalVideoModel, step: int) -> None:
        decay = min(0.99, step / (step + 20))
        torch._foreach_lerp_(list(self.weights.values()), list(model.state_dict().values()), 1 - decay)


@dataclass(frozen=True)
class Progress:
    """What `train` reports after every step."""

    step: int
    total: int
    stage: Stage
    denoising: float
    relevance: float


def scaled_stages(stages: Sequence[Stage], steps: int) -> tuple[Stage, ...]:
    """The stages with their steps scaled to `steps` in all; rounding goes to the last stage."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    total = sum(stage.steps for stage in stages)
    scaled = [replace(stage, steps=stage.steps * steps // total) for stage in stages[:-1]]
    scaled.append(replace(stages[-1], steps=steps - sum(stage.steps for stage in scaled)))
    return tuple(stage for stage in scaled if stage.steps)


def run(
    settings: Settings, *, config: ModelConfig = TOY_CONFIG, report: Callable[[Progress], None] | None = None
) -> tuple[CausalVideoModel, list[dict[str, float]]]:
    """Trains from scratch; returns the averaged model in eval mode and the loss curve (a point every 50 steps).

    A KeyboardInterrupt ends training early: what has been learned so far is returned.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)  # the layers' own initialisation draws from the global generator
        model = CausalVideoModel(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, betas=(0.9, 0.98), fused=True
    )
    average = MovingAverage(model)
    total = sum(stage.steps for stage in settings.stages)
    curve: list[dict[str, float]] = []
    running: dict[str, float] = {}
    step = 0
    try:
        for stage in settings.stages:
            for _ in range(stage.steps):
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * learning_rate_factor(step / total, step)
                batch = draw_batch(stage.batch, stage.size, settings, generator)
                losses = training_losses(model, batch, stage, settings, generator)
                optimizer.zero_grad()
                losses.total.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                average.update(model, step)
                step += 1
                for name, value in (("denoising", losses.denoising), ("relevance", losses.relevance)):
                    running[name] = 0.98 * running.get(name, value.item()) + 0.02 * value.item()
                if step % 50 == 0 or step == total:
                    curve.append({"step": step, "size": stage.size} | {k: round(v, 5) for k, v in running.items()})
                if report is not None:
                    report(Progress(step, total, stage, running["denoising"], running["relevance"]))
    except KeyboardInterrupt:
        pass
    model.load_state_dict(average.weights)
    return model.eval(), curve


def train(out: Path, *, seed: int = 0, steps: int = TOTAL_STEPS, threads: int = 2) -> None:
    """Trains the toy world's model and writes its weights to `out`, with a JSON beside them.

    seed: of everything random. steps: in all; fewer shorten every stage alike. threads: CPU threads for torch.
    Ctrl-C stops early and still writes what there is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    torch.set_num_threads(threads)
    settings = Settings(seed=seed, stages=scaled_stages(STAGES, steps))
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with ProgressBar(*columns, console=console) as bar:
        task = bar.add_task("training", total=steps)

        def report(progress: Progress) -> None:
            size, loss = progress.stage.size, progress.denoising
            description = f"{size} x {size}, loss {loss:.4f}, retrieval {progress.relevance:.4f}"
            bar.update(task, completed=progress.step, description=description)
            if progress.step % 250 == 0 and not console.is_terminal:
                console.print(f"step {progress.step}/{progress.total}: {description}")

        model, curve = run(settings, report=report)
    seconds = time.perf_counter() - started
    checkpoints.save_checkpoint(out, model.state_dict(), model.config)
    notes = {
        "settings": asdict(settings),
        "config": asdict(model.config),
        "steps_done": curve[-1]["step"] if curve else 0,
        "seconds": round(seconds, 1),
        "threads": threads,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "loss": curve,
    }
    checkpoints.write_atomically(Path(out).with_suffix(".json"), (json.dumps(notes, indent=1) + "\n").encode())
    console.print(f"{out}: {seconds / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy world's model.")
    parser.add_argument("--out", type=Path, default=checkpoints.TOY_WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    train(arguments.out, seed=arguments.seed, steps=arguments.steps, threads=arguments.threads)


if __name__ == "__main__":
    main()
