"""Valid frames for each query group: what a causal model needs, up to the attention of MoBA in one call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memflow_ops

BOTH = pytest.mark.parametrize("impl", ["reference", "torch"])


def groups_one_by_one(q, descriptors, frames, group, **options):
    """The selection of each group alone, with its own number of valid frames in `memory_frames` (B,)."""
    parts = q.split(group, 1)
    calls = [
        memflow_ops.select_blocks(x, descriptors, query_group=None, memory_frames=frames[:, g].contiguous(), **options)
        for g, x in enumerate(parts)
    ]
    return torch.cat(calls, 2)


@BOTH
@settings(max_examples=30)
@given(
    st.sampled_from([(1, 1), (1, 9), (4, 21), (16, 33)]),
    st.integers(1, 5),
    st.integers(1, 14),
    st.booleans(),
    st.integers(0, 99),
)
def test_each_group_selects_as_if_it_were_alone(impl, queries, frames, top_k, slots, seed):
    torch.manual_seed(seed)
    (group, length), groups = queries, -(-queries[1] // queries[0])
    q, descriptors = torch.randn(2, length, 4, 8), torch.randint(-2, 3, (2, 3 * frames, 2, 8)).float()
    counts = torch.randint(-1, frames + 2, (2, 2 * groups), dtype=torch.int32)[:, ::2]  # strides of their own
    table = torch.randint(0, frames, (2, 4), dtype=torch.int32) if slots else None
    options = dict(top_k=top_k, blocks_per_frame=3, memory_slots=table, impl=impl)
    found = memflow_ops.select_blocks(q, descriptors, query_group=group, memory_frames=counts, **options)
    assert torch.equal(found, groups_one_by_one(q, descriptors, counts, group, **options))


@BOTH
def test_attention_follows_the_groups(impl):
    q, k, bank = torch.randn(1, 6, 2, 8), torch.randn(1, 3, 1, 8), torch.randn(1, 12, 1, 8)
    options = dict(top_k=2, block_size=2, frame_tokens=4, query_group=2, impl=impl)
    counts = torch.tensor([[0, 1, 3]], dtype=torch.int32)
    out = memflow_ops.memory_attention(q, k, k, bank, bank, memory_frames=counts, **options)
    for g in range(3):
        alone = q[:, 2 * g : 2 * g + 2]
        right = memflow_ops.memory_attention(alone, k, k, bank, bank, memory_frames=counts[:, g], **options)
        torch.testing.assert_close(out[:, 2 * g : 2 * g + 2], right)


def test_what_is_refused():
    q, bank = torch.randn(2, 6, 2, 8), torch.randn(2, 12, 1, 8)
    for shape, words in (
        ((2, 4), r"\(2, 3\), got \(2, 4\)"),
        ((2, 3, 1), r"\(2\) or, for every query group, \(2, 3\)"),
    ):
        frames = torch.ones(shape, dtype=torch.int32)
        with pytest.raises(ValueError, match=words):
            memflow_ops.select_blocks(q, bank, 2, query_group=2, memory_frames=frames)
        with pytest.raises(ValueError, match=words):
            memflow_ops.memory_attention(q, bank, bank, bank, bank, query_group=2, memory_frames=frames)


# MoBA (arXiv 2502.13189): a query attends causally to its own block, and to the top_k earlier blocks whose mean key has
# the highest product with it.


def moba_in_loops(q, k, v, block, top_k):
    """Query by query and in float64."""
    batch, queries, heads, size = q.shape
    repeat = heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, :, h // repeat], v[b, :, h // repeat]
            means = keys.unflatten(0, (-1, block)).mean(1)
            for i in range(queries):
                own = i // block
                chosen = (means[:own] @ q[b, i, h]).sort(descending=True).indices[:top_k].tolist()
                tokens = [t for n in chosen for t in range(n * block, (n + 1) * block)]
                tokens += range(own * block, i + 1)
                weights = (keys[tokens] @ q[b, i, h] * size**-0.5).softmax(0)
                out[b, i, h] = weights @ values[tokens]
    return out


def moba_folded(q, k, v, block, top_k, impl):
    """One call: the blocks are batch elements, with themselves as causal window and the earlier ones as the bank.

    The bank of all of them is the same memory, and its slot table gives each its own sequence.
    """
    batch, blocks = q.shape[0], q.shape[1] // block
    fold = lambda x: x.reshape(batch * blocks, block, *x.shape[2:])  # noqa: E731
    memory = [x.reshape(1, -1, *x.shape[2:]).expand(batch * blocks, -1, -1, -1) for x in (k, v)]
    number = torch.arange(batch * blocks, dtype=torch.int32)
    slots = (number // blocks * blocks).unsqueeze(1) + torch.arange(blocks, dtype=torch.int32)
    out = memflow_ops.memory_attention(
        fold(q), fold(k), fold(v), *memory, causal=True, memory_frames=number % blocks, memory_slots=slots,
        frame_tokens=block, block_size=block, query_group=1, top_k=top_k, impl=impl,
    )  # fmt: skip
    return out.reshape(q.shape)


def moba_by_query(q, k, v, block, top_k, impl):
    """The same with whole sequences: one call selects for all queries, with valid frames for each of them."""
    batch, queries = q.shape[:2]
    fold = lambda x: x.reshape(batch * queries // block, block, *x.shape[2:])  # noqa: E731
    earlier = (torch.arange(queries, dtype=torch.int32) // block).expand(batch, -1)
    indices = memflow_ops.select_blocks(
        q, memflow_ops.describe_blocks(k, block, block, impl=impl), top_k, query_group=1, memory_frames=earlier,
        blocks_per_frame=1, impl=impl,
    )  # fmt: skip
    out, lse = memflow_ops.memory_attention(fold(q), fold(k), fold(v), causal=True, return_lse=True, impl=impl)
    own = out.reshape(q.shape), lse.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2)
    out, _ = memflow_ops.attend_selected(
        q, k, v, indices, block_size=block, frame_tokens=block, query_group=1, resume=own, impl=impl
    )
    return out


@pytest.mark.parametrize("moba", [moba_folded, moba_by_query])
@BOTH
def test_moba_with_its_gradients(impl, moba):
    make = lambda heads: torch.randn(2, 40, heads, 8, dtype=torch.float64, requires_grad=True)  # noqa: E731
    inputs, weight = (make(4), make(2), make(2)), torch.randn(2, 40, 4, 8, dtype=torch.float64)
    found, right = moba(*inputs, 8, 2, impl), moba_in_loops(*inputs, 8, 2)
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(*(torch.autograd.grad((x * weight).sum(), inputs) for x in (found, right)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
