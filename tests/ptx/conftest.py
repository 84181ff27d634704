"""Where compiled kernels are emulated: not in the test process, whose Triton interprets (see ../conftest.py)."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from ptx_emulator.build import BUILD, why_not


@pytest.fixture(scope="session")
def compiling():
    """compiling(function, *arguments): the function's result from a process whose Triton compiles.

    What was compiled stays under build/ptx for the next run: triton's own cache knows when a kernel has changed.
    """
    if why_not():
        pytest.skip(why_not())
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(BUILD / "triton"))
        pool.submit(int).result()  # The process starts here, with this environment.
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown()
