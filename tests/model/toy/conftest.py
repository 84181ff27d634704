"""What the tests of the toy world share."""

import pytest
import torch

from memflow_ops.model.toy.losses import TrainingBatch, draw_batch


@pytest.fixture(scope="module")
def batch() -> TrainingBatch:
    """Twelve clips at half resolution."""
    return draw_batch(12, 16, torch.Generator().manual_seed(0))
