"""NaN among queries, keys and values: the kernels give NaN where the reference does."""

import pytest
import torch
from nan_cases import OPTIONS, SPOILED, assert_alike, make_inputs, spoil

import memflow_ops


@pytest.mark.parametrize("backend", ["own", "cpu"])
@pytest.mark.parametrize("name", SPOILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_nan_is_seen_wherever_it_is_attended_to(dtype, name, backend):
    tensors = make_inputs(dtype, size=16)
    descriptors = memflow_ops.describe_blocks(tensors["memory_k"], 4, 10, impl="torch")
    spoil(tensors, name)
    options = dict(memory_descriptors=descriptors, return_lse=True, **OPTIONS)
    expected = memflow_ops.memory_attention(**tensors, **options, impl="reference")
    got = memflow_ops.memory_attention(**tensors, **options, impl="triton", dense_backend=backend)
    assert_alike(got, expected)


@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_nan_in_a_resumed_state_stays(name):
    tensors = make_inputs(torch.float32, size=16)
    q, memory_k, memory_v = (tensors[name] for name in ("q", "memory_k", "memory_v"))
    out, lse = memflow_ops.memory_attention(q, tensors["k"], tensors["v"], return_lse=True, impl="reference")
    (out if name == "out" else lse)[1, 1, 1] = torch.nan
    indices = torch.tensor([0, 2], dtype=torch.int32).expand(2, 4, 3, 2)
    options = dict(block_size=4, frame_tokens=10, query_group=3, resume=(out, lse))
    got, expected = (
        memflow_ops.attend_selected(q, memory_k, memory_v, indices, impl=impl, **options)
        for impl in ("triton", "reference")
    )
    assert_alike(got, expected)
