"""The sampler's arithmetic against the formulas of flow matching and of the released few-step models."""

import pytest
import torch

from memflow_ops.model.streaming.sampler import FlowMatchSampler


def test_four_steps_at_shift_5_are_the_released_ones():
    sampler = FlowMatchSampler(4, 5.0)
    assert sampler.timesteps == pytest.approx([1000, 937.5, 833.3333333, 625])
    assert sampler.sigmas == pytest.approx([1, 0.9375, 0.8333333333, 0.625, 0])


def test_sigmas_lie_on_the_released_table():
    """Self-Forcing warps indices of sigma = 5 s / (1 + 4 s), s = linspace(1, 0, 1001)."""
    s = torch.linspace(1, 0, 1001, dtype=torch.float64)
    table = 5 * s / (1 + 4 * s)
    sampler = FlowMatchSampler(10, 5.0)
    assert sampler.sigmas == pytest.approx([table[100 * i].item() for i in range(11)])


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_sigmas_fall_from_1_to_0(steps):
    sampler = FlowMatchSampler(steps, 7.0)
    assert len(sampler.sigmas) == steps + 1
    assert sampler.sigmas[0] == 1 and sampler.sigmas[-1] == 0
    assert all(a > b for a, b in zip(sampler.sigmas, sampler.sigmas[1:], strict=False))


def noisy(sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    return x0, noise, (1 - sigma) * x0 + sigma * noise


def test_denoised_inverts_both_predictions():
    x0, noise, x = noisy(0.8)
    velocity = FlowMatchSampler(4, 5.0, prediction="velocity").denoised(x, noise - x0, 0.8)
    torch.testing.assert_close(velocity, x0)
    torch.testing.assert_close(FlowMatchSampler(4, 5.0, prediction="x0").denoised(x, x0, 0.8), x0)


def test_euler_step_keeps_the_noise():
    """With a perfect x0 the next sample is the same noise at the next level."""
    sampler = FlowMatchSampler(4, 5.0)
    for i in range(4):
        x0, noise, x = noisy(sampler.sigmas[i])
        following = sampler.sigmas[i + 1]
        torch.testing.assert_close(sampler.step(x, x0, i), (1 - following) * x0 + following * noise)


def test_stochastic_step_renews_the_noise():
    sampler = FlowMatchSampler(4, 5.0, stochastic=True)
    x0, _, x = noisy(1.0)
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)
    torch.testing.assert_close(sampler.step(x, x0, 0, fresh), (1 - 0.9375) * x0 + 0.9375 * fresh)
    with pytest.raises(ValueError, match="step 0 of a stochastic sampler needs fresh noise"):
        sampler.step(x, x0, 0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_last_step_returns_x0(stochastic):
    sampler = FlowMatchSampler(4, 5.0, stochastic)
    x0, _, x = noisy(0.625)
    assert torch.equal(sampler.step(x, x0, 3), x0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 5.0), "steps"), ((4, 0.0), "shift"), ((4, 5.0, False, "noise"), "prediction")],
    ids=["steps", "shift", "prediction"],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchSampler(*arguments)
