"""describe_blocks and select_blocks: ties, signed zeros, NaN, ragged frames and groups, the slot table."""

import pytest
import torch
from attention_cases import cases
from hypothesis import given, settings
from hypothesis import strategies as st

import memflow_ops

BOTH = pytest.mark.parametrize("impl", ["reference", "torch"])


@given(cases(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=150)
def test_descriptors_are_means_of_blocks_rounded_once(case, dtype):
    if case.memory_k is None:
        return
    k, size, frame = case.memory_k.to(dtype), case.options["block_size"], case.options["frame_tokens"]
    expected = [
        k[:, f + start : min(f + start + size, f + frame)].double().mean(1)
        for f in range(0, k.shape[1], frame)
        for start in range(0, frame, size)
    ]
    for impl in ("reference", "torch"):
        ours = memflow_ops.describe_blocks(k, size, frame, impl=impl)
        assert ours.dtype == dtype and ours.shape[1] == len(expected)
        if expected:
            # Accumulation in float32 may round a tie the other way, so one unit in the last place is allowed.
            exact = torch.stack(expected, 1)
            error = (ours.double() - exact).abs()
            assert (error <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all(), f"{impl}: {error.max():.2e}"


@given(cases(integers=True))
@settings(max_examples=200)
def test_integer_valued_inputs_select_alike_ties_included(case):
    """Blocks of one token have whole numbers as descriptors, and groups of one or two queries have exact means."""
    if case.memory_k is None or not case.memory_k.shape[1]:
        return
    frame = case.options["frame_tokens"]
    options = {name: case.options[name] for name in ("top_k", "memory_frames", "memory_slots")}
    options |= dict(query_group=min(case.options["query_group"] or 1, 2), blocks_per_frame=frame)
    both = [memflow_ops.select_blocks(case.q, case.memory_k, impl=impl, **options) for impl in ("reference", "torch")]
    assert torch.equal(*both)
    low = case.to(torch.bfloat16)
    assert torch.equal(memflow_ops.select_blocks(low.q, low.memory_k, impl="torch", **options), both[0])


@given(cases())
@settings(max_examples=150)
def test_random_inputs_select_alike_where_the_margin_is_clear(case):
    """Selections are equal wherever the margin at the k-th score exceeds 2^-18 * sum(|q||d|)."""
    low = case.to(torch.float32)
    if low.memory_k is None or not low.memory_k.shape[1]:
        return
    size, frame = case.options["block_size"], case.options["frame_tokens"]
    options = {name: case.options[name] for name in ("top_k", "memory_frames", "memory_slots", "query_group")}
    options |= dict(blocks_per_frame=-(-frame // size))
    descriptors = memflow_ops.describe_blocks(low.memory_k, size, frame)
    exact = memflow_ops.select_blocks(low.q.double(), descriptors.double(), impl="reference", **options)
    scale = (low.q.abs().amax() * descriptors.abs().amax() * low.q.shape[-1]).item()
    for impl in ("reference", "torch"):
        ours = memflow_ops.select_blocks(low.q, descriptors, impl=impl, **options)
        for b, h, g in (ours != exact).any(-1).nonzero().tolist():
            assert margin(low.q, descriptors, options, b, h, g) <= 2**-18 * scale, f"{impl} at {b, h, g}"


def margin(q, descriptors, options, b, h, g) -> float:
    """The difference between the k-th best score and the next one, in float64."""
    queries, blocks, slots = q.shape[1], options["blocks_per_frame"], options["memory_slots"]
    group = min(options["query_group"] or queries, queries)
    frames = descriptors.shape[1] // blocks
    table = descriptors[b, :, h // (q.shape[2] // descriptors.shape[2])].double().unflatten(0, (frames, blocks))
    table = table if slots is None else table[slots[b].clamp(0, frames - 1).long()]
    valid = (
        table.shape[0]
        if options["memory_frames"] is None
        else int(options["memory_frames"][b].clamp(0, table.shape[0]))
    )
    mean = q[b, g * group : (g + 1) * group, h].double().mean(0)
    scores = (table[:valid].flatten(0, 1) @ mean).sort(descending=True).values
    k = options["top_k"]
    return float(scores[k - 1] - scores[k]) if k < len(scores) else torch.inf


def select(scores: list[float], top_k: int, impl: str, dtype=torch.float32, **options) -> list[int]:
    """The selection of one query whose score with block j is `scores[j]`."""
    q = torch.ones(1, 1, 1, 1, dtype=dtype)
    descriptors = torch.tensor(scores, dtype=dtype).view(1, -1, 1, 1)
    return memflow_ops.select_blocks(q, descriptors, top_k, impl=impl, blocks_per_frame=1, **options).flatten().tolist()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_order_of_scores(impl, dtype):
    nan, inf = float("nan"), float("inf")
    order = lambda scores, k: select(scores, k, impl, dtype)  # noqa: E731
    assert order([1.0, 3.0, 2.0], 2) == [1, 2]
    assert order([2.0, 1.0, 2.0, 2.0], 2) == [0, 2], "equal scores: the lower block"
    assert order([-0.0, 0.0, -0.0], 1) == [0], "-0 equals +0"
    assert order([0.0, -0.0, 1.0], 2) == [0, 2]
    assert order([nan, -inf, nan, -1.0], 2) == [1, 3], "NaN ranks below -inf"
    assert order([nan, nan, -inf], 2) == [0, 2], "and among NaN the lower block comes first"
    assert order([-inf, inf, 0.0], 2) == [1, 2]
    assert order([-5.0, -3.0, -4.0], 2) == [1, 2]
    assert order([1e-45 if dtype != torch.bfloat16 else 1e-40, 0.0, -1.0], 1) == [0], "denormals count"


@BOTH
def test_fewer_valid_blocks_than_asked_for(impl):
    frames = lambda n: torch.tensor([n], dtype=torch.int32)  # noqa: E731
    assert select([1.0, 2.0, 3.0], 2, impl, memory_frames=frames(1)) == [0, -1]
    assert select([1.0, 2.0, 3.0], 2, impl, memory_frames=frames(0)) == [-1, -1]
    assert select([1.0, 2.0, 3.0], 9, impl, memory_frames=frames(9)) == [0, 1, 2]
    assert select([1.0, 2.0, float("nan")], 2, impl, memory_frames=frames(-4)) == [-1, -1]
    assert select([float("nan"), 2.0], 2, impl, memory_frames=frames(1)) == [0, -1], "NaN is not invalid"


@BOTH
def test_slots_choose_in_bank_order(impl):
    slots = torch.tensor([[2, 0, 9, -1]], dtype=torch.int32)  # scores 3, 1, 3 (clamped to 2), 1 (clamped to 0)
    assert select([1.0, 2.0, 3.0], 1, impl, memory_slots=slots) == [0]
    assert select([1.0, 2.0, 3.0], 3, impl, memory_slots=slots) == [0, 1, 2]


def test_selection_is_not_differentiable():
    q = torch.randn(1, 4, 1, 8, requires_grad=True)
    assert not memflow_ops.select_blocks(q, torch.randn(1, 6, 1, 8), 2).requires_grad


@BOTH
def test_descriptors_have_a_gradient(impl):
    k = torch.randn(2, 10, 1, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: memflow_ops.describe_blocks(x, 4, 5, impl=impl), k)


def test_selection_ignores_what_precision_other_products_may_have():
    q, descriptors = torch.randn(1, 64, 4, 64), torch.randn(1, 400, 4, 64)
    select = lambda: memflow_ops.select_blocks(q, descriptors, 8, query_group=1, blocks_per_frame=1)  # noqa: E731
    exact = select()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(select(), exact)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
