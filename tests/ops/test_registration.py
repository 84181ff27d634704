"""The operators as torch sees them: opcheck of every one, and torch.compile."""

import cache_write_cases
import pytest
import retrieval_cases
import torch
from torch.library import opcheck

import memflow_ops
from memflow_ops.ops import registration


def tensors(requires_grad: bool = True, dtype: torch.dtype = torch.float64):
    make = lambda *shape: torch.randn(*shape, dtype=dtype, requires_grad=requires_grad)  # noqa: E731
    q, k, v = make(2, 7, 4, 8), make(2, 30, 2, 8), make(2, 30, 2, 8)
    return q, k, v, make(2, 20, 2, 8), make(2, 20, 2, 8)


SLOTS = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
FRAMES = torch.tensor([1, 2], dtype=torch.int32)
USED = torch.tensor([13, 25], dtype=torch.int32)
WINDOW = torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
NO_SCALES = (None, None, None)  # nor descriptors
SIZES = (3, 4, 10, 3, 0.3)  # top_k, block_size, frame_tokens, query_group, softmax_scale


def attention_arguments(name: str, impl: str, requires_grad: bool):
    """The arguments of an operator of attention, selection or relevance, with everything optional given."""
    q, k, v, memory_k, memory_v = tensors(requires_grad)
    descriptors = memflow_ops.describe_blocks(memory_k.detach(), 4, 10)
    described = memflow_ops.describe_blocks(memory_k.detach(), 4, 10, moments=2)
    indices = memflow_ops.select_blocks(q, descriptors, 3, query_group=3, blocks_per_frame=3)
    out, lse = torch.randn_like(q), torch.randn(2, 4, 7, dtype=q.dtype, requires_grad=requires_grad)
    sizes = ([True, False, True, True, True], *SIZES[1:], True)
    memory_q = torch.randn_like(q, requires_grad=requires_grad)
    bank = (memory_k, memory_v, memory_q, described, None, None, FRAMES)
    above = (torch.randn_like(q.detach()), lse.detach())
    return {
        "describe_blocks": (memory_k, 4, 10, 2, impl),
        "describe_blocks_backward": (described, memory_k.detach(), 4, 10),
        "select_blocks": (q.detach(), described, FRAMES, SLOTS, *SIZES, "moments", impl),
        "attend_selected": (q, memory_k, memory_v, indices, *NO_SCALES, SLOTS, out, lse, *SIZES[1:], impl),
        "memory_attention": (q, k, v, *bank, SLOTS, USED, WINDOW, *SIZES, True, "moments", impl, "auto"),
        "attend_backward": (*above, *tensors(False), indices, SLOTS, USED, WINDOW, out, lse.detach(), *sizes, impl),
        "merge_states": (out.requires_grad_(requires_grad), lse, torch.randn_like(out), torch.randn_like(lse)),
        "frame_relevance": (q, memory_k.unflatten(1, (4, 5)), FRAMES, torch.full((5,), 0.2), "softmax", 0.3),
    }[name]


def succeeds(name: str, arguments: tuple) -> bool:
    return set(opcheck(getattr(torch.ops.memflow_ops, name).default, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    "name", ["describe_blocks", "select_blocks", "attend_selected", "memory_attention", "attend_backward"]
)
def test_opcheck_of_attention_and_selection(name, impl):
    assert succeeds(name, attention_arguments(name, impl, name not in ("select_blocks", "attend_backward")))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_opcheck_of_attention_to_an_int8_bank(impl):
    q, k, v, memory_k, memory_v = tensors(False)
    described = memflow_ops.describe_blocks(memory_k, 4, 10)
    made = memflow_ops.quantise_memory(memory_k, memory_v, described, block_size=4, frame_tokens=10)
    indices = memflow_ops.select_blocks(q, described, 3, query_group=3, blocks_per_frame=3)
    scales = (described, *made[2:])
    sizes = (*SIZES, False, "mean", impl, "auto")
    assert succeeds("memory_attention", (q, k, v, *made[:2], None, *scales, FRAMES, SLOTS, USED, WINDOW, *sizes))
    assert succeeds("attend_selected", (q, *made[:2], indices, *scales, SLOTS, None, None, *SIZES[1:], impl))


@pytest.mark.parametrize("name", ["describe_blocks_backward", "merge_states", "frame_relevance"])
def test_opcheck_of_what_all_implementations_share(name):
    assert succeeds(name, attention_arguments(name, "torch", name != "describe_blocks_backward"))


def test_opcheck_of_copies_beside_the_window():
    q, _, _, memory_k, memory_v = tensors(False, torch.float32)
    indices = torch.tensor([0, 2, 5, -1], dtype=torch.int32).view(1, 2, 1, 2).expand(2, 2, 1, 2).contiguous()
    target_k, target_v, hidden = torch.randn(2, 8, 2, 8), torch.randn(2, 8, 2, 8), torch.zeros(2, 2, 8).bool()
    targets = (target_k, target_v, hidden, 4, 10)
    assert succeeds("copy_selected", (memory_k, memory_v, indices, *NO_SCALES, SLOTS, *targets))
    described = memflow_ops.describe_blocks(memory_k, 4, 10)
    made = memflow_ops.quantise_memory(memory_k, memory_v, described, block_size=4, frame_tokens=10)
    assert succeeds("copy_selected", (*made[:2], indices, described, *made[2:], SLOTS, *targets))
    keys, values = torch.randn(2, 13, 2, 8), torch.randn(2, 13, 2, 8)
    assert succeeds("attend_with_copies", (q[:, :, :2], keys, values, hidden, 0.3))


def test_opcheck_of_write_frames():
    places = torch.tensor([[3, 1], [-1, 0]], dtype=torch.int32)
    assert succeeds("write_frames", (torch.randn(2, 5, 10, 2, 8), places, torch.randn(2, 2, 10, 2, 8)))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck_of_write_projections(impl, optional):
    case = cache_write_cases.make_case(batch=2, options={"block_size": 5}, seed=3).to(torch.float32)
    case.mean_frames, case.described, case.moments = int(optional), optional, 2
    case.memory_rotation = case.rotation if optional else None
    out, weights = case.outputs(), case.norm[:2] if optional else (None, None)
    second = (*(x.flatten(2) for x in case.rotation), out["memory_q"]) if optional else (None, None, None)
    inputs = (case.q, case.k, case.v, *(x.flatten(2) for x in case.rotation), *second)
    written = (out["memory_k"], out["memory_v"], case.places, *weights, out["descriptors"], out["means"])
    sizes = (case.frame_tokens, 5, case.frame_tokens, 1e-6)
    assert succeeds("write_projections", (*inputs, *written, *sizes, impl))


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("score", ["linear", "softmax", "coverage"])
def test_opcheck_of_retrieve_frames(score, impl):
    case = retrieval_cases.make_case(parts=2, candidates=4)
    inputs = [case[name] for name in ("text_keys", "means", "candidates", "text_lengths")]
    weights = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    redundancy = None if score == "coverage" else 0.5
    assert succeeds("retrieve_frames", (*inputs, weights, 3, score, redundancy, 0.4, impl))


def test_every_operator_is_named_here():
    """A new operator needs an opcheck: add it above, and here."""
    checked = {"describe_blocks", "describe_blocks_backward", "select_blocks", "attend_selected", "memory_attention",
               "attend_backward", "merge_states", "frame_relevance", "write_frames", "write_projections",
               "retrieve_frames", "copy_selected", "attend_with_copies"}  # fmt: skip
    schemas = torch._C._jit_get_all_schemas()
    registered = {s.name.split("::")[1] for s in schemas if s.name.startswith("memflow_ops::")}
    # An integration has an operator of its own, which reads a memory by its number and is tested with that memory.
    assert registered - {"attend_in_memory"} == checked
    assert checked >= set(registration.__all__)


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_relevance_compiles_whole(score):
    text, keys = torch.randn(2, 5, 4, 8), torch.randn(2, 6, 3, 2, 8)
    run = lambda *x: memflow_ops.frame_relevance(*x, score=score, block_lengths=(2, 2, 1))  # noqa: E731
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(text, keys), run(text, keys))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_attention_compiles_whole_forward_and_backward(backend):
    inputs = tensors(dtype=torch.float32)

    def loss(q, k, v, memory_k, memory_v):
        options = dict(top_k=3, block_size=4, frame_tokens=10, query_group=3, memory_slots=SLOTS, memory_frames=FRAMES)
        out, lse = memflow_ops.memory_attention(2 * q, k, v, memory_k, memory_v, return_lse=True, **options)
        descriptors = memflow_ops.describe_blocks(memory_k, 4, 10)
        indices = memflow_ops.select_blocks(q, descriptors, 2, query_group=3, blocks_per_frame=3)
        more = memflow_ops.attend_selected(
            q, memory_k, memory_v, indices, block_size=4, frame_tokens=10, query_group=3, resume=(out, lse)
        )
        out, lse = memflow_ops.merge_states(*more, out, lse)
        return out.square().sum() + lse.sum()

    expected, actual = loss(*inputs), torch.compile(loss, fullgraph=True, backend=backend)(*inputs)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad(x, inputs) for x in (actual, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["memory_frames", "memory_slots", "seqused_k", "window_slots"])
def test_attention_compiles_whole_for_sizes_that_vary(given):
    """One graph for every batch size and length, tensors of integers included."""
    q, k, v, memory_k, memory_v = (x.detach() for x in tensors(dtype=torch.float32))
    batch = q.shape[0]
    shape = (batch,) if given in ("memory_frames", "seqused_k") else (batch, 2)
    k, v = (memory_k, memory_v) if given == "window_slots" else (k, v)
    sizes = {"top_k": 3, "block_size": 4, "frame_tokens": 10, "query_group": 3}

    def run(q, k, v, memory_k, memory_v, integers):
        return memflow_ops.memory_attention(q, k, v, memory_k, memory_v, **sizes, **{given: integers})

    inputs = (q, k, v, memory_k, memory_v, torch.ones(shape, dtype=torch.int32))
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs))
