"""Cases of attention moved to a GPU, and run there by the kernels."""

import pytest
import torch
from attention_cases import Case

import memflow_ops as ops
from memflow_ops.ops import registration as registered


def on_gpu(case: Case) -> Case:
    move = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x  # noqa: E731
    tensors = {name: move(x) for name, x in case.tensors().items()}
    return Case(**tensors, options={name: move(x) for name, x in case.options.items()})


def run_with_indices(case: Case, **options):
    """Out, LSE, and the selection that they were made with."""
    results = []
    original = registered.memory_attention

    def spy(*arguments):
        results.append(original(*arguments))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registered, "memory_attention", spy)
        ops.memory_attention(*case.tensors().values(), **case.options, impl="triton", **options)
    return results[0]
