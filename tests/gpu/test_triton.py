"""The Triton kernels on a real GPU: against float64, without a host sync, and in a CUDA graph. `make gpu-test`."""

import pytest
import torch
from attention_cases import Case, assert_within_tolerance, cases, dense_attention
from hypothesis import given, settings
from hypothesis import strategies as st

import memflow_ops as ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(case: Case) -> Case:
    move = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x  # noqa: E731
    tensors = {name: move(x) for name, x in case.tensors().items()}
    return Case(**tensors, options={name: move(x) for name, x in case.options.items()})


@given(cases(), st.sampled_from(DTYPES))
@settings(max_examples=60)
def test_kernels_are_as_exact_as_dense_attention(case, dtype):
    low = case.to(dtype)
    gpu = on_gpu(low)
    indices = gpu.indices("triton")
    out, lse = gpu.run("triton")
    chosen = None if indices is None else indices.cpu()
    exact, exact_lse = dense_attention(low.to(torch.float64), chosen)
    assert_within_tolerance(out.cpu(), dense_attention(low, chosen)[0], exact, repr(low))
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=1e-4, atol=1e-4)


@given(cases(integers=True))
@settings(max_examples=40)
def test_ties_are_the_references(case):
    low = case.to(torch.bfloat16)
    if low.memory_k is None or not low.memory_k.shape[1]:
        return
    gpu, options = on_gpu(low), dict(top_k=case.options["top_k"], query_group=1)
    ours = ops.select_blocks(gpu.q, gpu.memory_k, impl="triton", **options)
    assert torch.equal(ours.cpu(), ops.select_blocks(low.q, low.memory_k, impl="reference", **options))


def wan_layer(frames: int = 8):
    """One layer at the sizes of Wan 2.1 1.3B, bank of `frames`, in bfloat16."""
    make = lambda tokens: torch.randn(1, tokens, 12, 128, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return make(4680), make(3 * 4680), make(3 * 4680), make(frames * 1560), make(frames * 1560)


def test_no_host_sync_and_a_graph_that_follows_the_bank():
    q, k, v, memory_k, memory_v = wan_layer()
    descriptors = ops.describe_blocks(memory_k, 64, 1560)
    frames = torch.tensor([2], dtype=torch.int32, device="cuda")
    slots = torch.arange(8, dtype=torch.int32, device="cuda")[None]

    def run():
        return ops.memory_attention(
            q, k, v, memory_k, memory_v, memory_descriptors=descriptors, memory_frames=frames, memory_slots=slots,
            frame_tokens=1560,
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
    for valid in (2, 5, 8):
        frames.fill_(valid)
        graph.replay()
        assert torch.equal(captured, run()), f"{valid} frames"


def test_a_wan_layer_agrees_with_the_torch_implementation_given_the_same_blocks():
    q, _, _, memory_k, memory_v = wan_layer()
    indices = ops.select_blocks(q, ops.describe_blocks(memory_k, 64, 1560), 24, blocks_per_frame=25)
    options = dict(block_size=64, frame_tokens=1560)
    states = [
        ops.attend_selected(q[:, :256], memory_k, memory_v, indices[:, :, :2], impl=impl, **options)
        for impl in ("triton", "torch")
    ]
    torch.testing.assert_close(states[0][0], states[1][0], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(states[0][1], states[1][1], rtol=1e-4, atol=1e-4)
