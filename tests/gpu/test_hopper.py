"""The forward kernel in Gluon on a Hopper GPU, whether or not the table takes it: as exact as the one in Triton."""

import pytest
import torch
from attention_cases import Case, assert_within_tolerance, dense_attention
from attention_on_gpu import on_gpu, run_with_indices

pytest.importorskip("triton")

from memflow_ops.kernels import configs
from memflow_ops.kernels.attention import hopper_forward, plan

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.alone,
]


@pytest.fixture
def launched(monkeypatch):
    """The kernels that attention has launched since, in order. The table takes the kernel in Gluon."""
    names = []

    def run_all(launches):
        names.extend(launch.kernel for launch in launches)
        for launch in launches:
            launch.run()

    monkeypatch.setitem(configs.FORWARD, 90, "gluon")
    monkeypatch.setattr(plan, "run_all", run_all)
    return names


def made(dtype, *, head_dim, queries, dense, frames, heads=(4, 2), group=128, block_size=64, top_k=9):
    """A case in two batch elements with a slot table and different numbers of frames; no window with `dense` 0."""
    frame_tokens = 2 * block_size + 22
    make = lambda tokens, count: torch.randn(2, tokens, count, head_dim).to(dtype)  # noqa: E731
    slots = torch.stack([torch.randperm(frames + 2)[:frames] for _ in range(2)]).int() if frames else None
    options = dict(
        top_k=top_k,
        block_size=block_size,
        frame_tokens=frame_tokens,
        query_group=group,
        memory_slots=slots,
        memory_frames=torch.tensor([frames, frames - 1], dtype=torch.int32) if frames else None,
        softmax_scale=None,
    )
    pool = (frames + 2) * frame_tokens if frames else 0
    memory = [make(pool, heads[1]) for _ in range(2)]
    window = [make(dense, heads[1]) for _ in range(2)]
    return Case(make(queries, heads[0]), *window, *memory, options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        dict(head_dim=128, queries=300, dense=0, frames=6),
        dict(head_dim=64, queries=260, dense=0, frames=6, block_size=128, group=80, heads=(3, 1)),
        dict(head_dim=128, queries=1200, dense=0, frames=20, top_k=24, heads=(4, 4)),
    ],
    ids="D {0[head_dim]}, {0[queries]} queries".format,
)
def test_a_bank(dtype, options, launched):
    low = made(dtype, **options)
    out, lse, indices = (x.cpu() for x in run_with_indices(on_gpu(low)))
    assert hopper_forward.hopper_attend_kernel in launched
    exact, exact_lse = dense_attention(low.to(torch.float64), indices)
    assert_within_tolerance(out, dense_attention(low, indices)[0], exact, f"{dtype}, {options}")
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim, dense", [(128, 1), (128, 333), (64, 1040), (128, 14040)])
def test_a_window(dtype, head_dim, dense, launched):
    low = made(dtype, head_dim=head_dim, queries=300, dense=dense, frames=0)
    out, lse, _ = (x.cpu() for x in run_with_indices(on_gpu(low), dense_backend="own"))
    assert launched == [hopper_forward.hopper_attend_kernel]
    exact, exact_lse = dense_attention(low.to(torch.float64), None)
    assert_within_tolerance(out, dense_attention(low, None)[0], exact, f"{dtype}, {dense} keys")
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


def test_a_thousand_launches_end_alike(launched):
    """A slot that is released too early, or a wait for the wrong phase, shows where programs overlap by chance."""
    low = on_gpu(made(torch.bfloat16, head_dim=128, queries=4680, dense=0, frames=20, top_k=24, heads=(12, 12)))
    first, *_ = run_with_indices(low)
    for _ in range(1000):
        again, *_ = run_with_indices(low)
        assert torch.equal(again, first)
