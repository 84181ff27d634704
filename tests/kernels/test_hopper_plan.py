"""Which launches the kernel for Hopper takes, where the table says so, and that it says so nowhere."""

import pytest
import torch

pytest.importorskip("triton")

from memflow_ops.geometry import Geometry, Int8Bank
from memflow_ops.kernels import configs
from memflow_ops.kernels.attention.plan import plan_attend

HALF, TOKENS = torch.bfloat16, 140


def meta(*shape, dtype=HALF):
    return torch.empty(*shape, dtype=dtype, device="meta")


def kernels(
    *, window=False, bank=False, dtype=HALF, dim=128, queries=300, block=64, group=100, keys=500, capability=90,
    resumed=False, int8=False, moved=0, out_dtype=None, **more,
):  # fmt: skip
    """The names of the kernels that plan_attend launches."""
    q, k, pool = meta(1, queries, 4, dim, dtype=dtype), meta(1, keys, 2, dim + moved), meta(1, 5 * TOKENS, 2, dim)
    k, pool = k.to(dtype)[..., :dim], pool.to(torch.int8 if int8 else dtype)
    scales = None
    if int8:
        blocks = 5 * -(-TOKENS // block)
        scales = Int8Bank(meta(1, blocks, 2, dim), meta(1, blocks, 2, dim), meta(1, 5 * TOKENS, 2))
    geometry = Geometry(block, TOKENS, group, 0.1, int8=scales, **more)
    indices = meta(1, 4, geometry.query_groups(queries), 6, dtype=torch.int32)
    resume = (q, meta(1, 4, queries, dtype=torch.float32)) if resumed else None
    parts = [k if window else None] * 2 + [pool if bank else None] * 2 + [indices if bank else None]
    launches, *_ = plan_attend(q, *parts, geometry, resume, capability=capability, out_dtype=out_dtype)
    return [launch.kernel.fn.__name__ for launch in launches]


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setitem(configs.FORWARD, 90, "gluon")


@pytest.mark.parametrize("part", ["window", "bank"])
def test_the_table_takes_triton(part):
    assert kernels(**{part: True}) == ["attend_kernel"]


@pytest.mark.parametrize(
    "options",
    [
        dict(window=True),
        dict(window=True, dim=64, dtype=torch.float16),
        dict(bank=True),
        dict(bank=True, resumed=True, dim=64),
        dict(bank=True, block=128),
        dict(bank=True, causal=True),
        dict(bank=True, memory_slots=meta(1, 3, dtype=torch.int32)),
        dict(window=True, queries=65),
    ],
    ids=str,
)
def test_what_it_takes(chosen, options):
    assert kernels(**options) == ["hopper_attend_kernel"]


@pytest.mark.parametrize(
    "options",
    [
        dict(window=True, bank=True),
        dict(window=True, causal=True),
        dict(window=True, seqused_k=meta(1, dtype=torch.int32)),
        dict(window=True, window_slots=meta(1, 2, dtype=torch.int32)),
        dict(window=True, dtype=torch.float32),
        dict(window=True, dim=96),
        dict(window=True, moved=4),
        dict(window=True, queries=64),
        dict(window=True, capability=80),
        dict(window=True, capability=100),
        dict(window=True, out_dtype=torch.float32),
        dict(bank=True, block=32),
        dict(bank=True, block=96),
        dict(bank=True, group=64),
        dict(bank=True, int8=True),
    ],
    ids=str,
)
def test_what_it_leaves_to_triton(chosen, options):
    assert kernels(**options) == ["attend_kernel"]


def test_rows_with_blocks_of_their_own(chosen):
    assert kernels(bank=True, group=1) == ["union_kernel", "attend_kernel"]


def test_tiles_are_as_long_as_blocks_allow(chosen):
    assert configs.hopper_config(90, HALF, 64, None) == (128, 4)
    assert configs.hopper_config(90, HALF, 64, 64) == (64, 8)
    assert configs.hopper_config(90, HALF, 64, 256) == (128, 4)
    assert configs.hopper_config(90, HALF, 128, 192) == (64, 4)
    assert configs.hopper_config(90, HALF, 64, 100) is None
