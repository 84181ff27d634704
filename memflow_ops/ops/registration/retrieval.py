"""The operators of retrieval, as torch sees them: schema and fake."""

from __future__ import annotations

import torch
from torch import Tensor

from memflow_ops.impl import implementation_of
from memflow_ops.impl.precision import wide_dtype, without_autocast
from memflow_ops.impl.torch import retrieval

_library = torch.library.Library("memflow_ops", "FRAGMENT")
_library.define(
    "frame_relevance(Tensor text_q, Tensor frame_keys, Tensor? text_lengths, Tensor block_weights, "
    "str score, float softmax_scale) -> Tensor"
)
# This is a composite of torch's own operators: its gradient and its fake follow from its parts.
_library.impl("frame_relevance", retrieval.frame_relevance, "CompositeImplicitAutograd")
frame_relevance = torch.ops.memflow_ops.frame_relevance


@torch.library.custom_op("memflow_ops::retrieve_frames", mutates_args=())
def retrieve_frames(
    text_keys: Tensor,
    means: Tensor,
    candidates: Tensor | None,
    text_lengths: Tensor | None,
    weights: Tensor,
    count: int,
    score: str,
    redundancy: float | None,
    softmax_scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    tensors = (text_keys, means, candidates, text_lengths, weights)
    with without_autocast(text_keys):
        return implementation_of(impl, text_keys.device).retrieve_frames(
            *tensors, count=count, score=score, redundancy=redundancy, softmax_scale=softmax_scale
        )


@retrieve_frames.register_fake
def _(text_keys, means, candidates, text_lengths, weights, count, *rest) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(text_keys.dtype, means.dtype)
    size = (text_keys.shape[1], count)
    return text_keys.new_empty(size, dtype=torch.int32), text_keys.new_empty(size, dtype=wide)
