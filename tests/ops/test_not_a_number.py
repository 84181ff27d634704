"""NaN and infinities among queries, keys and values: every implementation gives NaN where the reference does."""

import pytest
import torch
from nan_cases import OPTIONS, SPOILED, assert_alike, make_inputs, spoil

import memflow_ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", ["own", "cpu"])
@pytest.mark.parametrize("bank", [True, False], ids=["bank", "no-bank"])
@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_is_seen_wherever_it_is_attended_to(dtype, name, bank, backend):
    tensors = make_inputs(dtype)
    if not bank and name.startswith("memory"):
        pytest.skip("there is no bank")
    if bank:  # Selection is not what is asked for here, and NaN in a key would decide it.
        descriptors = memflow_ops.describe_blocks(tensors["memory_k"], 4, 10)
        options = dict(memory_descriptors=descriptors, **OPTIONS)
    else:
        options = {}
        tensors["memory_k"] = tensors["memory_v"] = None
    spoil(tensors, name)
    run = lambda **chosen: memflow_ops.memory_attention(**tensors, **options, **chosen, return_lse=True)  # noqa: E731
    expected = run(impl="reference")
    if name == "q":
        assert expected[0][1, 2, 1].isnan().all() and expected[1][1, 1, 2].isnan()
        assert expected[0].isnan().sum() == 8
    assert_alike(run(impl="torch", dense_backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 3, 17, 70])
def test_windows_of_any_length(keys, dtype):
    """Torch's kernel works on vectors of keys: what is left over has code of its own."""
    for name in SPOILED[:3]:
        tensors = make_inputs(dtype, queries=70, keys=keys, size=16)
        tensors[name][0, 0, 0, 0] = torch.nan
        window = [tensors[n] for n in SPOILED[:3]]
        run = lambda impl: memflow_ops.memory_attention(*window, impl=impl, return_lse=True)  # noqa: B023, E731
        assert_alike(run("torch"), run("reference"))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_a_query_of_infinities(value):
    """Its scores are infinities of both signs in sum, and so NaN."""
    tensors = make_inputs(torch.float32)
    descriptors = memflow_ops.describe_blocks(tensors["memory_k"], 4, 10)
    tensors["q"][1, 2, 1] = value
    options = dict(memory_descriptors=descriptors, return_lse=True, **OPTIONS)
    got, expected = (memflow_ops.memory_attention(**tensors, **options, impl=impl) for impl in ("torch", "reference"))
    assert expected[0][1, 2, 1].isnan().all()
    assert_alike(got, expected)


@pytest.mark.parametrize("where", ["q", "k", "v", "resumed out", "resumed lse", "no keys"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attend_selected_and_a_resumed_state(dtype, where):
    tensors = make_inputs(dtype)
    q, memory_k, memory_v = (tensors[name] for name in ("q", "memory_k", "memory_v"))
    state = list(memflow_ops.memory_attention(q, tensors["k"], tensors["v"], return_lse=True))
    indices = torch.tensor([0, 2], dtype=torch.int32).expand(2, 4, 3, 2).clone()
    if where == "resumed out":
        state[0][1, 2, 1, 3] = torch.nan
    elif where == "resumed lse":
        state[1][1, 1, 2] = torch.nan
    elif where == "no keys":
        indices[1] = -1
        state[1][1, 1, 2], state[0][1, 2, 1, 3] = torch.nan, torch.nan
        state[1][1, 1, 3], state[0][1, 3, 1, 3] = -torch.inf, torch.nan  # This state has no key, so its out is ignored.
    else:
        spoil({"q": q, "k": memory_k, "v": memory_v}, where)
    options = dict(block_size=4, query_group=3, frame_tokens=10)
    for resume in (state, None):
        got, expected = (
            memflow_ops.attend_selected(q, memory_k, memory_v, indices, resume=resume, impl=impl, **options)
            for impl in ("torch", "reference")
        )
        assert_alike(got, expected)


def test_gradients_of_a_spoiled_query_are_nan():
    tensors = {name: x.requires_grad_() for name, x in make_inputs(torch.float32).items()}
    with torch.no_grad():
        spoil(tensors, "q")
    found = []
    for impl in ("reference", "torch"):
        out = memflow_ops.memory_attention(**tensors, **OPTIONS, impl=impl)
        found.append(torch.autograd.grad(out.sum(), list(tensors.values())))
    assert_alike(found[1], found[0])
    assert found[1][1][1, :, 0].isnan().any()


def test_merging_keeps_nan():
    out, lse = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3)
    spoiled = lse.clone()
    spoiled[0, 1, 2] = torch.nan
    for merged in (memflow_ops.merge_states(out, spoiled, out, lse), memflow_ops.merge_states(out, lse, out, spoiled)):
        assert merged[0].isnan().sum() == 4 and merged[0][0, 2, 1].isnan().all()
        assert merged[1].isnan().sum() == 1 and merged[1][0, 1, 2].isnan()
