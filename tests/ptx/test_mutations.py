"""A barrier, wait or fence that is missing in a compiled kernel is found. All of them, one by one: `make ptx`."""

import pytest

pytest.importorskip("triton")

import mutations

COPIES = {"bar_sync", "cp_async_wait_group"}
PRODUCTS = {"wgmma_fence", "wgmma_wait_group"}


@pytest.mark.parametrize(("capability", "kinds"), [(80, COPIES), (90, COPIES | PRODUCTS)], ids=["sm_80", "sm_90"])
def test_each_kind_is_missed(compiling, capability, kinds):
    found = compiling(mutations.kinds_seen, "window", capability, "attend_kernel")
    assert all("seen" in found[kind] for kind in kinds), found


SLOTS = {"mbarrier_arrive", "mbarrier_arrive_expect_tx", "mbarrier_try_wait", "wgmma_wait_group", "fence_proxy_async"}


def test_what_keeps_slots_apart_is_missed(compiling):
    """In the kernel for Hopper, of which a slot that is released too early or not waited for is the risk."""
    found = compiling(mutations.kinds_seen, "bank, in Gluon", 90, "hopper_attend_kernel", SLOTS)
    assert set(found) == SLOTS and all("seen" in found[kind] for kind in SLOTS), found


def test_fences_between_copies_and_products_are_missed(compiling):
    """They stand twice: one before the loop, and one in it. Keys come by cp.async, so this is noted and no fault."""
    found = compiling(mutations.without_all, "window", 90, "attend_kernel", "fence_proxy_async")
    assert "wgmma_of_cp_async_without_proxy_fence" in found
