"""The flow-matching sampler, which turns noise into a chunk in any number of steps.

Noise level sigma runs from 1 (pure noise) to 0 (clean); a noisy chunk is x = (1 - sigma) x0 + sigma noise, its
velocity noise - x0, and the model's timestep 1000 sigma. `shift` spends more steps at high noise: sigma = shift s /
(1 + (shift - 1) s) for s falling evenly from 1. With 4 steps and shift 5 that gives the timesteps 1000, 937.5, 833.33,
625 of the released few-step models (Self-Forcing, LongLive, MemFlow).
"""

from typing import Literal

import torch
from torch import Tensor

MOST_STEPS = 1000


def shifted(s: Tensor, shift: float) -> Tensor:
    """Shifts evenly spread noise levels s, from 0 to 1. 0 and 1 stay as they are."""
    return shift * s / (1 + (shift - 1) * s)


class FlowMatchSampler:
    """The noise levels of a chunk's passes, and the step from one to the next.

    steps: passes of the model per chunk, without the clean pass.
    stochastic: every step renews the noise (few-step distilled models); otherwise Euler along the velocity.
    prediction: what the model's output means; see `ModelConfig`.
    """

    def __init__(
        self, steps: int, shift: float, stochastic: bool = False, prediction: Literal["velocity", "x0"] = "velocity"
    ):
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}, as many as the model has timesteps, got {steps}")
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        if prediction not in ("velocity", "x0"):
            raise ValueError(f"prediction must be 'velocity' or 'x0', got {prediction!r}")
        self.steps, self.shift, self.stochastic, self.prediction = steps, shift, stochastic, prediction
        levels = shifted(1 - torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps, shift)
        self.sigmas: list[float] = levels.tolist()
        """steps + 1 noise levels, from 1.0 down to 0.0; step i goes from sigmas[i] to sigmas[i + 1]."""

    @property
    def timesteps(self) -> list[float]:
        """The model's timestep of each pass, 1000 sigma; `steps` of them."""
        return [1000 * sigma for sigma in self.sigmas[:-1]]

    def denoised(self, x: Tensor, y: Tensor, sigma: float) -> Tensor:
        """The clean chunk that the model's output y implies for the noisy chunk x at noise level sigma; like x."""
        return y if self.prediction == "x0" else x - sigma * y

    def step(self, x: Tensor, x0: Tensor, i: int, noise: Tensor | None = None) -> Tensor:
        """From x at sigmas[i] and the denoised x0 to x at sigmas[i + 1]. The last step returns x0 itself.

        noise: fresh noise, like x. A stochastic sampler needs it in every step except the last.
        """
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        if following == 0:
            return x0
        if self.stochastic:
            if noise is None:
                raise ValueError(f"step {i} of a stochastic sampler needs fresh noise")
            return (1 - following) * x0 + following * noise
        return x + (following - sigma) / sigma * (x - x0)  # the velocity is (x - x0) / sigma
