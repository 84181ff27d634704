"""Trains the toy world's model on a CPU: `memflow toy train`, or `python -m memflow_ops.model.toy.train --out PATH`.

The schedule is counted in steps and every random number comes from the seed, so a run can be repeated. The model
predicts the clean chunk; the loss is that of the velocity, |x0 - target|^2 / max(sigma, 0.1)^2. The first steps run at
half resolution, where a step costs less and memory is learned sooner; the same weights then continue at full size.
"""

import argparse
import io
import json
import math
import pickle
import platform
import time
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memflow_ops import files
from memflow_ops.model.checkpoints import native
from memflow_ops.model.streaming.conditions import pixel_coordinates
from memflow_ops.model.streaming.sampler import shifted
from memflow_ops.model.toy import checkpoint, judge, language, world
from memflow_ops.model.toy.language import NOBODY
from memflow_ops.model.toy.teacher_forcing import (
    CHUNK_FRAMES,
    TeacherForcedAttention,
    TrainingMemory,
    draw_training_memory,
    relevance_loss,
)
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

TOY_CONFIG = ModelConfig(
    dim=96,
    ffn_dim=384,
    num_heads=3,
    num_layers=3,
    in_dim=5,
    out_dim=3,
    text_dim=language.TEXT_DIM,
    text_len=language.TEXT_LENGTH,
    patch_size=(1, 4, 4),
    prediction="x0",
)
CHUNKS = 8
"""Chunks per training clip."""
TOP_K = 8
HELD_OUT_SEED = 10_000
"""Seeds below are for training and tuning; from here on they are held out for `memflow toy evaluate`."""


@dataclass(frozen=True)
class TrainingStage:
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
    TrainingStage(steps=400, size=16, batch=8, shift=4.0, foreground=3.0),
    TrainingStage(steps=1000, size=32, batch=4, shift=7.0, foreground=2.0),
    TrainingStage(steps=2000, size=32, batch=4, shift=7.0),
)
TOTAL_STEPS = sum(stage.steps for stage in STAGES)


@dataclass(frozen=True)
class TrainingSettings:
    """What a run can be repeated from."""

    seed: int = 0
    stages: tuple[TrainingStage, ...] = STAGES
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    context_noise: float = 0.3
    """Clean chunks get noise of up to this level (times u^2, u uniform): a stream's own past is never perfect."""
    relevance_weight: float = 0.1
    """Of the auxiliary loss that teaches the prompt's words to find frames; see `relevance_loss`."""
    dense_share: float = 0.3
    """Share of steps that attend to all of memory instead of the top k blocks."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < HELD_OUT_SEED:
            raise ValueError(
                f"seeds from {HELD_OUT_SEED} on are held out for evaluation: train with 0 to {HELD_OUT_SEED - 1}, "
                f"got {self.seed}"
            )


@dataclass(frozen=True)
class TrainingBatch:
    """One training step's clips as rows, R = clips * CHUNKS."""

    target: Tensor
    """(R, 3, CHUNK_FRAMES, size, size)"""
    ids: Tensor
    """(R, 3) what each chunk's prompt says, for `text.embed_ids`"""
    plan: TrainingMemory


def draw_batch(clips: int, size: int, generator: torch.Generator) -> TrainingBatch:
    """Random clips with prompts and memory."""
    drawn = world.random_clips(clips, CHUNKS, generator, chunk_frames=CHUNK_FRAMES, size=size)
    target = drawn.frames.unflatten(2, (CHUNKS, CHUNK_FRAMES)).transpose(1, 2).flatten(0, 1)
    shows = (drawn.ids[..., :2, None] == torch.arange(NOBODY)).any(-2)  # (B, C, characters)
    return TrainingBatch(target, drawn.ids.flatten(0, 1), draw_training_memory(shows, generator))


@dataclass(frozen=True)
class TrainingLosses:
    total: Tensor
    denoising: Tensor
    relevance: Tensor


def training_losses(
    model: CausalVideoModel,
    batch: TrainingBatch,
    stage: TrainingStage,
    settings: TrainingSettings,
    generator: torch.Generator,
) -> TrainingLosses:
    """The losses of one step; draws timesteps, noise and the kind of selection."""
    device = model.patch_embedding.weight.device
    target, rows = batch.target.to(device), len(batch.target)

    def per_row(level: Tensor) -> Tensor:
        return level[:, None, None, None, None]

    def noise() -> Tensor:
        return torch.randn(target.shape, generator=generator).to(device)

    sigma = shifted(torch.rand(rows, generator=generator), stage.shift).to(device)
    noisy = (1 - per_row(sigma)) * target + per_row(sigma) * noise()
    context_level = settings.context_noise * torch.rand(rows, generator=generator).to(device) ** 2
    clean = target + per_row(context_level) * noise()

    dense, perturbed = torch.rand(2, generator=generator).tolist()
    attention = TeacherForcedAttention(
        batch.plan.to(device),
        CHUNKS,
        model.grid(stage.size, stage.size),
        model.config.head_dim,
        top_k=None if dense < settings.dense_share else TOP_K,
        selection_noise=0.5 if perturbed < 0.3 else 0.0,
        generator=generator,
    )
    encoded = model.encode_text(language.embed_ids(batch.ids).to(device).repeat(2, 1, 1))
    timesteps = torch.cat([torch.zeros_like(sigma), 1000 * sigma])[:, None].expand(-1, CHUNK_FRAMES)
    condition = pixel_coordinates(CHUNK_FRAMES, stage.size, stage.size).to(device)
    x0 = model(torch.cat([clean, noisy]), timesteps, encoded, attention, condition)[rows:]

    weight = 1 / per_row(sigma.clamp(min=0.1)) ** 2
    if stage.foreground:
        mask = judge.colour_mask(target.transpose(1, 2))[:, None]  # (R, 1, CHUNK_FRAMES, size, size)
        weight = weight * (1 + stage.foreground * mask)
    denoising = ((x0 - target) ** 2 * weight).mean()
    own_text = [(keys[rows:], values[rows:]) for keys, values in encoded]
    relevance = relevance_loss(attention.frame_means, own_text, batch.ids.to(device))
    return TrainingLosses(denoising + settings.relevance_weight * relevance, denoising, relevance)


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
class TrainingProgress:
    """What `train` reports after every step."""

    step: int
    total: int
    stage: TrainingStage
    denoising: float
    relevance: float


def scaled_stages(stages: Sequence[TrainingStage], steps: int) -> tuple[TrainingStage, ...]:
    """The stages with their steps scaled to `steps` in all; rounding goes to the last stage."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    total = sum(stage.steps for stage in stages)
    scaled = [replace(stage, steps=stage.steps * steps // total) for stage in stages[:-1]]
    scaled.append(replace(stages[-1], steps=steps - sum(stage.steps for stage in scaled)))
    return tuple(stage for stage in scaled if stage.steps)


class Trainer:
    """A training run that can be stopped after any step and continued bit for bit, in another process if need be."""

    def __init__(
        self, settings: TrainingSettings, config: ModelConfig = TOY_CONFIG, device: str | torch.device = "cpu"
    ):
        self.settings, self.device = settings, torch.device(device)
        self.total = sum(stage.steps for stage in settings.stages)
        self.generator = torch.Generator().manual_seed(settings.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the layers' own initialisation draws from the global generator
            self.model = CausalVideoModel(config).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.average = MovingAverage(self.model)
        self.steps_done = 0
        self.seconds = 0.0
        self.running: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []
        """The smoothed losses, a point every 50 steps."""

    @property
    def stage(self) -> TrainingStage:
        """The stage of the coming step; the last one at the end."""
        left = self.steps_done
        for stage in self.settings.stages:
            if left < stage.steps:
                return stage
            left -= stage.steps
        return self.settings.stages[-1]

    def step(self) -> TrainingProgress:
        """One step of the optimiser."""
        started, stage = time.perf_counter(), self.stage
        for group in self.optimizer.param_groups:
            factor = learning_rate_factor(self.steps_done / self.total, self.steps_done)
            group["lr"] = self.settings.learning_rate * factor
        batch = draw_batch(stage.batch, stage.size, self.generator)
        losses = training_losses(self.model, batch, stage, self.settings, self.generator)
        if not losses.total.isfinite():
            raise ValueError(f"the loss of step {self.steps_done + 1} is not finite; begin anew with --restart")
        self.optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update(self.model, self.steps_done)
        self.steps_done += 1
        for name, value in (("denoising", losses.denoising.item()), ("relevance", losses.relevance.item())):
            self.running[name] = 0.98 * self.running.get(name, value) + 0.02 * value
        if self.steps_done % 50 == 0 or self.steps_done == self.total:
            point = {"step": self.steps_done, "size": stage.size}
            self.curve.append(point | {name: round(value, 5) for name, value in self.running.items()})
        self.seconds += time.perf_counter() - started
        return TrainingProgress(
            self.steps_done, self.total, stage, self.running["denoising"], self.running["relevance"]
        )

    def averaged_model(self) -> CausalVideoModel:
        """What has been learned so far, in eval mode: a model of its own with the averaged weights."""
        model = CausalVideoModel(self.model.config).to(self.device)
        model.load_state_dict(self.average.weights)
        return model.eval()

    def save(self, path: Path) -> None:
        """Writes everything that `load` needs, atomically."""
        content = io.BytesIO()
        state = {
            "settings": json.dumps(asdict(self.settings)),
            "config": json.dumps(asdict(self.model.config)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights,
            "generator": self.generator.get_state(),
            "steps_done": self.steps_done,
            "seconds": self.seconds,
            "running": self.running,
            "curve": self.curve,
            "machine": self.machine(),
        }
        torch.save(state, content)
        files.write_atomically(path, content.getvalue())

    def machine(self) -> str:
        """What rounding depends on beside the settings."""
        return f"{self.device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def load(self, path: Path) -> str:
        """Continues where `save` left; a ValueError when that was another run, by settings or model.

        Returns the machine that it was saved on, see `machine`: on another it continues, but not bit for bit.
        """
        try:
            if zipfile.ZipFile(path).testzip() is not None:  # torch does not look at checksums
                raise ValueError("a checksum is wrong")
            state = torch.load(path, map_location=self.device, weights_only=True)
            settings, config = json.loads(state["settings"]), json.loads(state["config"])
        except (pickle.UnpicklingError, zipfile.BadZipFile, *_UNUSABLE, EOFError, OSError) as error:
            raise ValueError(f"{path} is no training state of ours; delete it, or begin anew with --restart") from error
        for name, then, now in (
            ("settings", settings, json.loads(json.dumps(asdict(self.settings)))),
            ("model", config, json.loads(json.dumps(asdict(self.model.config)))),
        ):
            if then != now:
                differing = [key for key in now if then.get(key) != now[key]]
                raise ValueError(
                    f"{path} was written by a run with another {name}: {', '.join(differing)} differ; "
                    "give the same options, or begin anew with --restart"
                )
        try:
            self._restore(state)
            return str(state["machine"])
        except _UNUSABLE as error:
            raise ValueError(f"{path} is damaged; delete it, or begin anew with --restart") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.weights = state["average"]
        self.generator.set_state(state["generator"].cpu())
        self.steps_done, self.seconds = state["steps_done"], state["seconds"]
        self.running, self.curve = state["running"], state["curve"]


_UNUSABLE = (RuntimeError, LookupError, TypeError, ValueError, AttributeError)
"""What the content of a state raises that was not written by `Trainer.save`."""
SAVE_SECONDS = 60.0
"""Time between two savings of the training state."""


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

    seed: of everything random, below HELD_OUT_SEED. steps: in all; fewer shorten every stage alike. threads: CPU
    threads for torch.

    The state of an unfinished run lies in `out` with the suffix .partial, written every minute, on Ctrl-C and SIGTERM;
    the same command continues it bit for bit. restart: begin anew instead. KeyboardInterrupt passes through.
    ValueError when the unfinished run had other settings.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    from memflow_ops.model.stories.interrupts import Interrupts

    out = Path(out)
    files.check_target(out, ".safetensors")
    torch.set_num_threads(threads)
    partial = out.with_suffix(".partial")
    trainer = Trainer(TrainingSettings(seed=seed, stages=scaled_stages(STAGES, steps)), device=device)
    console = Console()
    if partial.exists() and not restart:
        machine = trainer.load(partial)
        console.print(f"continuing after step {trainer.steps_done} of {trainer.total} ({partial})")
        if machine != trainer.machine():
            console.print(f"not bit for bit: it was begun on {machine}, this is {trainer.machine()}")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    saved = time.perf_counter()
    try:
        # A signal waits for the end of the step: a state saved in the middle of one could not be continued exactly.
        with Interrupts() as interrupts, ProgressBar(*columns, console=console) as bar:
            task = bar.add_task("training", total=trainer.total, completed=trainer.steps_done)
            while trainer.steps_done < trainer.total:
                progress = trainer.step()
                if interrupts.waiting:
                    raise KeyboardInterrupt
                size, loss = progress.stage.size, progress.denoising
                description = f"{size} x {size}, loss {loss:.4f}, retrieval {progress.relevance:.4f}"
                bar.update(task, completed=progress.step, description=description)
                if progress.step % 250 == 0 and not console.is_terminal:
                    console.print(f"step {progress.step}/{progress.total}: {description}")
                if time.perf_counter() - saved > SAVE_SECONDS:
                    trainer.save(partial)
                    saved = time.perf_counter()
    except KeyboardInterrupt:
        trainer.save(partial)
        console.print(f"stopped after step {trainer.steps_done}; the same command continues from {partial}")
        raise
    model = trainer.averaged_model()
    native.save_checkpoint(out, model.state_dict(), model.config)
    notes = {
        "settings": asdict(trainer.settings),
        "config": asdict(model.config),
        "steps_done": trainer.steps_done,
        "seconds": round(trainer.seconds, 1),
        "threads": threads,
        "device": device,
        "torch": torch.__version__,
        "sha256": files.sha256(out),
        "machine": platform.processor() or platform.machine(),
        "loss": trainer.curve,
    }
    files.write_atomically(out.with_suffix(".json"), (json.dumps(notes, indent=1, allow_nan=False) + "\n").encode())
    partial.unlink(missing_ok=True)
    console.print(f"{out}: {trainer.seconds / 60:.1f} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the toy world's model.")
    parser.add_argument("--out", type=Path, default=checkpoint.TOY_WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TOTAL_STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--restart", action="store_true", help="begin anew instead of continuing an unfinished run")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
