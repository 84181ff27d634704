"""Where kernels are compiled: not in the test process, whose Triton interprets (see ../conftest.py)."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest


@pytest.fixture(scope="session")
def compiling(tmp_path_factory):
    """compiling(function, *arguments): the function's result from a process whose Triton compiles, from an empty cache.

    The function must be importable by its name there, as those of compiled_launches.py are.
    """
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        pool.submit(int).result()  # The process starts here, with this environment.
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown()
