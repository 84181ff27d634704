"""The machine code of the kernels, at the sizes of Wan 2.1 1.3B, for GPUs that need not be there."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted functions cannot be compiled", allow_module_level=True)

from memflow_ops.kernels.aot import SHARED_MEMORY_LIMIT, compile_launch
from memflow_ops.kernels.attend import plan_attend
from memflow_ops.kernels.describe import plan_block_means
from memflow_ops.kernels.select import plan_select

QUERIES, WINDOW, FRAMES, FRAME_TOKENS, BLOCKS_PER_FRAME = 4680, 14040, 64, 1560, 25
TENSOR_CORE_OPCODE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

capabilities = pytest.mark.parametrize("capability", [80, 90, 100], ids="sm_{}".format)


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory):
    """Compile for real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def attend_launch(dtype=torch.bfloat16, heads=(12, 12), head_dim=128, group=128, dense=True, bank=True, resume=True):
    q = meta(1, QUERIES, heads[0], head_dim, dtype=dtype)
    k = meta(1, WINDOW, heads[1], head_dim, dtype=dtype) if dense else None
    memory = meta(1, FRAMES * FRAME_TOKENS, heads[1], head_dim, dtype=dtype) if bank else None
    indices = meta(1, heads[0], -(-QUERIES // group), 24, dtype=torch.int32) if bank else None
    launch, *_ = plan_attend(
        q, k, k, memory, memory, indices, block_size=64, frame_tokens=FRAME_TOKENS, query_group=group,
        softmax_scale=head_dim**-0.5, memory_slots=meta(1, FRAMES, dtype=torch.int32) if bank else None,
        resume_out=q if resume else None,
        resume_lse=meta(1, heads[0], QUERIES, dtype=torch.float32) if resume else None,
    )  # fmt: skip
    return launch


def select_launches(dtype=torch.bfloat16, heads=(12, 12), head_dim=128, group=128, top_k=24):
    descriptors = meta(1, FRAMES * BLOCKS_PER_FRAME, heads[1], head_dim, dtype=dtype)
    q, valid, slots = meta(1, QUERIES, heads[0], head_dim, dtype=dtype), meta(1), meta(1, FRAMES)
    launches, _ = plan_select(q, descriptors, top_k, group, valid.int(), slots.int(), BLOCKS_PER_FRAME)
    return launches


def compiled(launch, capability):
    machine = compile_launch(launch, capability)
    assert machine.shared_bytes <= SHARED_MEMORY_LIMIT[capability]
    return machine


@capabilities
@pytest.mark.parametrize(
    "segments",
    [dict(), dict(dense=False), dict(bank=False, resume=False)],
    ids=["everything", "bank resuming", "window"],
)
def test_attend(capability, segments):
    machine = compiled(attend_launch(**segments), capability)
    assert machine.spills == 0
    assert machine.stack_bytes == 0
    # two products per tile and segment
    tiles = 4 if segments.get("dense", True) and segments.get("bank", True) else 2
    assert machine.opcodes[TENSOR_CORE_OPCODE[capability]] >= tiles


@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_attend_with_grouped_heads(head_dim):
    machine = compiled(attend_launch(heads=(12, 4), head_dim=head_dim), 90)
    assert machine.spills == 0
    assert machine.opcodes["HGMMA"] >= 4


@capabilities
def test_float32_attention_stays_off_the_tensor_cores(capability):
    machine = compiled(attend_launch(dtype=torch.float32), capability)
    assert machine.tensor_core_products == 0
    assert machine.spills <= 8, "a few outside of the loops"


@capabilities
@pytest.mark.parametrize("group", [1, 128], ids="group{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_select(capability, group, dtype):
    launches = select_launches(dtype=dtype, group=group)
    assert len(launches) == (1 if group == 1 else 2)
    for launch in launches:
        machine = compiled(launch, capability)
        assert machine.spills == 0
        assert machine.tensor_core_products == 0, "scores are IEEE float32 products"


def test_select_with_grouped_heads_and_select_all():
    for launch in [*select_launches(heads=(12, 4), head_dim=64), select_launches(top_k=5000)[1]]:
        assert compiled(launch, 90).spills == 0


def test_sizes_of_one_become_constants():
    """The just-in-time compiler makes a constant of an integer that is 1, which is another kernel to it."""
    q, indices = meta(1, 1, 1, 16), meta(1, 1, 1, 1, dtype=torch.int32)
    memory = dict(memory_slots=meta(1, 1).int(), resume_out=q, resume_lse=meta(1, 1, 1).float())
    sizes = dict(block_size=1, frame_tokens=1, query_group=1, softmax_scale=0.25)
    compiled(plan_attend(q, q, q, q, q, indices, **sizes, **memory)[0], 90)
    compiled(plan_block_means(q, 1, 1, torch.float32)[0], 90)
    for length, frames in ((1, meta(1).int()), (1, None), (2, None), (2, meta(1).int())):
        for launch in plan_select(meta(1, length, 1, 16), meta(1, length, 1, 16), 1, length, frames, None, 1)[0]:
            compiled(launch, 90)


@capabilities
def test_describe(capability):
    launch, _ = plan_block_means(meta(1, FRAMES * FRAME_TOKENS, 12, 128), 64, FRAME_TOKENS, torch.bfloat16)
    assert compiled(launch, capability).spills == 0
