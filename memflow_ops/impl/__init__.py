"""The implementations of the operators: `impl="NAME"` of an operator runs the module `memflow_ops.impl.NAME`.

Every implementation has the same functions, which take arguments that the public operators have checked:

    describe_blocks(k, block_size, frame_tokens) -> descriptors
    select_blocks(q, descriptors, top_k, geometry) -> indices
    attend(q, k, v, memory_k, memory_v, indices, geometry, resume=None) -> out, lse
    attend_backward(grad_out, grad_lse, q, k, v, memory_k, memory_v, indices, out, lse, geometry, wanted)
        -> the gradients of q, k, v, memory_k and memory_v, None where `wanted` (five bools) says False
    write_projections(q, k, v, rotation, norm, target) -> the rotated q
    retrieve_frames(text_keys, means, candidates, text_lengths, weights, count, score, redundancy, softmax_scale)
        -> indices, scores

One that can select and attend in one launch also has

    select_and_attend(q, k, v, memory_k, memory_v, descriptors, top_k, geometry, resume=None) -> out, lse, indices

`k` and `v`, or `memory_k` and `memory_v`, are None where there is no dense segment or no bank; `resume` is the
(out, lse) of attention over other keys. `rotation` is the cosines and sines (1 or B, F * T, D / 2); `norm` is the two
weights, None where there is nothing to normalise, and epsilon. All else has the shapes of the public operators.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def implementation_of(impl: str) -> ModuleType:
    """The module `memflow_ops.impl.<impl>`. It is imported on first use, so that only Triton's users need Triton."""
    return importlib.import_module(f"memflow_ops.impl.{impl}")
