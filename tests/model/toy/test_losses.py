"""The relevance loss: its value by hand, and where its gradients go."""

import torch
import torch.nn.functional as F

from memflow_ops.model.toy.language import NOBODY
from memflow_ops.model.toy.losses import (
    relevance_loss,
    training_losses,
)
from memflow_ops.model.toy.schedule import (
    TOY_CONFIG,
    TrainingSettings,
    TrainingStage,
)
from memflow_ops.model.wan.transformer import CausalVideoModel

SMALL = TrainingStage(steps=20, size=16, batch=2, shift=4.0, foreground=3.0)


def test_relevance_loss_by_hand():
    """Two frames, one prompt naming whom the first shows: softplus of the wrong score minus the right one."""
    means = [torch.zeros(2, 2, 4)]
    means[0][0, :, 0], means[0][1, :, 0] = 1.0, 3.0
    keys = torch.zeros(2, 3, 2, 4)
    keys[:, 1:, :, 0] = 2.0  # the place prefers no frame
    ids = torch.tensor([[0, NOBODY, 1], [NOBODY, NOBODY, 2]])
    scores = torch.tensor([1.0, 3.0]) * 2.0 / 4**0.5  # mean over heads of q . k / sqrt(4)
    got = relevance_loss(means, [(keys, keys)], ids)
    torch.testing.assert_close(got, F.softplus(scores[1] - scores[0]))

    keys[:, 0, :, 0] = 2.0  # now it prefers the second: the variance is on top
    torch.testing.assert_close(relevance_loss(means, [(keys, keys)], ids) - got, scores.var())

    # The second word asks for its own character: the frame of the other is wrong for it, although it is named too.
    keys[:, 0] = 0.0
    pair = torch.tensor([[0, 1, 1], [1, NOBODY, 2]])
    means[0][0, :, 0], means[0][1, :, 0] = 3.0, 1.0
    right = relevance_loss(means, [(keys, keys)], pair)
    asked = [scores[1] - scores[0]]  # row 1, its character is in both frames: nothing to tell apart; row 0, word 0
    torch.testing.assert_close(right, F.softplus(-torch.stack(asked)).mean())


def test_relevance_loss_reaches_the_self_attention_keys(batch):
    model = CausalVideoModel(TOY_CONFIG)
    losses = training_losses(model, batch, SMALL, TrainingSettings(), torch.Generator().manual_seed(4))
    losses.relevance.backward()
    for block in model.blocks:
        assert block.self_attn.k.weight.grad.abs().max() > 0
        assert block.cross_attn.k.weight.grad.abs().max() > 0
