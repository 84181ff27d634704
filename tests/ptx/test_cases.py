"""Every kernel as it is compiled for sm_80 and sm_90, on a CPU, at a small size. All cases: `make ptx`."""

import pytest

pytest.importorskip("triton")

import ptx_cases


@pytest.mark.parametrize("name", ptx_cases.QUICK)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_kernels(compiling, name, capability):
    outcome = compiling(ptx_cases.run, name, capability)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert not outcome.error, outcome.error


@pytest.mark.parametrize("name", ptx_cases.IN_GLUON)
def test_the_kernel_for_hopper(compiling, name):
    """In orders of warps that differ: its tasks wait for one another."""
    for mode in ("plain", "hard", "reverse"):
        outcome = compiling(ptx_cases.run, name, 90, mode)
        assert not outcome.faults, "\n".join(outcome.faults)
        assert not outcome.error, outcome.error
        assert "hopper_attend_kernel" in outcome.kernels and "attend_kernel" not in outcome.kernels
