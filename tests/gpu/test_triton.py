"""The Triton kernels on a real GPU: against float64, compiled, without a host sync, in CUDA graphs. `make gpu-test`."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from attention_cases import Case, assert_within_tolerance, cases, dense_attention
from attention_on_gpu import on_gpu, run_with_indices
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_cases import int8_case
from torch.library import opcheck

import memflow_ops as ops
from memflow_ops.geometry import Geometry
from memflow_ops.impl import dense

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# Few examples: each is of other sizes, and compiles its kernels anew.
@given(cases(), st.sampled_from(DTYPES))
@settings(max_examples=12)
def test_kernels_are_as_exact_as_dense_attention(case, dtype):
    low = case.to(dtype)
    out, lse, indices = (x.cpu() for x in run_with_indices(on_gpu(low)))
    chosen = indices if indices.shape[-1] else None
    exact, exact_lse = dense_attention(low.to(torch.float64), chosen)
    assert_within_tolerance(out, dense_attention(low, chosen)[0], exact, repr(low))
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [1, 128], ids="group{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_int8_bank_is_read_as_the_numbers_that_it_stands_for(dtype, group):
    torch.manual_seed(4)
    make = lambda tokens, heads: torch.randn(2, tokens, heads, 128).to(dtype)  # noqa: E731
    options = dict(top_k=5, block_size=64, frame_tokens=150, query_group=group, memory_frames=None, softmax_scale=None)
    options["memory_slots"] = torch.tensor([[3, 0, 2], [1, 1, 4]], dtype=torch.int32)
    given = Case(make(200, 4), make(70, 2), make(70, 2), make(750, 2), make(750, 2), options)
    int8, rounded = int8_case(given)
    out, lse, indices = (x.cpu() for x in run_with_indices(on_gpu(int8)))
    exact, exact_lse = dense_attention(rounded.to(torch.float64), indices)
    assert_within_tolerance(out, dense_attention(rounded, indices)[0], exact, f"{dtype}, groups of {group}")
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("group", [1, 16, 64, 128, None], ids="group{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_are_the_references(dtype, group):
    """Integers, two head counts, 1700 blocks through a slot table, two batch elements with different frames."""
    torch.manual_seed(0)
    q = torch.randint(-1, 2, (2, 512, 4, 64)).to(dtype)
    descriptors = torch.randint(-1, 2, (2, 70 * 25, 2, 64)).to(dtype)
    descriptors[:, ::97] = torch.nan
    slots = torch.stack([torch.randperm(70)[:68] for _ in range(2)]).int()
    frames = torch.tensor([68, 41], dtype=torch.int32)
    options = dict(query_group=group, blocks_per_frame=25)
    move = dict(memory_slots=slots.cuda(), memory_frames=frames.cuda())
    ours = ops.select_blocks(q.cuda(), descriptors.cuda(), 24, impl="triton", **options, **move)
    expected = ops.select_blocks(
        q.double(), descriptors.double(), 24, impl="torch", memory_slots=slots, memory_frames=frames, **options
    )
    assert torch.equal(ours.cpu(), expected)


@pytest.mark.parametrize("group", [1, 128], ids="group{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_real_scores_agree_beyond_the_margin(dtype, group):
    torch.manual_seed(1)
    q = torch.randn(1, 1024, 2, 128, device="cuda", dtype=dtype)
    descriptors = torch.randn(1, 1600, 2, 128, device="cuda", dtype=dtype)
    ours = ops.select_blocks(q, descriptors, 24, query_group=group, blocks_per_frame=25, impl="triton")
    means = q.double().unflatten(1, (-1, group)).mean(2)
    keys = descriptors.double()
    best = torch.einsum("bghd,bnhd->bhgn", means, keys).sort(dim=-1, descending=True, stable=True)
    noise = 2.0**-18 * torch.einsum("bghd,bnhd->bhgn", means.abs(), keys.abs()).amax(-1)
    clear = best.values[..., 23] - best.values[..., 24] > noise
    assert clear.double().mean() > 0.9
    assert torch.equal(ours[clear].long(), best.indices[..., :24].sort(-1).values[clear])


def wan_layer(frames: int = 8):
    """One layer at the sizes of Wan 2.1 1.3B, bank of `frames`, in bfloat16."""
    torch.manual_seed(2)
    make = lambda tokens: torch.randn(1, tokens, 12, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return make(4680), make(3 * 4680), make(3 * 4680), make(frames * 1560), make(frames * 1560)


@pytest.mark.parametrize("frames", [3, 40])
# `auto` takes cuDNN for so long a window, and cuDNN inside a graph may end the process.
@pytest.mark.parametrize("backend", [pytest.param("auto", marks=pytest.mark.alone), "own"])
@pytest.mark.parametrize("group", [1, 128, None], ids="group{}".format)
def test_no_host_sync_and_a_graph_that_follows_the_bank(group, backend, frames):
    q, k, v, memory_k, memory_v = wan_layer(frames)
    descriptors = ops.describe_blocks(memory_k, 64, 1560)
    valid = torch.tensor([2], dtype=torch.int32, device="cuda")
    slots = torch.arange(frames, dtype=torch.int32, device="cuda")[None].flip(1).contiguous()

    def run():
        return ops.memory_attention(
            q, k, v, memory_k, memory_v, memory_descriptors=descriptors, memory_frames=valid, memory_slots=slots,
            frame_tokens=1560, query_group=group, dense_backend=backend,
        )  # fmt: skip

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        captured = run()
    for count in (2, 3, frames, 0):
        valid.fill_(count)
        graph.replay()
        assert torch.equal(captured, run()), f"{count} frames"


@pytest.mark.parametrize("group", [1, 128], ids="group{}".format)
def test_a_wan_layer_agrees_with_torch_given_the_same_blocks(group):
    q, k, v, memory_k, memory_v = wan_layer(40)
    options = dict(block_size=64, frame_tokens=1560, query_group=group)
    indices = ops.select_blocks(q, ops.describe_blocks(memory_k, 64, 1560), 24, query_group=group, blocks_per_frame=25)
    rows = slice(0, 256)
    groups = slice(0, 256 // group)
    states = [
        ops.attend_selected(q[:, rows], memory_k, memory_v, indices[:, :, groups], impl=impl, **options)
        for impl in ("triton", "torch")
    ]
    torch.testing.assert_close(states[0][0], states[1][0], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-4, atol=1e-4)
    whole = ops.memory_attention(q, k, v, memory_k, memory_v, **options, return_lse=True)
    window = ops.memory_attention(q, k, v, return_lse=True, dense_backend="own")
    bank = ops.attend_selected(q, memory_k, memory_v, indices, **options, resume=window)
    torch.testing.assert_close(whole[0], bank[0], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(whole[1], bank[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", [4, 40, 1000], ids="{}frames".format)
def test_groups_select_as_the_reference_does(frames):
    """From one span of blocks, from several, and from so many that their candidates fill several warps."""
    torch.manual_seed(3)
    q = torch.randint(-1, 2, (1, 1024, 4, 128)).to("cuda", torch.bfloat16)
    descriptors = torch.randint(-1, 2, (1, frames * 25, 2, 128)).to("cuda", torch.bfloat16)
    options = dict(query_group=128, blocks_per_frame=25)
    expected = ops.select_blocks(q.cpu().double(), descriptors.cpu().double(), 24, **options)
    assert torch.equal(ops.select_blocks(q, descriptors, 24, **options).cpu(), expected)


@pytest.mark.parametrize("multiprocessors", [132, 108], ids="{}processors".format)
def test_a_split_last_wave_agrees_with_an_unsplit_one(multiprocessors):
    """As an H100 (2 programs per tile) and an A100 (8) split it, whatever the device; in a graph too."""
    from memflow_ops.kernels.attention.plan import plan_attend
    from memflow_ops.kernels.launch import run_all

    q, _, _, memory_k, memory_v = wan_layer(8)
    indices = ops.select_blocks(q, ops.describe_blocks(memory_k, 64, 1560), 24, query_group=128, blocks_per_frame=25)
    indices[:, ::5, 3:] = -1  # fewer blocks than programs
    geometry = Geometry(block_size=64, frame_tokens=1560, query_group=128, softmax_scale=0.1)
    state = (torch.randn_like(q), torch.randn(1, 12, 4680, device="cuda"))

    def run(count):
        planned, *result = plan_attend(
            q, None, None, memory_k, memory_v, indices, geometry, state, multiprocessors=count
        )
        run_all(planned)
        return len(planned), result

    assert run(0)[0] == 1
    launches, got = run(multiprocessors)
    assert launches == 2
    torch.testing.assert_close(got[0], run(0)[1][0], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(got[1], run(0)[1][1], rtol=1e-4, atol=1e-4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, captured = run(multiprocessors)
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured[0], got[0]) and torch.equal(captured[1], got[1])


@pytest.mark.parametrize("heads", [(12, 12), (12, 4), (12, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("backend", [name for name in dense.NAMES if name not in ("auto", "own", "cpu")])
def test_dense_backends_agree_with_our_own(backend, head_dim, heads):
    torch.manual_seed(4)
    q, k, v = (torch.randn(2, n, h, head_dim, device="cuda", dtype=torch.bfloat16) for n, h in
               ((200, heads[0]), (333, heads[1]), (333, heads[1])))  # fmt: skip
    reason = dense.why_not(backend, q, k, v)
    if reason:
        pytest.skip(reason)
    ours = ops.memory_attention(q, k, v, impl="triton", dense_backend="own", return_lse=True)
    theirs = ops.memory_attention(q, k, v, impl="triton", dense_backend=backend, return_lse=True)
    torch.testing.assert_close(theirs[0], ours[0], rtol=2e-2, atol=4e-3)
    torch.testing.assert_close(theirs[1], ours[1], rtol=1e-4, atol=1e-4)


@pytest.mark.alone
def test_beyond_two_to_the_31_elements():
    """A bank of 1200 frames: its last blocks lie more than 2^31 elements from its first."""
    frames = 1200
    shape = (1, frames * 1560, 12, 128)
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of device memory")
    memory = torch.empty(shape, device="cuda", dtype=torch.bfloat16).fill_(torch.nan)
    assert memory.numel() > 2**31
    q = torch.randn(1, 256, 12, 128, device="cuda", dtype=torch.bfloat16)
    small = torch.randn(1, 2 * 1560, 12, 128, device="cuda", dtype=torch.bfloat16)
    memory[:, :1560], memory[:, -1560:] = small[:, :1560], small[:, 1560:]
    few = torch.tensor([3, 24, 25, 49], dtype=torch.int32, device="cuda").expand(1, 12, 256, 4)
    many = torch.where(few < 25, few, few + 25 * (frames - 2)).contiguous()
    for group in (1, 128):
        indices = [x[:, :, : 256 // group].contiguous() for x in (few, many)]
        options = dict(block_size=64, frame_tokens=1560, query_group=group, impl="triton")
        expected = ops.attend_selected(q, small, small, indices[0], **options)
        got = ops.attend_selected(q, memory, memory, indices[1], **options)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("group", [1, 64])
def test_registered_rightly_and_compiled_whole(group):
    q, k, _, memory_k, memory_v = (x[:, :300, :2] for x in wan_layer(1))
    descriptors = ops.describe_blocks(memory_k, 64, 150)
    valid = torch.tensor([2], dtype=torch.int32, device="cuda")
    slots, sizes = torch.tensor([[1, 0]], dtype=torch.int32, device="cuda"), (2, 64, 150, group, 0.1, False)
    bank = (memory_k, memory_v, None, descriptors, None, None)  # neither a second query nor int8
    arguments = (q, k, k, *bank, valid, slots, None, slots, *sizes, "mean", "triton", "auto")
    result = opcheck(torch.ops.memflow_ops.memory_attention.default, arguments)
    assert set(result.values()) == {"SUCCESS"}

    def layer(q, k, memory_k, memory_v):
        return ops.memory_attention(2 * q, k, k, memory_k, memory_v, frame_tokens=150, query_group=group, top_k=2) + 1

    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True)(q, k, memory_k, memory_v)
        torch.testing.assert_close(compiled, layer(q, k, memory_k, memory_v), rtol=2e-2, atol=2e-2)


SMALL_CASE = """
    import torch
    import memflow_ops as ops
    torch.manual_seed(0)
    q, k, memory_k, memory_v = (torch.randn(1, n, 2, 64, device="cuda").bfloat16() for n in (150, 100, 180, 180))
    memory_k.requires_grad_(), q.requires_grad_()
    for group in (1, 16, 64, None):
        out = ops.memory_attention(q, k, k, memory_k, memory_v, frame_tokens=90, block_size=32, top_k=3,
                                   query_group=group, impl="triton", dense_backend="own")
        assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), (q, memory_k))))
    print("case finished")
"""


@pytest.mark.alone
@pytest.mark.report_only
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    program = [sys.executable, "-c", textwrap.dedent(SMALL_CASE)]
    # torch would hand out parts of large allocations, whose ends the tool does not see
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = dict(capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    alone = subprocess.run(program, timeout=200, **options)  # compiles into triton's cache
    assert alone.returncode == 0, alone.stderr
    try:
        done = subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "9", *program], timeout=75, **options)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took longer than 75 s here")
    output = done.stdout + done.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device or its sandbox")
    if "case finished" not in output and "ERROR SUMMARY" not in output:
        pytest.skip(f"compute-sanitizer does not run here: {output.strip().splitlines()[:1]}")
    assert done.returncode == 0, output[-4000:]
