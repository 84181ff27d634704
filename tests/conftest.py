"""What every test stands on: seeded, and memory that nobody has written reads as NaN."""

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("memflow", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("memflow")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin fill with NaN, so that an output left unwritten is noticed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
