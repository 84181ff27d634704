"""The operators as torch sees them: opcheck, torch.compile, import without triton, memory, no dense mask."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.library import opcheck

import memflow_ops as ops
from memflow_ops.bench.harness.ceilings import peak_bytes
from memflow_ops.impl.torch import cache_write
from memflow_ops.ops import registration
from memflow_ops.ops.registration import dispatch

NAMESPACE = torch.ops.memflow_ops


def tensors(requires_grad: bool = True, dtype: torch.dtype = torch.float64):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)  # noqa: E731
    q, k, v = make(2, 7, 4, 8), make(2, 5, 2, 8), make(2, 5, 2, 8)
    return q, k, v, make(2, 20, 2, 8), make(2, 20, 2, 8)


SLOTS = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
FRAMES = torch.tensor([1, 2], dtype=torch.int32)
SIZES = (3, 4, 10, 3, 0.3)  # top_k, block_size, frame_tokens, query_group, softmax_scale


def arguments(name: str, impl: str, requires_grad: bool):
    """The arguments of an operator: with everything optional given."""
    q, k, v, memory_k, memory_v = tensors(requires_grad)
    descriptors = ops.describe_blocks(memory_k.detach(), 4, 10)
    indices = ops.select_blocks(q, descriptors, 3, query_group=3, blocks_per_frame=3)
    out, lse = torch.randn_like(q), torch.randn(2, 4, 7, dtype=q.dtype, requires_grad=requires_grad)
    return {
        "describe_blocks": (memory_k, 4, 10, impl),
        "describe_blocks_backward": (descriptors, 4, 10),
        "select_blocks": (q.detach(), descriptors, FRAMES, SLOTS, 3, 3, 3, impl),
        "attend_selected": (q, memory_k, memory_v, indices, SLOTS, out, lse, *SIZES[1:], impl),
        "memory_attention": (q, k, v, memory_k, memory_v, descriptors, FRAMES, SLOTS, *SIZES, impl, "auto"),
        "attend_backward": (
            q.detach(), lse.detach(), *tensors(False), indices, SLOTS, out, lse.detach(),
            [True, False, True, True, True], *SIZES[1:], impl,
        ),
        "merge_states": (out.requires_grad_(requires_grad), lse, torch.randn_like(out), torch.randn_like(lse)),
        "write_frames": (
            torch.randn(2, 5, 10, 2, 8), torch.tensor([[3, 1], [-1, 0]], dtype=torch.int32),
            torch.randn(2, 2, 10, 2, 8),
        ),
        "frame_relevance": (q, memory_k.unflatten(1, (4, 5)), FRAMES, torch.full((5,), 0.2), "softmax", 0.3),
    }[name]  # fmt: skip


NAMES = ["describe_blocks", "describe_blocks_backward", "select_blocks", "attend_selected", "memory_attention",
         "attend_backward", "merge_states", "write_frames", "frame_relevance"]  # fmt: skip


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, impl):
    with_grad = name not in ("select_blocks", "attend_backward", "describe_blocks_backward", "write_frames")
    result = opcheck(getattr(NAMESPACE, name).default, arguments(name, impl, with_grad))
    assert set(result.values()) == {"SUCCESS"}


def test_frames_are_written_where_a_tensor_says():
    """On a CPU and as on other devices, into a view of a larger pool, from a view; what has no place is left out."""
    pool, new = torch.randn(2, 3, 7, 5, 2, 4), torch.randn(3, 5, 3, 2, 4).transpose(1, 2)
    places = torch.tensor([[6, 0, 2], [-1, -1, -1], [7, 0, 1]], dtype=torch.int32)
    want = pool.clone()
    for story, frame, place in ((0, 0, 6), (0, 1, 0), (0, 2, 2), (2, 1, 0), (2, 2, 1)):
        want[1, story, place] = new[story, frame]
    for write in (registration.write_frames, cache_write.write_frames_on_device):
        got = pool.clone()
        write(got[1], places, new)
        assert torch.equal(got, want)


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_relevance_and_merging_compile(score):
    text, keys = torch.randn(2, 5, 4, 8), torch.randn(2, 6, 3, 2, 8)
    run = lambda *x: ops.frame_relevance(*x, score=score, block_lengths=(2, 2, 1))  # noqa: E731
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(text, keys), run(text, keys))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_attention_compiles_whole_forward_and_backward(backend):
    inputs = tensors(dtype=torch.float32)

    def loss(q, k, v, memory_k, memory_v):
        options = dict(top_k=3, block_size=4, frame_tokens=10, query_group=3, memory_slots=SLOTS, memory_frames=FRAMES)
        out, lse = ops.memory_attention(2 * q, k, v, memory_k, memory_v, return_lse=True, **options)
        indices = ops.select_blocks(q, ops.describe_blocks(memory_k, 4, 10), 2, query_group=3, blocks_per_frame=3)
        more = ops.attend_selected(
            q, memory_k, memory_v, indices, block_size=4, frame_tokens=10, query_group=3, resume=(out, lse)
        )
        out, lse = ops.merge_states(*more, out, lse)
        return out.square().sum() + lse.sum()

    expected, actual = loss(*inputs), torch.compile(loss, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(x, inputs) for x in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_package_works_without_triton():
    program = """
        import sys
        sys.modules["triton"] = None  # any import of it now fails
        import torch, memflow_ops
        q, k = torch.randn(1, 8, 2, 16), torch.randn(1, 12, 2, 16)
        out = memflow_ops.memory_attention(q, k, k, k, k, frame_tokens=6, block_size=4, top_k=2)
        assert out.isfinite().all()
        import memflow_ops.cache, memflow_ops.cache.policies, memflow_ops.model.streaming.streamer
        try:
            memflow_ops.memory_attention(q, k, k, impl="triton")
        except ImportError:
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr


def test_auto_is_torch_on_a_cpu():
    assert dispatch.resolve("auto", torch.empty(1)) == "torch"


def test_torch_holds_little_more_than_what_it_gathers():
    """At most three times the gathered keys and values; scores or a mask of the bank would be 20 times as much."""
    queries, frames, frame, size, top_k = 256, 200, 100, 16, 8
    q = torch.randn(1, queries, 4, 64)
    memory = torch.randn(1, frames * frame, 4, 64)
    descriptors = ops.describe_blocks(memory, size, frame)
    k = q[:, :16]
    options = dict(memory_descriptors=descriptors, top_k=top_k, block_size=size, frame_tokens=frame, query_group=32)
    peak = peak_bytes(lambda: ops.memory_attention(q, k, k, memory, memory, **options), q.device)
    gathered = 2 * queries // 32 * 4 * top_k * size * 64 * 4
    assert peak <= 3 * gathered, f"held {peak / 2**20:.1f} MiB for {gathered / 2**20:.1f} MiB gathered"
