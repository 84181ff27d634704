"""A LoRA tuned through a rollout of several chunks with memory."""

import pytest
import torch
from lora_rollout import loss_of, model_with_lora

from memflow_ops.ops import registration


def gradients(impl: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model, lora = model_with_lora(dtype)
    found = torch.autograd.grad(loss_of(model, impl), list(lora.values()))
    return dict(zip(lora, found, strict=True))


def test_gradients_through_the_memory_are_the_references():
    expected = gradients("reference", torch.float64)
    assert len(expected) == 2 * 4 * 2 and all(x.abs().max() > 1e-6 for x in expected.values())
    for name, found in gradients("torch", torch.float64).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_they_flow_through_the_bank(monkeypatch):
    """The bank's keys carry gradients of their own: without them the LoRA's would be others."""
    whole = gradients("torch", torch.float64)
    attend = registration.memory_attention
    detached = lambda x: None if x is None else x.detach()  # noqa: E731
    monkeypatch.setattr(
        registration,
        "memory_attention",
        lambda q, k, v, mk, mv, *rest: attend(q, k, v, detached(mk), detached(mv), *rest),
    )
    without = gradients("torch", torch.float64)
    name = next(name for name in whole if ".0." in name and ".k." in name)
    assert (whole[name] - without[name]).abs().max() > 1e-3 * whole[name].abs().max()


@pytest.mark.parametrize("impl", ["torch"])
def test_the_loss_falls(impl):
    model, lora = model_with_lora(torch.float32)
    frozen = {name: x.clone() for name, x in model.named_parameters() if name not in lora}
    optimizer = torch.optim.Adam(lora.values(), lr=3e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = loss_of(model, impl)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    assert all(torch.equal(x, frozen[name]) for name, x in model.named_parameters() if name in frozen)
