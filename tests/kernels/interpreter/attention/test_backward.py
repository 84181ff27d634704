"""Gradients over a dense segment and selected blocks against autograd through the reference in float64.

The tolerance is that of attention_cases, with PyTorch's own dense backward in the same dtype as the yardstick. Whatever
is not selected is NaN.
"""

import pytest
import torch
from attention_cases import Case, assert_within_tolerance, dense_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import memflow_ops as ops
from memflow_ops.geometry import Geometry
from memflow_ops.impl.reference import attention as reference_attention
from memflow_ops.kernels.attention.backward import attend_backward, plan_attend_backward
from memflow_ops.kernels.attention.plan import attend
from memflow_ops.kernels.launch import run_all
from memflow_ops.ops import registration as registered

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k", "v", "memory_k", "memory_v")
EVERYTHING = (True,) * 5


def case(
    dtype, *, batch=1, heads=(2, 1), head_dim=16, queries=(8, 20), dense=0, bank=(3, 37, 16), top_k=4, slots=False
):
    """A case and a random selection for it: some entries unused, blocks chosen by many and blocks by none."""
    (group, length), (frames, frame_tokens, block_size), (q_heads, kv_heads) = queries, bank, heads
    blocks = frames * -(-frame_tokens // block_size)
    physical = frames + 2 if slots else frames
    make = lambda tokens, count: torch.randn(batch, tokens, count, head_dim).to(dtype)  # noqa: E731
    options = dict(
        block_size=block_size,
        frame_tokens=frame_tokens,
        query_group=group,
        softmax_scale=head_dim**-0.5,
        memory_slots=torch.randint(-1, physical + 1, (batch, frames), dtype=torch.int32) if slots else None,
    )
    chosen = torch.rand(batch, q_heads, -(-length // group), blocks).argsort(-1)[..., :top_k]
    chosen[torch.rand(chosen.shape) < 0.2] = blocks
    chosen = chosen.sort(-1).values
    indices = torch.where(chosen == blocks, -1, chosen).to(torch.int32)
    memory = [make(physical * frame_tokens, kv_heads) for _ in range(2)]
    return Case(make(length, q_heads), make(dense, kv_heads), make(dense, kv_heads), *memory, options), indices


def poisoned(given, indices):
    """The case with NaN in each batch element and key head wherever no group of its heads has selected."""
    used = torch.zeros(given.memory_k.shape[:3], dtype=torch.bool)
    geometry = Geometry(**given.options)
    for b, _rows, _head, kv_head, tokens, *_ in reference_attention.tiles(
        given.q, given.k, given.memory_k, indices, geometry
    ):
        used[b, tokens, kv_head] = True
    memory = [x.masked_fill(~used.unsqueeze(-1), torch.nan) for x in (given.memory_k, given.memory_v)]
    return Case(given.q, given.k, given.v, *memory, given.options)


def state(given, indices):
    """Out and LSE of our own kernel."""
    return attend(*given.tensors().values(), indices, Geometry(**given.options))


def ours(given, indices, grad_out, grad_lse, wanted=EVERYTHING, result=None):
    out, lse = result or state(given, indices)
    inputs = given.tensors().values()
    return attend_backward(grad_out, grad_lse, *inputs, indices, out, lse, Geometry(**given.options), wanted)


def autograd(attention, given, grad_out, grad_lse):
    """Gradients of everything through `attention`, zero where there is none."""
    leaves = given.requires_grad()
    out, lse = attention(given)
    loss = (out * grad_out.to(out.dtype)).sum()
    if grad_lse is not None:
        loss = loss + (torch.where(lse == -torch.inf, 0.0, lse) * grad_lse.to(lse.dtype)).sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.nan_to_num(0.0) for g, x in zip(found, leaves, strict=True)]


def exact(given, indices, grad_out, grad_lse):
    def attention(wide):
        return reference_attention.attend(*wide.tensors().values(), indices, Geometry(**wide.options))

    return autograd(attention, given.to(torch.float64), grad_out, grad_lse)


def check(given, indices, with_lse=True):
    dtype = given.q.dtype
    grad_out = torch.randn(given.q.shape).to(dtype)
    grad_lse = torch.randn(given.q.shape[0], given.q.shape[2], given.q.shape[1]) if with_lse else None
    dirty = poisoned(given, indices)
    found = ours(dirty, indices, grad_out, grad_lse)
    truth = exact(dirty, indices, grad_out, grad_lse)
    yardstick = autograd(lambda x: dense_attention(x, indices), given, grad_out, grad_lse)
    for name, mine, dense, right in zip(NAMES, found, yardstick, truth, strict=True):
        assert mine.dtype == dtype and mine.shape == right.shape and mine.is_contiguous()
        assert_within_tolerance(mine, dense, right, f"gradient of {name}")


@settings(max_examples=10)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 2),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.sampled_from([16, 40, 64, 80, 96, 128]),
    st.sampled_from([(1, 3), (1, 20), (4, 6), (16, 33), (20, 50), (63, 63), (128, 140)]),
    st.sampled_from([0, 1, 15, 64, 100]),
    st.sampled_from([(1, 20, 20), (3, 37, 16), (2, 100, 64), (4, 10, 3), (2, 7, 100), (1, 130, 65), (0, 1, 16)]),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_odd_shapes(dtype, batch, heads, head_dim, queries, dense, bank, top_k, slots, with_lse, seed):
    torch.manual_seed(seed)
    if queries == (1, 20):  # one program per query of the reference: slow
        heads, batch = (2, 1), 1
    given, indices = case(dtype, batch=batch, heads=heads, head_dim=head_dim, queries=queries, dense=dense, bank=bank,
                          top_k=top_k, slots=slots)  # fmt: skip
    check(given, indices, with_lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_at_the_size_of_the_shipped_tiles(dtype):
    torch.manual_seed(0)
    check(*case(dtype, heads=(1, 1), head_dim=128, queries=(128, 150), dense=130, bank=(1, 136, 64), top_k=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_of_the_queries_in_two_launches(dtype, causal):
    """Over the bank, and over the window, where each query has blocks of its own that are shorter than a tile."""
    torch.manual_seed(6)
    given, indices = case(dtype, heads=(2, 1), queries=(2, 21), dense=70, bank=(2, 37, 16), top_k=3, slots=True)
    given.options["causal"] = causal
    everything = (*given.tensors().values(), indices)
    out, lse = state(given, indices)
    steps, _ = plan_attend_backward(out, lse, *everything, out, lse, Geometry(**given.options), EVERYTHING)
    names = [step.kernel.fn.__name__ for step in steps if hasattr(step, "kernel")]
    assert names.count("backward_queries_kernel") == 2
    check(given, indices)


def test_a_block_that_all_choose_and_blocks_that_nobody_chooses():
    torch.manual_seed(1)
    for group in (1, 8, 20):
        given, indices = case(torch.float32, heads=(4, 2), queries=(group, 20), bank=(2, 37, 16))
        indices = torch.full_like(indices[..., :2], -1)
        indices[..., 0] = 4
        indices[0, 3, -1] = torch.tensor([1, 4], dtype=torch.int32)
        check(given, indices)
        dirty = poisoned(given, indices)
        found = ours(dirty, indices, torch.randn_like(given.q), None)
        for grad in found[3:]:
            chosen = grad[0].abs().amax(-1) > 0  # [tokens, key heads]
            assert chosen[37 + 16 : 37 + 32].all() and chosen[16:32, 1].all()
            assert chosen.sum() == 16 * 2 + 16, "the others are zero, not left unwritten"


@pytest.mark.parametrize("group", [1, 8])
def test_a_block_chosen_twice_counts_twice(group):
    """By an index that is listed again, and by two bank frames that lie in one slot; indices out of range count not."""
    torch.manual_seed(2)
    given, indices = case(torch.float32, queries=(group, 20), bank=(3, 37, 16), top_k=3, slots=True)
    given.options["memory_slots"] = torch.tensor([[2, 9, 2]], dtype=torch.int32)  # 9 is clamped to 4
    wild = torch.tensor([0, 6, -5, 9, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(*indices.shape[:3], 6)
    check(given, torch.cat([indices, wild, indices[..., :1]], -1))


def test_rows_without_a_key():
    torch.manual_seed(3)
    given, indices = case(torch.float32, queries=(8, 20))
    indices[0, 1, 1] = -1
    check(given, indices)
    found = ours(given, indices, torch.randn_like(given.q), torch.randn(1, 2, 20))
    assert (found[0][0, 8:16, 1] == 0).all() and (found[0][0, :8, 1] != 0).any()
    found = ours(given, torch.full_like(indices, -1), torch.randn_like(given.q), torch.randn(1, 2, 20))
    assert all((grad == 0).all() for grad in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_neighbour_chose_does_not_matter(dtype):
    """Rows of a tile walk over the blocks of all of them: what is not finite stays with the rows that chose it."""
    torch.manual_seed(4)
    given, _ = case(dtype, heads=(1, 1), queries=(1, 40), bank=(1, 128, 16))
    indices = torch.rand(1, 1, 40, 7).argsort(-1)[..., :3].sort(-1).values.to(torch.int32)
    grad_out = torch.randn_like(given.q)
    clean = ours(given, indices, grad_out, None)
    kept = indices.clone()
    kept[0, 0, 11] = torch.tensor([0, 1, 7])  # the only row that chooses the last block
    for poison in (torch.nan, torch.inf):
        dirty = Case(given.q, given.k, given.v, given.memory_k.clone(), given.memory_v.clone(), given.options)
        dirty.memory_k[:, 112:, :, 3] = poison
        dirty.memory_v[:, 112:, :, 5] = poison
        found = ours(dirty, kept, grad_out, None)
        others = torch.arange(40) != 11
        assert torch.equal(found[0][:, others], clean[0][:, others])
        assert not found[0][0, 11].isfinite().any()
        for mine, dense in zip(found[3:], clean[3:], strict=True):
            untouched = [n for n in range(7) if not ((indices[0, 0, 11] == n) | (kept[0, 0, 11] == n)).any()]
            assert untouched
            for n in untouched:
                assert torch.equal(mine[:, 16 * n : 16 * n + 16], dense[:, 16 * n : 16 * n + 16])


@pytest.mark.parametrize("group", [1, 8])
def test_only_what_is_wanted_is_made(group):
    torch.manual_seed(5)
    given, indices = case(torch.bfloat16, heads=(1, 1), queries=(group, 20), dense=20, bank=(1, 37, 16))
    grad_out = torch.randn_like(given.q)
    everything = ours(given, indices, grad_out, None)
    out, lse = state(given, indices)
    names = {0: "queries", 1: "window", 2: "window", 3: "bank", 4: "bank"}
    for wanted in (*torch.eye(5).bool().tolist(), [True, True, True, False, False], [False] * 5):
        steps, gradients = plan_attend_backward(
            grad_out, None, *given.tensors().values(), indices, out, lse, Geometry(**given.options), wanted
        )
        parts = {names[i] for i in range(5) if wanted[i]}
        launched = [type(step).__name__ if not hasattr(step, "kernel") else step.kernel.__name__ for step in steps]
        assert ("backward_queries_kernel" in launched) == ("queries" in parts)
        assert launched.count("backward_keys_kernel") == ("window" in parts) + ("bank" in parts)
        assert launched.count("Sort") == ("bank" in parts)
        run_all(steps)
        for name, grad, want, full in zip(NAMES, gradients, wanted, everything, strict=True):
            assert torch.equal(grad, full) if want else grad is None, name


@pytest.mark.parametrize("group", [1, 8])
def test_any_strides_and_the_same_bits_twice(group):
    torch.manual_seed(6)
    given, indices = case(
        torch.bfloat16, batch=2, heads=(2, 1), dense=20, queries=(group, 21), bank=(2, 20, 16), slots=True
    )
    result = state(given, indices)
    grad_out, grad_lse = torch.randn_like(given.q), torch.randn_like(result[1])
    plain = ours(given, indices, grad_out, grad_lse, result=result)
    again = ours(given, indices, grad_out, grad_lse, result=result)

    def scattered(x):
        """The same values with every stride different, the last dimension contiguous."""
        room = torch.full((x.shape[2] + 1, x.shape[1] + 2, x.shape[0], 3 * x.shape[3]), torch.nan, dtype=x.dtype)
        view = room.permute(2, 1, 0, 3)[:, 1:-1, 1:, x.shape[3] : 2 * x.shape[3]]
        return view.copy_(x)

    tensors = {name: scattered(x) for name, x in given.tensors().items()}
    slots = given.options["memory_slots"].repeat(1, 2)[:, :2]
    moved = Case(**tensors, options={**given.options, "memory_slots": slots})
    lse_like = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)  # noqa: E731
    far = ours(moved, indices.repeat_interleave(2, -1)[..., ::2], scattered(grad_out), lse_like(grad_lse),
               result=(result[0], lse_like(result[1])))  # fmt: skip
    for mine, same, other in zip(plain, again, far, strict=True):
        assert torch.equal(mine, same) and torch.equal(mine, other)
    total = ours(given, indices, torch.ones(()).bfloat16().expand(given.q.shape), None, result=result)
    ones = ours(given, indices, torch.ones_like(given.q), None, result=result)
    assert all(torch.equal(a, b) for a, b in zip(total, ones, strict=True))


def layer(q, k, v, memory_k, memory_v, impl, **options):
    """Everything differentiable together: window and bank, a resumed state, LSEs."""
    sizes = dict(block_size=4, query_group=3, impl=impl)
    out, lse = ops.memory_attention(
        2 * q, k, v, memory_k, memory_v, top_k=2, frame_tokens=8, return_lse=True, **sizes, **options
    )
    indices = torch.tensor([0, 2, -1], dtype=torch.int32).expand(1, 2, 2, 3)
    more = ops.attend_selected(q, memory_k, memory_v, indices, frame_tokens=8, resume=(out, lse), **sizes)
    return more[0].sin().sum() + more[1].square().sum()


def layer_inputs():
    make = lambda tokens, heads: torch.randn(1, tokens, heads, 8, requires_grad=True)  # noqa: E731
    return make(5, 2), make(5, 1), make(5, 1), make(16, 1), make(16, 1)


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed", "cpu window"])
def test_through_the_op_as_through_the_reference(how):
    torch.manual_seed(7)
    inputs = layer_inputs()
    run, options = layer, {"dense_backend": "cpu"} if how == "cpu window" else {}
    if how == "compiled":
        run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    if how == "checkpointed":
        run = lambda *x: checkpoint(layer, *x, use_reentrant=False)  # noqa: E731
    found = torch.autograd.grad(run(*inputs, "triton", **options), inputs)
    expected = torch.autograd.grad(layer(*inputs, "reference"), inputs)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("group", [1, 3])
def test_the_op_is_registered_rightly(group):
    q, k, v, memory_k, memory_v = (x.detach() for x in layer_inputs())
    indices = torch.tensor([0, 2], dtype=torch.int32).expand(1, 2, -(-5 // group), 2)
    slots = torch.tensor([[1, 0]], dtype=torch.int32)
    lse = torch.randn(1, 2, 5)
    tables = (slots, torch.tensor([4], dtype=torch.int32), None)
    arguments = (torch.randn_like(q), lse, q, k, v, memory_k, memory_v, indices, *tables, torch.randn_like(q), lse)
    sizes = ([True, False, True, True, False], 4, 8, group, 0.3, True, "triton")
    result = opcheck(torch.ops.memflow_ops.attend_backward.default, (*arguments, *sizes))
    assert set(result.values()) == {"SUCCESS"}


def test_inputs_that_need_no_gradient_cost_nothing(monkeypatch):
    """The bank of a stream is detached: its gradients are not asked for."""
    q, k, v, memory_k, memory_v = layer_inputs()
    seen = []
    original = registered.attend_backward
    monkeypatch.setattr(registered.attention, "attend_backward", lambda *a: seen.append(a[13]) or original(*a))
    out = ops.memory_attention(q, k, v.detach(), memory_k.detach(), memory_v.detach(), frame_tokens=8, block_size=4,
                               query_group=3, top_k=2, impl="triton")  # fmt: skip
    out.sum().backward()
    assert seen == [[True, True, False, False, False]]
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
