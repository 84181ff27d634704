"""The implementations of the operators: `impl="NAME"` of an operator runs the module `memflow_ops.impl.NAME`.

Every implementation has the same functions, which take arguments that the public operators have checked:

    describe_blocks(k, block_size, frame_tokens) -> descriptors
    select_blocks(q, descriptors, top_k, geometry) -> indices
    attend(q, k, v, memory_k, memory_v, indices, geometry, resume=None, memory_q=None) -> out, lse
    attend_backward(grad_out, grad_lse, q, k, v, memory_k, memory_v, indices, out, lse, geometry, wanted)
        -> the gradients of q, k, v, memory_k and memory_v, None where `wanted` (five bools) says False
    write_projections(q, k, v, rotation, norm, target, memory_rotation=(None, None), memory_q=None) -> the rotated q
    retrieve_frames(text_keys, means, candidates, text_lengths, weights, count, score, redundancy, softmax_scale)
        -> indices, scores

`k` and `v`, or `memory_k` and `memory_v`, are None where there is no dense segment or no bank; `resume` is the (out,
lse) of attention over other keys; `memory_q` is what attends to the bank instead of q. `rotation` is the cosines and
sines (1 or B, F * T, D / 2), `memory_rotation` those that the queries written to memory_q are turned by, or those of
their leading pairs; `norm` is the two weights, None where there is nothing to normalise, and epsilon. All else has the
shapes of the public operators.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

NOT_INSTALLED = "not installed"


def implementation_of(impl: str, device: torch.device) -> ModuleType:
    """The module `memflow_ops.impl.<impl>`. It is imported on first use, so that only Triton's users need Triton.

    Raises a ValueError, with the reason, if it cannot run on tensors of this device.
    """
    reason = why_no_triton(device) if impl == "triton" else ""
    if reason:
        raise ValueError(f"impl='triton' cannot run on tensors on {device}: {reason}; impl='torch' runs everywhere")
    return _module(impl)


@functools.cache
def _module(impl: str) -> ModuleType:
    return importlib.import_module(f"memflow_ops.impl.{impl}")


def why_no_triton(device: torch.device) -> str:
    """The reason why our kernels cannot run on tensors of this device; "" if they can."""
    reason = why_not_import("triton")
    if reason:
        return f"triton is {NOT_INSTALLED} (pip install triton)" if reason == NOT_INSTALLED else reason
    if device.type == "cpu":
        from triton import knobs

        if not knobs.runtime.interpret:
            return "no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly on a CPU, for tests"
    return ""


@functools.cache
def why_not_import(name: str) -> str:
    """The reason why an optional module cannot be imported: NOT_INSTALLED, or what its import raises; "" if it can.

    A package that is there may still fail, in many ways, for example if it was built for another version of torch.
    """
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            return NOT_INSTALLED
        return f"the import of {name} fails: {error}"
    except Exception as error:
        first_line = (str(error).strip().splitlines() or ["without a message"])[0]
        return f"the import of {name} fails: {type(error).__name__}: {first_line[:200]}"
    return ""
