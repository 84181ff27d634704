"""The toy world in a few steps, which is what live sessions are tested with."""

import pytest
import torch

from memflow_ops.model.live.world import toy_world


@pytest.fixture(scope="session")
def world():
    return toy_world(torch.device("cpu"), chunks=40, changes={"steps": 2})
