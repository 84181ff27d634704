"""Gradients of the Triton kernels on a real GPU: against float64, equal bit for bit, without a host sync, in graphs."""

import pytest
import torch
from attention_cases import Case, assert_within_tolerance, cases, dense_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import memflow_ops as ops
from memflow_ops.ops import registration as registered

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = pytest.mark.parametrize("group", [1, 16, 128, None], ids="group{}".format)


def gradients(case: Case, run, weight: torch.Tensor) -> list[torch.Tensor]:
    leaves = case.requires_grad()
    loss = (run(case) * weight.to(case.q)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


# Few examples: each is of other sizes, and compiles its kernels anew.
@given(cases(integers=True), st.sampled_from(DTYPES))
@settings(max_examples=10)
def test_gradients_are_as_exact_as_dense_attention(case, dtype):
    """Of integers, so that every implementation selects the same blocks."""
    low = case.to(dtype)
    if low.k.shape[1] == 0:
        return  # rows without any key have no dense yardstick
    indices = low.indices("torch")
    weight = torch.randn(low.q.shape, dtype=torch.float64)
    move = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x  # noqa: E731
    tensors = {name: move(x) for name, x in low.tensors().items()}
    on_gpu = Case(**tensors, options={name: move(x) for name, x in low.options.items()})
    ours = gradients(on_gpu, lambda x: x.run("triton")[0], weight)
    dense = lambda x: dense_attention(x, indices)[0]  # noqa: E731
    exact, yardstick = gradients(low.to(torch.float64), dense, weight), gradients(low, dense, weight)
    for name, mine, theirs, truth in zip(low.tensors(), ours, yardstick, exact, strict=False):
        assert_within_tolerance(mine.cpu(), theirs, truth, f"gradient of {name}")


def wan_layer(frames: int = 8):
    """One layer at the sizes of Wan 2.1 1.3B, bank of `frames`, in bfloat16."""
    torch.manual_seed(0)
    make = lambda n: torch.randn(1, n, 12, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # noqa: E731
    return make(4680), make(3 * 4680), make(3 * 4680), make(frames * 1560), make(frames * 1560)


def arguments_of(group, frames=8):
    """Of `attend_backward` by name, for such a layer; the selection is one of the kernels'."""
    q, k, v, memory_k, memory_v = (x.detach() for x in wan_layer(frames))
    group = group or 4680
    slots = torch.arange(frames, dtype=torch.int32, device="cuda")[None].flip(1).contiguous()
    descriptors = ops.describe_blocks(memory_k, 64, 1560)
    sizes = {"block_size": 64, "frame_tokens": 1560, "query_group": group, "softmax_scale": 128**-0.5, "causal": False}
    tensors = {"q": q, "k": k, "v": v, "memory_k": memory_k, "memory_v": memory_v, "memory_slots": slots}
    not_given = ("memory_q", "memory_k_scale", "memory_v_scale", "memory_frames", "seqused_k", "window_slots")
    out, lse, indices = registered.memory_attention(
        **tensors, **sizes, memory_descriptors=descriptors, top_k=24, score="mean", impl="triton", dense_backend="auto",
        **dict.fromkeys(not_given),
    )  # fmt: skip
    above = {"grad_out": torch.randn_like(out), "grad_lse": torch.randn_like(lse), "out": out, "lse": lse}
    rest = {"indices": indices, "seqused_k": None, "window_slots": None, "wanted": [True] * 5, "impl": "triton"}
    return {**tensors, **sizes, **above, **rest}


@GROUPS
def test_same_bits_without_a_host_sync_and_in_a_graph_that_follows_the_selection(group):
    arguments = arguments_of(group)
    first = registered.attend_backward(**arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = registered.attend_backward(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = registered.attend_backward(**arguments)
    graph.replay()
    for a, b, c in zip(first, second, captured, strict=True):
        assert a.isfinite().all() and torch.equal(a, b) and torch.equal(a, c)
    indices = arguments["indices"]
    indices.copy_(torch.where(indices % 3 == 0, -1, indices))
    graph.replay()
    for a, c in zip(registered.attend_backward(**arguments), captured, strict=True):
        assert torch.equal(a, c)


@GROUPS
def test_a_wan_layer_agrees_with_torch(group):
    """In float32 on a few heads, over the blocks that our kernels chose."""
    arguments = arguments_of(group, frames=3)
    group = arguments["query_group"]
    heads = lambda x: x[:, :, :2].float().contiguous() if x.dim() == 4 else x[:, :2].contiguous()  # noqa: E731
    few = {name: heads(arguments[name]) for name in ("grad_out", "grad_lse", "q", "k", "v", "memory_k", "memory_v")}
    reach = 512 // group * group or 4680
    few |= {"q": few["q"][:, :reach], "grad_out": few["grad_out"][:, :reach], "grad_lse": few["grad_lse"][..., :reach]}
    indices = arguments["indices"][:, :2, : -(-reach // group)].contiguous()
    window = ops.memory_attention(few["q"], few["k"], few["v"], return_lse=True, impl="torch")
    sizes = {name: arguments[name] for name in ("block_size", "frame_tokens", "query_group", "softmax_scale")}
    out, lse = ops.attend_selected(
        few["q"], few["memory_k"], few["memory_v"], indices, memory_slots=arguments["memory_slots"], resume=window,
        impl="torch", **sizes,
    )  # fmt: skip
    few |= {"indices": indices, "out": out, "lse": lse}
    found, expected = (registered.attend_backward(**{**arguments, **few, "impl": impl}) for impl in ("triton", "torch"))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_through_a_layer(how):
    inputs = [x.detach()[:, :600, :2].requires_grad_() for x in wan_layer(1)]

    def layer(q, k, v, memory_k, memory_v):
        out, lse = ops.memory_attention(2 * q, k, v, memory_k, memory_v, frame_tokens=150, query_group=64, top_k=2,
                                        return_lse=True)  # fmt: skip
        return out.float().square().mean() + lse.mean()

    run = torch.compile(layer, fullgraph=True) if how == "compiled" else layer
    if how == "checkpointed":
        run = lambda *x: checkpoint(layer, *x, use_reentrant=False)  # noqa: E731
    expected = torch.autograd.grad(layer(*inputs), inputs)
    for mine, right in zip(torch.autograd.grad(run(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=2e-2, atol=2e-2 * float(right.abs().max()))


@pytest.mark.parametrize("group", [1, 64])
def test_registered_rightly(group):
    arguments = arguments_of(group, frames=1)
    for name in ("grad_out", "q", "k", "v", "out"):
        arguments[name] = arguments[name][:, :300, :2]
    for name in ("memory_k", "memory_v"):
        arguments[name] = arguments[name][:, :150, :2]
    for name in ("grad_lse", "lse"):
        arguments[name] = arguments[name][:, :2, :300]
    arguments["indices"] = arguments["indices"][:, :2, : -(-300 // group), :3].clamp(max=2).contiguous()
    arguments["frame_tokens"] = 150
    operator = torch.ops.memflow_ops.attend_backward.default
    result = opcheck(operator, tuple(arguments[argument.name] for argument in operator._schema.arguments))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.alone
def test_beyond_two_to_the_31_elements():
    """A bank of 1200 frames: its last blocks lie more than 2^31 elements from its first."""
    frames = 1200
    if torch.cuda.mem_get_info()[0] < 32 << 30:
        pytest.skip("needs 32 GiB of device memory")
    shape = (1, frames * 1560, 12, 128)
    memory = torch.empty(shape, device="cuda", dtype=torch.bfloat16).fill_(torch.nan)
    small = torch.randn(1, 2 * 1560, 12, 128, device="cuda", dtype=torch.bfloat16)
    memory[:, :1560], memory[:, -1560:] = small[:, :1560], small[:, 1560:]
    q = torch.randn(1, 256, 12, 128, device="cuda", dtype=torch.bfloat16)
    few = torch.tensor([3, 24, 25, 49], dtype=torch.int32, device="cuda").expand(1, 12, 256, 4)
    many = torch.where(few < 25, few, few + 25 * (frames - 2))
    for group in (1, 128):
        options = dict(block_size=64, frame_tokens=1560, query_group=group, impl="triton")
        found = []
        for bank, indices in ((small, few), (memory, many)):
            leaves = [bank.detach().requires_grad_() for _ in range(2)]
            out, _ = ops.attend_selected(q, *leaves, indices[:, :, : 256 // group].contiguous(), **options)
            grads = torch.autograd.grad(out.square().sum(), leaves)
            found.append([torch.cat([x[:, :1560], x[:, -1560:]], 1) for x in grads])
            assert sum(int(x.count_nonzero()) for x in grads) == sum(int(x.count_nonzero()) for x in found[-1])
            del grads
        for mine, right in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(mine, right)
