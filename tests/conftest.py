"""What every test stands on: one thread, interpreted kernels, seeds, and memory that reads as NaN until it is written.

Triton decides at its import whether it interprets, and an interpreted kernel cannot be compiled. So every test process
interprets, where there is no GPU, and what a test wants compiled is compiled in a process of its own (the fixture
`compiling` in kernels/conftest.py).
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

# Two test processes with two threads each would wait for one another most of the time: their tensors are small.
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Where the tests run in the background, Ctrl-C is ignored, and would be in the commands that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "memflow",
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # To shrink an example takes minutes in the interpreter.
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("memflow")

FROM_THE_GROUND_UP = ("kernels", "ptx", "impl", "ops", "cache", "integrations", "model", "wan", "bench", "cli")


def pytest_collection_modifyitems(items):
    """Tests run in the order of the floors, so that the first failure is the one that explains the others."""

    def floor(item):
        room = Path(item.path).relative_to(Path(__file__).parent).parts[0]
        return FROM_THE_GROUND_UP.index(room) if room in FROM_THE_GROUND_UP else -1

    items.sort(key=floor)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty and its kin fill with NaN, so that an output left unwritten is noticed."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
