"""The choice of the bank where every rank has the keys of its own heads: one exchange, and the same frames on all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memflow_ops.cache.policies import Coverage, DeviceChoice, Policy, Random, Relevance, Retrieved
from memflow_ops.cache.views import Candidates
from memflow_ops.impl.precision import wide_dtype
from memflow_ops.impl.torch import retrieval
from memflow_ops.model.parallel.ranks import Ranks
from memflow_ops.ops.retrieval import block_weights


class SplitPolicy:
    """`Relevance` or `Coverage` over the heads of all ranks.

    Both go by means over heads, so each rank sends the mean over its own, (B, F) numbers (with redundancy B * F * F
    more, for coverage (B, text tokens, F)), once per chunk. All ranks then choose from the same numbers.
    """

    def __init__(self, policy: Relevance | Coverage, ranks: Ranks):
        self.policy, self.ranks = policy, ranks

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        return self.choose_on_device(candidates, text_keys, text_lengths).read()

    def choose_on_device(
        self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor
    ) -> DeviceChoice:
        """As `Policy.choose`, without reading the choice. text_keys: of this rank's heads, as the candidates' means."""
        text, frames = torch.stack(list(text_keys)), len(candidates.frames[0])
        means, rows = candidates.stored, candidates.rows
        weights = block_weights(candidates.lengths, len(candidates.lengths), text)
        wide = wide_dtype(text.dtype, means.dtype)
        scale, count = text.shape[-1] ** -0.5, min(self.policy.bank_frames, frames)
        if isinstance(self.policy, Coverage):
            logits = self.ranks.mean(retrieval.word_logits(text, means, rows, weights, scale, wide))
            shares = retrieval.word_shares(logits, text_lengths)
            indices, scores = retrieval.cover(shares, count), retrieval.mean_share(shares, text_lengths)
        else:
            of = (text_lengths, weights, self.policy.score, scale, wide)
            scores = retrieval.mean_relevance(text, means, rows, *of)
            parts = [scores[..., None]]
            if self.policy.redundancy is not None:
                vectors = retrieval.frame_vectors(candidates.means, weights, wide)
                parts.append(vectors @ vectors.mT)
            scores, *products = self.ranks.mean(torch.cat(parts, -1)).split([1, frames][: len(parts)], -1)
            scores = retrieval.finite(scores[..., 0])
            cosines = None
            for product in products:
                lengths = product.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-12)
                cosines = product / lengths[:, :, None] / lengths[:, None]
            indices = retrieval.take_unlike(scores, cosines, count, self.policy.redundancy)
        return DeviceChoice(candidates.frames, indices.int(), scores.gather(1, indices))


def split_policy(policy: Policy | None, ranks: Ranks) -> Policy | None:
    """The policy, as all ranks can follow it together. A ValueError for one that is not known here, because it might
    choose other frames on every rank."""
    if policy is None or type(policy) is Random:
        return policy
    if isinstance(policy, (Relevance, Coverage)) and type(policy) in (Relevance, Coverage):
        return SplitPolicy(policy, ranks)
    raise ValueError(
        f"with several processes the bank is chosen by Relevance, Coverage or Random, got a {type(policy).__name__}: a "
        f"process sees the keys of its own heads only, and all must choose the same frames"
    )
