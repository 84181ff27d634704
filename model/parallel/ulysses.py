"""One video on several ranks: the tokens of a chunk are dealt out, and inside self-attention the heads instead.

This is the scheme of DeepSpeed-Ulysses (arXiv 2309.14509). A rank runs norms, projections, cross-attention and
feed-forward on its part of a chunk's tokens. Before self-attention one all-to-all brings it the queries, keys and
values of all tokens, but of its heads only; after it another one brings the results of all heads back for its own
tokens. Selection, bank and history belong to a head each, so a rank that owns some heads needs nothing of the others:
its cache holds these heads, and what is sent per layer does not depend on how long the past is.
"""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.cache.attend import Attend
from memflow_ops.model.parallel.ranks import Ranks, lost_if_it_fails
from memflow_ops.ops.registration.dispatch import needs_grad
from memflow_ops.token_order import TokenOrder


def tokens_to_heads(tensors: list[Tensor], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """From this rank's tokens and all heads to all tokens and this rank's heads, in one all-to-all.

    tensors: each (B, own tokens, heads, D) with a number of heads that the number of ranks divides; queries may have
        more heads than keys and values. sizes: the tokens of every rank, in their order. Gradients flow back the same
        way. Returns each as (B, sum(sizes), heads / ranks, D), with a contiguous last dimension.
    """
    batch, own, _, width = tensors[0].shape
    ranks = len(sizes)
    parts = [x.unflatten(2, (ranks, -1)) for x in tensors]
    packed = torch.cat(parts, 3).permute(2, 1, 0, 3, 4)  # (ranks, own tokens, B, heads of a rank, D)
    rows = _all_to_all(packed.flatten(2).flatten(0, 1), sizes, [own] * ranks, group)
    heads = rows.view(sum(sizes), batch, -1, width).transpose(0, 1)
    return list(heads.split([part.shape[3] for part in parts], 2))


def heads_to_tokens(x: Tensor, sizes: list[int], own: int, group: dist.ProcessGroup) -> Tensor:
    """The way back of `tokens_to_heads`: from all tokens and this rank's heads, (B, sum(sizes), heads / ranks, D), to
    this rank's tokens and all heads, (B, own, heads, D)."""
    batch, _, heads, width = x.shape
    ranks = len(sizes)
    rows = _all_to_all(x.transpose(0, 1).flatten(1), [own] * ranks, sizes, group)
    return rows.view(ranks, own, batch, heads, width).permute(2, 1, 0, 3, 4).flatten(2, 3)


def _all_to_all(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """Sends so many consecutive rows to every rank, and returns those received, in the order of the ranks."""
    # torch 2.11 has one with a gradient and one without; later ones have made them the same.
    exchange = functional.all_to_all_single_autograd if needs_grad(rows) else functional.all_to_all_single
    if torch.compiler.is_compiling():
        return functional.wait_tensor(exchange(rows.contiguous(), received, sent, group))
    with lost_if_it_fails():
        return functional.wait_tensor(exchange(rows.contiguous(), received, sent, group))


class SplitTokens:
    """How the tokens of one pass are dealt out to the ranks: consecutive ones, equally many or one more to the first.

    For the model it is an order of tokens: `apply` takes the rank's own, and `undo` brings all together. No gradient
    passes `undo`.
    """

    def __init__(self, ranks: Ranks, tokens: int, order: TokenOrder | None = None):
        """tokens: of the whole pass. order: of the tokens of a frame, before they are dealt out."""
        self.ranks, self.order, self.sizes = ranks, order, ranks.tokens(tokens)
        self.own = self.sizes[ranks.rank]
        self._first = sum(self.sizes[: ranks.rank])

    def apply(self, x: Tensor) -> Tensor:
        """This rank's tokens (B, own, ...) of x (B, tokens, ...) in raster order."""
        x = x if self.order is None else self.order.apply(x)
        return x[:, self._first : self._first + self.own]

    def undo(self, x: Tensor) -> Tensor:
        """All tokens (B, tokens, ...) in raster order, of x (B, own, ...) on every rank."""
        if needs_grad(x):
            raise NotImplementedError("tokens that are dealt out to several processes are gathered without gradients")
        longest = max(self.sizes)
        rows = F.pad(x.transpose(0, 1).flatten(1), (0, 0, 0, longest - self.own))
        parts = self.ranks.gather(rows)
        whole = torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])
        whole = whole.unflatten(1, (len(x), *x.shape[2:])).transpose(0, 1)
        return whole if self.order is None else self.order.undo(whole)

    def attend(self, attend: Attend, unused: int | None = None) -> Attend:
        """An `Attend` for this rank's tokens and all heads, from one for all tokens and this rank's heads.

        unused: a layer whose result nobody reads, so that it is not sent back.
        """
        sizes, own, group = self.sizes, self.own, self.ranks.group

        def split(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = attend(layer, *tokens_to_heads([q, k, v], sizes, group))
            return q if layer == unused else heads_to_tokens(out, sizes, own, group)

        return split
