"""What a training run is made of: the model's size, the stages, and the settings that a run can be repeated from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memflow_ops.model.toy.language import TEXT_DIM, TEXT_LENGTH
from memflow_ops.model.wan.transformer import ModelConfig

TOY_CONFIG = ModelConfig(
    dim=96,
    ffn_dim=384,
    num_heads=3,
    num_layers=3,
    in_dim=5,
    out_dim=3,
    text_dim=TEXT_DIM,
    text_len=TEXT_LENGTH,
    patch_size=(1, 4, 4),
    prediction="x0",
)
"""The size of the toy world's model."""
HELD_OUT_SEED = 10_000
"""Seeds below this one are for training and tuning. The others are held out for `memflow toy evaluate`."""


@dataclass(frozen=True)
class TrainingStage:
    """A stretch of training at one resolution."""

    steps: int
    size: int
    """Pixels per side of a frame."""
    batch: int
    """Clips per step."""
    shift: float
    """Timestep shift of the sampler. More pixels need more noise to hide the same content."""
    foreground: float = 0.0
    """Extra weight of a character's pixels. It speeds up the start; kept longer, it would inflate the characters."""


STAGES = (
    TrainingStage(steps=400, size=16, batch=8, shift=4.0, foreground=3.0),
    TrainingStage(steps=1000, size=32, batch=4, shift=7.0, foreground=2.0),
    TrainingStage(steps=2000, size=32, batch=4, shift=7.0),
)
"""The full schedule. Half resolution comes first: a step costs less there, and memory is learned sooner."""
TOTAL_STEPS = sum(stage.steps for stage in STAGES)


@dataclass(frozen=True)
class TrainingSettings:
    """Everything that a training run can be repeated from. A held-out seed raises a ValueError."""

    seed: int = 0
    stages: tuple[TrainingStage, ...] = STAGES
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    context_noise: float = 0.3
    """Clean chunks get noise of up to this level (times u^2, u uniform): a stream's own past is never perfect."""
    relevance_weight: float = 0.1
    """Weight of the auxiliary loss that teaches the prompt's words to find frames; see `relevance_loss`."""
    dense_share: float = 0.3
    """Share of the steps that attend to all of memory instead of the top-k blocks."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < HELD_OUT_SEED:
            raise ValueError(
                f"seeds from {HELD_OUT_SEED} on are held out for evaluation: train with 0 to {HELD_OUT_SEED - 1}, "
                f"got {self.seed}"
            )


def scaled_stages(stages: Sequence[TrainingStage], steps: int) -> tuple[TrainingStage, ...]:
    """The stages, shortened or lengthened alike to `steps` in all. The last stage takes what rounding leaves."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    total = sum(stage.steps for stage in stages)
    scaled = [replace(stage, steps=stage.steps * steps // total) for stage in stages[:-1]]
    scaled.append(replace(stages[-1], steps=steps - sum(stage.steps for stage in scaled)))
    return tuple(stage for stage in scaled if stage.steps)


def learning_rate_factor(progress: float, step: int) -> float:
    """The factor on the learning rate: a warm-up over 50 steps, then constant, and from half-way a cosine down to 1 %.

    `progress` is the share of the run that is done, 0 to 1.
    """
    warm_up = min(1.0, (step + 1) / 50)
    return warm_up * (1.0 if progress < 0.5 else 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * (2 * progress - 1))))
