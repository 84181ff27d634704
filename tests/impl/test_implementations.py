"""What the implementations share: one interface, and imports on first use."""

import inspect
import subprocess
import sys
import textwrap

import pytest
import torch

from memflow_ops.impl import implementation_of
from memflow_ops.ops.registration import dispatch


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_every_implementation_has_the_functions_of_the_reference(impl):
    reference, other = implementation_of("reference"), implementation_of(impl)
    assert set(other.__all__) - {"select_and_attend"} == set(reference.__all__)
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
        except ImportError:
            print("refused")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout.strip() == "refused", done.stderr


def test_auto_is_torch_on_a_cpu():
    assert dispatch.resolve("auto", torch.empty(1)) == "torch"
