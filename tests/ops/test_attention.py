"""memory_attention, attend_selected and merge_states against dense attention in float64."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, assert_within_tolerance, cases, dense_attention, small_case
from hypothesis import given, settings
from hypothesis import strategies as st

import memflow_ops
from memflow_ops.ops.attention import Options

LOW = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize("impl", ["reference", "torch"])


def compare_lse(ours, exact):
    same = torch.where(exact == -torch.inf, ours == exact, (ours.double() - exact).abs() < 1e-4 * (1 + exact.abs()))
    assert same.all(), f"LSE differs by up to {(ours.double() - exact).nan_to_num(0.0).abs().max():.2e}"


@given(cases())
@settings(max_examples=200)
def test_reference_is_dense_attention_over_what_is_selected(case):
    out, lse = case.run("reference")
    exact, exact_lse = dense_attention(case, case.indices("reference"))
    torch.testing.assert_close(out, exact, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-11, atol=1e-11)


@given(cases(), st.sampled_from(LOW))
@settings(max_examples=250)
def test_torch_is_as_exact_as_dense_attention(case, dtype):
    low = case.to(dtype)
    indices = low.indices("torch")
    out, lse = low.run("torch")
    exact, exact_lse = dense_attention(low.to(torch.float64), indices)
    assert_within_tolerance(out, dense_attention(low, indices)[0], exact, repr(low))
    compare_lse(lse, exact_lse)


@pytest.mark.parametrize("size", [1.0, 100.0])
@pytest.mark.parametrize("dtype", LOW[1:])
def test_a_short_window_beside_a_large_bank(dtype, size):
    """The window's share is small, but its values may be large, so the merge must not round its weight."""
    for seed in range(20):
        torch.manual_seed(seed)
        q, k, v, memory_k, memory_v = (torch.randn(1, n, 1, 64).to(dtype) for n in (4, 1, 1, 192, 192))
        v *= size
        out = memflow_ops.memory_attention(
            q, k, v, memory_k, memory_v, top_k=99, block_size=8, frame_tokens=8, impl="torch"
        )
        keys = (q, torch.cat([k, memory_k], 1), torch.cat([v, memory_v], 1))

        def dense(of, keys=keys):
            return F.scaled_dot_product_attention(*(x.to(of).transpose(1, 2) for x in keys)).transpose(1, 2)

        assert_within_tolerance(out, dense(dtype), dense(torch.float64), f"seed {seed}")


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, *LOW])
def test_keys_whose_scores_are_minus_infinity(impl, dtype):
    """A query that sees nothing else has out 0 and LSE -inf. With a bank, the bank alone counts."""
    q, bank = torch.rand(1, 5, 2, 8).to(dtype) + 0.1, torch.randn(1, 8, 1, 8).to(dtype)
    k, v = torch.full((1, 3, 1, 8), -torch.inf, dtype=dtype), torch.randn(1, 3, 1, 8).to(dtype)
    out, lse = memflow_ops.memory_attention(q, k, v, return_lse=True, impl=impl)
    assert (out == 0).all() and (lse == -torch.inf).all()
    found = memflow_ops.memory_attention(q, k, v, bank, bank, top_k=2, block_size=4, return_lse=True, impl=impl)
    alone = memflow_ops.memory_attention(q, bank, bank, return_lse=True, impl=impl)
    for ours, theirs in zip(found, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@given(cases())
@settings(max_examples=100)
def test_torch_is_the_reference_in_float64(case):
    for ours, theirs in zip(case.run("torch"), case.run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@given(cases())
@settings(max_examples=100)
def test_gradients_of_torch_are_those_of_dense_attention(case):
    """The gradients of out and LSE in float64 are those of autograd through plain masked attention."""
    leaves = case.requires_grad()
    indices = case.indices("torch")
    weights = [torch.randn(x.shape, dtype=torch.float64) for x in case.run("torch")]

    def gradients(out, lse):
        seen = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
        loss = (out * weights[0]).sum() + (seen * weights[1]).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]

    if (case.k.shape[1] == 0) and indices is None:
        return
    exact = gradients(*dense_attention(case, indices))
    for impl in ("torch", "reference"):
        for ours, theirs in zip(gradients(*case.run(impl)), exact, strict=True):
            torch.testing.assert_close(ours, theirs.nan_to_num(0.0), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", LOW)
@given(case=cases())
@settings(max_examples=40)
def test_low_precision_gradients_are_as_exact_as_dense_attention(case, dtype):
    low = case.to(dtype)
    indices = low.indices("torch")
    if low.k.shape[1] == 0:
        return  # Queries without a key have no dense yardstick.
    weight = torch.randn(low.q.shape, dtype=torch.float64)

    def gradients(attention, inputs):
        leaves = inputs.requires_grad()
        grads = torch.autograd.grad((attention(inputs) * weight.to(inputs.q.dtype)).sum(), leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]

    dense = lambda inputs: dense_attention(inputs, indices)[0]  # noqa: E731
    exact = gradients(dense, low.to(torch.float64))
    rows = zip(gradients(lambda x: x.run("torch")[0], low), gradients(dense, low), exact, strict=True)
    for name, (ours, yardstick, truth) in zip(low.tensors(), rows, strict=False):
        assert_within_tolerance(ours, yardstick, truth, f"gradient of {name}")


@BOTH
@pytest.mark.parametrize("group", [1, 3, None])
def test_gradcheck_of_out_and_lse(impl, group):
    case = small_case(query_group=group)
    names = list(case.tensors())

    def run(*tensors):
        return Case(**dict(zip(names, tensors, strict=True)), options=case.options).run(impl)

    assert torch.autograd.gradcheck(run, case.requires_grad(), atol=1e-6, fast_mode=True)


@BOTH
def test_what_is_not_selected_is_not_read(impl):
    case = small_case(top_k=1, query_group=None)
    clean = case.run(impl)
    chosen = case.indices(impl)
    descriptors = memflow_ops.describe_blocks(case.memory_k, 4, 10, impl=impl)
    used = torch.zeros(2, 20, 2, dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        for index in chosen[b, h, 0].tolist():
            start = index // 3 * 10 + index % 3 * 4
            used[b, start : min(start + 4, index // 3 * 10 + 10), h // 2] = True
    assert not used.all()
    dirty = Case(case.q, case.k, case.v, case.memory_k.clone(), case.memory_v.clone(), case.options)
    dirty.memory_k[~used] = torch.nan
    dirty.memory_v[~used] = torch.nan
    dirty.options["memory_descriptors"] = descriptors
    leaves = dirty.requires_grad()
    out, lse = dirty.run(impl)
    torch.testing.assert_close(out, clean[0])
    torch.testing.assert_close(lse, clean[1])
    for grad in torch.autograd.grad(out.sum() + lse.sum(), leaves):
        assert grad.isfinite().all()


@BOTH
def test_a_group_without_keys_gives_zero_and_minus_infinity(impl):
    case = small_case(memory_frames=torch.tensor([0, 2], dtype=torch.int32))
    case.k, case.v = case.k[:, :0], case.v[:, :0]
    case.memory_k[0] = case.memory_v[0] = torch.nan
    leaves = case.requires_grad()
    out, lse = case.run(impl)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    assert out[1].isfinite().all() and lse[1].isfinite().all() and (out[1] != 0).any()
    for x, grad in zip((case.q, case.memory_k), torch.autograd.grad(out.sum(), [leaves[0], leaves[3]]), strict=True):
        assert (grad[0] == 0).all() and (grad[1] != 0).any(), x.shape


@BOTH
def test_the_bank_may_lie_anywhere(impl):
    """A slot table over a scattered pool gives what the bank in order gives."""
    case = small_case()
    pool = torch.full((2, 50, 2, 8), torch.nan, dtype=torch.float64)
    slots = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)
    scattered = {name: pool.clone() for name in ("memory_k", "memory_v")}
    for name, x in scattered.items():
        for b in range(2):
            for j in range(2):
                x[b, slots[b, j] * 10 : slots[b, j] * 10 + 10] = getattr(case, name)[b, j * 10 : j * 10 + 10]
    paged = Case(case.q, case.k, case.v, *scattered.values(), {**case.options, "memory_slots": slots})
    for ours, theirs in zip(paged.run(impl), case.run(impl), strict=True):
        torch.testing.assert_close(ours, theirs)


@BOTH
@given(cases())
@settings(max_examples=40)
def test_resuming_is_attending_to_everything(impl, case):
    if case.memory_k is None or not case.memory_k.shape[1]:
        return
    options = {
        n: case.options[n] for n in ("block_size", "frame_tokens", "query_group", "memory_slots", "softmax_scale")
    }
    whole = case.run(impl)
    state = memflow_ops.memory_attention(
        case.q, case.k, case.v, softmax_scale=options["softmax_scale"], return_lse=True, impl=impl
    )
    indices = case.indices(impl)
    resumed = memflow_ops.attend_selected(
        case.q, case.memory_k, case.memory_v, indices, resume=state, impl=impl, **options
    )
    alone = memflow_ops.attend_selected(case.q, case.memory_k, case.memory_v, indices, impl=impl, **options)
    for state_of_both in (resumed, memflow_ops.merge_states(*state, *alone)):
        for ours, theirs in zip(state_of_both, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@BOTH
def test_gradients_flow_through_a_resumed_state(impl):
    case = small_case()
    leaves = case.requires_grad()
    options = dict(block_size=4, frame_tokens=10, query_group=3, impl=impl)
    whole = torch.autograd.grad(sum(x.sin().sum() for x in case.run(impl)), leaves)
    indices = case.indices(impl)
    state = memflow_ops.memory_attention(case.q, case.k, case.v, return_lse=True, impl=impl)
    resumed = memflow_ops.attend_selected(case.q, case.memory_k, case.memory_v, indices, resume=state, **options)
    merged = memflow_ops.merge_states(
        *state, *memflow_ops.attend_selected(case.q, case.memory_k, case.memory_v, indices, **options)
    )
    for parts in (resumed, merged):
        grads = torch.autograd.grad(sum(x.sin().sum() for x in parts), leaves, retain_graph=True)
        for ours, theirs in zip(grads, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_a_state_whose_lse_carries_no_gradient_is_refused():
    case = small_case()
    case.requires_grad()
    out, lse = memflow_ops.memory_attention(case.q, case.k, case.v, return_lse=True)
    other = torch.zeros_like(out), torch.zeros_like(lse)
    options = dict(block_size=4, frame_tokens=10, query_group=3)
    with pytest.raises(ValueError, match="carries none"):
        memflow_ops.attend_selected(
            case.q, case.memory_k, case.memory_v, case.indices("torch"), resume=(out, lse.detach()), **options
        )
    with pytest.raises(ValueError, match="carries none"):
        memflow_ops.merge_states(out, lse.detach(), *other)


def test_merging_ignores_an_empty_state():
    out, lse = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3)
    empty = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for merged in (memflow_ops.merge_states(out, lse, *empty), memflow_ops.merge_states(*empty, out, lse)):
        torch.testing.assert_close(merged, (out, lse))
    nothing = memflow_ops.merge_states(*empty, *empty)
    assert (nothing[0] == 0).all() and (nothing[1] == -torch.inf).all()


def test_top_k_beyond_the_bank_is_dense_attention_over_everything():
    case = small_case(top_k=1000)
    case.options["query_group"] = None
    dense = memflow_ops.memory_attention(
        case.q, torch.cat([case.k, case.memory_k], 1), torch.cat([case.v, case.memory_v], 1), impl="torch"
    )
    for impl in ("reference", "torch"):
        torch.testing.assert_close(case.run(impl)[0], dense)


@BOTH
def test_autocast_does_not_reach_into_the_ops(impl):
    case = small_case().to(torch.float32)
    leaves = case.requires_grad()
    text, frames = torch.randn(1, 3, 2, 8), torch.randn(1, 4, 2, 2, 8)

    def run():
        out, lse = case.run(impl)
        relevance = memflow_ops.frame_relevance(text, frames, score="softmax")
        return out, lse, relevance, case.indices(impl), *torch.autograd.grad(out.sum() + lse.sum(), leaves)

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(run(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@BOTH
def test_queries_with_a_second_stride_of_one(impl):
    q = torch.randn(99).as_strided((1, 5, 2, 8), (20, 2, 1, 1), 3)
    k = torch.randn(1, 6, 2, 8)
    torch.testing.assert_close(
        memflow_ops.memory_attention(q, k, k, impl=impl), memflow_ops.memory_attention(q.contiguous(), k, k)
    )


@BOTH
def test_an_empty_bank_leaves_the_resumed_state(impl):
    case = small_case()
    state = memflow_ops.memory_attention(case.q, case.k, case.v, return_lse=True)
    indices = torch.full((2, 4, 3, 2), -1, dtype=torch.int32)
    options = dict(block_size=4, query_group=3, impl=impl)
    nothing = case.memory_k[:, :0]
    slots = torch.zeros(2, 0, dtype=torch.int32)
    for bank, table in ((nothing, None), (case.memory_k, slots)):
        ours = memflow_ops.attend_selected(case.q, bank, bank, indices, memory_slots=table, resume=state, **options)
        torch.testing.assert_close(ours, state)


def test_type_checkers_know_every_option():
    """The overloads, which say what `return_lse` makes of the result, have the options of the function itself."""
    parameters = inspect.signature(memflow_ops.memory_attention).parameters.values()
    options = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "return_lse"}
    assert {name: kind.__forward_arg__ for name, kind in Options.__annotations__.items()} == options
