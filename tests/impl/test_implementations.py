"""What the implementations share: one interface, and imports on first use."""

import inspect
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from memflow_ops.impl import implementation_of
from memflow_ops.ops.registration import dispatch


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_every_implementation_has_the_functions_of_the_reference(impl):
    reference, other = (implementation_of(name, torch.device("cpu")) for name in ("reference", impl))
    assert set(other.__all__) == set(reference.__all__)
    for name in reference.__all__:
        parameters = [list(inspect.signature(getattr(module, name)).parameters) for module in (reference, other)]
        assert parameters[0] == parameters[1], name


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
        except ValueError as error:
            assert "triton is not installed (pip install triton)" in str(error)
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr


def test_triton_without_a_gpu_is_refused_before_anything_runs():
    program = """
        import torch
        from memflow_ops import (attend_selected, describe_blocks, memory_attention, retrieve_frames, select_blocks,
                                 write_projections)
        q = torch.randn(1, 8, 2, 16)
        rotation, places = (torch.ones(1, 8, 1, 8), torch.zeros(1, 8, 1, 8)), torch.zeros(1, 1, dtype=torch.int32)
        pools = torch.full((2, 1, 8, 2, 16), 7.0)
        chosen = torch.zeros(1, 2, 1, 1, dtype=torch.int32)
        calls = [
            lambda: memory_attention(q, q, q, impl="triton"),
            lambda: memory_attention(q.requires_grad_(), q, q, q, q, impl="triton", dense_backend="cpu"),
            lambda: attend_selected(q, q, q, chosen, block_size=4, impl="triton"),
            lambda: describe_blocks(q, 4, impl="triton"),
            lambda: select_blocks(q, q, 2, impl="triton"),
            lambda: retrieve_frames(q[None], q[None, :, :, None], 2, impl="triton"),
            lambda: write_projections(q.detach(), q.detach(), q.detach(), rotation, *pools, places, frame_tokens=8,
                                      impl="triton"),
        ]
        for call in calls:
            try:
                call()
            except ValueError as error:
                assert str(error) == (
                    "impl='triton' cannot run on tensors on cpu: no CUDA device; TRITON_INTERPRET=1 runs the kernels "
                    "slowly on a CPU, for tests; impl='torch' runs everywhere"
                ), error
                print("refused")
        assert (pools == 7).all()
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["refused"] * 7, done.stderr


def test_auto_is_torch_on_a_cpu():
    assert dispatch.resolve("auto", torch.empty(1)) == "torch"
