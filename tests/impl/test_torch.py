"""The torch implementation: it works in steps, and holds no dense mask."""

import pytest
import torch
from attention_cases import small_case

import memflow_ops
from memflow_ops.bench.harness.ceilings import peak_bytes
from memflow_ops.impl.torch import attention, backward


@pytest.mark.parametrize("of_lse", [True, False])
@pytest.mark.parametrize("group", [1, 3, None])
def test_many_small_steps_are_one_large_one(group, of_lse, monkeypatch):
    """Every loop takes several steps here; one batch element has no valid frame.

    Without a gradient of the LSE the backward of the window is torch's own.
    """
    case = small_case(query_group=group, memory_frames=torch.tensor([0, 2], dtype=torch.int32))
    leaves = case.requires_grad()
    weight = torch.randn_like(case.q)

    def run(impl):
        out, lse = case.run(impl)
        loss = (out * weight).sum() + (lse.sin().sum() if of_lse else 0)
        return out, lse, *torch.autograd.grad(loss, leaves)

    expected = run("reference")
    smaller = {"PLANNED_KEYS": 64, "SCORE_ELEMENTS": 64}
    for module, sizes in (
        (attention, {"_GATHER_BYTES": 4096, **smaller}),
        (backward, {"_TILE_SCORES": 4, "_TILE_ROWS": 2, **smaller}),
    ):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    for ours, theirs in zip(run("torch"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_torch_holds_little_more_than_what_it_gathers():
    """At most three times the gathered keys and values; scores or a mask of the bank would be 20 times as much."""
    queries, frames, frame, size, top_k = 256, 200, 100, 16, 8
    q = torch.randn(1, queries, 4, 64)
    memory = torch.randn(1, frames * frame, 4, 64)
    descriptors = memflow_ops.describe_blocks(memory, size, frame)
    k = q[:, :16]
    options = dict(memory_descriptors=descriptors, top_k=top_k, block_size=size, frame_tokens=frame, query_group=32)
    peak = peak_bytes(lambda: memflow_ops.memory_attention(q, k, k, memory, memory, **options), q.device)
    gathered = 2 * queries // 32 * 4 * top_k * size * 64 * 4
    assert peak <= 3 * gathered, f"held {peak / 2**20:.1f} MiB for {gathered / 2**20:.1f} MiB gathered"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_other_devices_compute_is_what_a_cpu_computes(dtype, bias):
    """Also for queries whose scores are all -inf, and for those with NaN."""
    q, k, v = (torch.randn(2, 3, n, 8).to(dtype) for n in (9, 20, 20))
    q[1, 1, 4, 2] = torch.nan
    mask = torch.zeros(2, 3, 1, 20, dtype=dtype)
    mask[..., 7:] = -torch.inf
    mask[0, 1] = -torch.inf
    got = attention._attention_in_steps(q, k, v, 0.3, mask if bias else None)
    expected = attention.cpu_attention(q, k, v, 0.3, mask if bias else None)
    assert (got[0][0, 1] == 0).all() == bias and got[1][1, 1, 4].isnan()
    limit = 1e-12 if dtype == torch.float64 else 0.02
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, atol=limit, rtol=limit)
