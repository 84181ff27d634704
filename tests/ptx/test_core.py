"""The emulator's own faults and blindnesses: small programs of PTX whose results and findings are known."""

import numpy as np
import pytest

pytest.importorskip("triton")

from ptx_emulator.build import why_not
from small_programs import STORE, THREADS, out, run

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "g++ is there")


def test_a_store():
    result = out()
    assert run("mov.u32 %r10, %r1;" + STORE, [(result, 0)]) == set()
    assert (result == np.arange(THREADS)).all()


def test_an_unknown_instruction_is_an_error_with_its_line():
    with pytest.raises(ValueError, match=r"line 18 of the PTX, `atom.global.add.u32 .*not an instruction"):
        run("atom.global.add.u32 %r10, [%rd30], 1;", [(out(), 1)])
    for form in (
        "cvt.rz.bf16.f32 %rs1, %r1;",
        "add.rz.f32 %r3, %r1, %r1;",
        "bar.arrive 1, 64;",
        "ld.volatile.global.b32 %r1, [%rd1];",
    ):
        with pytest.raises(ValueError, match="of the PTX"):
            run(form)


@pytest.mark.parametrize(
    ("body", "kinds"),
    [
        ("mov.u32 %r10, 1; add.s64 %rd2, %rd30, %rd1; st.global.b32 [%rd2+4], %r10;", {"out_of_bounds"}),
        (
            "mov.u32 %r10, 1; setp.lt.u32 %p1, %r1, 63; add.s64 %rd2, %rd30, %rd1; @%p1 st.global.b32 [%rd2+4], %r10;",
            set(),
        ),
        ("mov.u32 %r10, 1; st.global.v2.b32 [%rd30+4], {%r10, %r10};", {"misaligned"}),
        ("st.shared.b32 [%r2+512], %r1;", {"shared_out_of_bounds"}),
        (STORE, {"store_of_undefined"}),
        ("ld.global.b32 %r10, [%rd9];", {"undefined_address", "misaligned"}),
    ],
    ids=["beyond the end", "guarded", "misaligned", "beyond shared memory", "undefined value", "undefined address"],
)
def test_addresses(body, kinds):
    assert run(body, [(out(), 1)]) == kinds


def test_gaps_between_elements():
    body = "mov.u32 %r10, 1;" + STORE
    assert run(body, [(out(), 0)], gap=slice(8, 12)) == {"between_elements"}


def test_undefined_branches_and_memory():
    body = "setp.eq.s32 %p1, %r50, 3; @%p1 bra $L_x; mov.u32 %r10, 1;\n$L_x:\n mov.u32 %r10, 2;" + STORE
    assert run(body, [(out(), 0)]) == {"undefined_branch"}
    body = "setp.eq.s32 %p1, %r50, 3; mov.u32 %r10, 1; add.s64 %rd2, %rd30, %rd1; @%p1 st.global.b32 [%rd2], %r10;"
    assert run(body, [(out(), 0)]) == {"undefined_guard"}
    body = "add.s64 %rd3, %rd31, %rd1; ld.global.b32 %r10, [%rd3];" + STORE
    assert run(body, [(out(), 0), (out(), 0)]) == {"undefined_global_read", "store_of_undefined"}
    # A choice that does not take the undefined operand is defined.
    assert run("setp.lt.u32 %p1, %r1, 64; selp.b32 %r10, %r1, %r50, %p1;" + STORE, [(out(), 0)]) == set()


EXCHANGE = (
    """
    st.shared.b32 [%r2], %r1;
    {between}
    xor.b32 %r3, %r2, {distance};
    ld.shared.b32 %r10, [%r3];
"""
    + STORE
)


def test_races_in_shared_memory():
    result = out()
    assert run(EXCHANGE.format(between="bar.sync 0;", distance=128), [(result, 0)]) == set()
    assert (result == np.arange(THREADS) ^ 32).all()
    races = {"shared_read_after_write", "shared_write_after_read"}
    for mode in ("plain", "reverse", "hard"):
        assert run(EXCHANGE.format(between="", distance=128), [(out(), 0)], mode=mode) & races
    assert run(EXCHANGE.format(between="", distance=64), [(out(), 0)]) == {"warp_exchange_without_sync"}
    assert run(EXCHANGE.format(between="bar.warp.sync -1;", distance=64), [(out(), 0)]) == set()
    found = run("and.b32 %r3, %r2, 127; st.shared.b32 [%r3], %r1;")
    assert found == {"shared_write_after_write", "shared_same_value_twice"}  # single bytes of the two values are equal


def test_races_in_global_memory():
    store = "mov.u32 %r10, %r1;" + STORE
    other = "{} xor.b32 %r3, %r2, 128; cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd30, %rd3; ld.global.b32 %r11, [%rd4];"
    assert run(store + other.format("bar.sync 0;"), [(out(), 1)]) == set()
    assert run(store + other.format(""), [(out(), 1)]) & {"global_read_after_write", "global_write_after_read"}
    by_program = "mov.u32 %r10, %ctaid.x;" + STORE
    assert "programs_write_after_write" in run(by_program, [(out(), 0)], grid=2)
    reads = (
        "mov.u32 %r12, %ctaid.x; add.s64 %rd2, %rd30, %rd1; ld.global.b32 %r10, [%rd2]; add.s32 %r10, %r10, 1;" + STORE
    )
    assert "programs_read_after_write" in run(reads, [(out(), 1)], grid=2)


COPY = (
    """
    add.s64 %rd3, %rd31, %rd1;
    cp.async.ca.shared.global [%r2], [%rd3], 4;
    cp.async.commit_group;
    {wait}
    ld.shared.b32 %r10, [%r2];
"""
    + STORE
)


def test_asynchronous_copies():
    source, result = np.arange(THREADS, dtype=np.int32), out()
    assert run(COPY.format(wait="cp.async.wait_group 0;"), [(result, 0), (source, 1)]) == set()
    assert (result == source).all()
    for wait in ("", "cp.async.wait_group 1;"):
        assert "read_before_cp_async_landed" in run(COPY.format(wait=wait), [(out(), 0), (source, 1)])
    # Another warp also needs a barrier after the wait.
    across = COPY.replace("ld.shared.b32 %r10, [%r2];", "{barrier} xor.b32 %r3, %r2, 128; ld.shared.b32 %r10, [%r3];")
    across = across.replace("{wait}", "cp.async.wait_group 0;")
    assert run(across.format(barrier="bar.sync 0;"), [(out(), 0), (source, 1)]) == set()
    found = run(across.format(barrier=""), [(out(), 0), (source, 1)])
    assert found & {"shared_read_after_write", "read_before_cp_async_landed", "write_before_cp_async_landed"}


def test_divergence():
    result = out()
    body = "setp.lt.u32 %p1, %r1, 5; mov.u32 %r10, 1; @%p1 bra $L_y; mov.u32 %r10, 2;\n$L_y:\n add.s32 %r10, %r10, 10;"
    assert run(body + STORE, [(result, 0)]) == set()
    assert (result == np.where(np.arange(THREADS) < 5, 11, 12)).all()
    barrier = "setp.lt.u32 %p1, %r1, 5; @%p1 bra $L_y; bar.sync 0;\n$L_y:\n mov.u32 %r10, 2;"
    assert "divergent_sync" in run(barrier, threads=32)
    one_warp = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L_y; bar.sync 0;\n$L_y:\n mov.u32 %r10, 2;"
    assert "missing_arrivals" in run(one_warp)
    assert run("$L_z:\n bra $L_z;", limit=1000) == {"too_many_instructions"}


# One product of ones, 64 x 8 x 16: A from registers, B from the first 256 bytes of shared memory, not swizzled.
PRODUCT = (
    """
    mov.b32 %r20, 0x3F803F80;
    setp.lt.u32 %p1, %r1, 64;
    @%p1 st.shared.b32 [%r2], %r20;
    {proxy}
    bar.sync 0;
    mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
    mov.b32 %r24, 0; mov.b32 %r25, 0; mov.b32 %r26, 0; mov.b32 %r27, 0;
    {fence}
    {wgmma} {{%r24,%r25,%r26,%r27}}, {{%r20,%r21,%r22,%r23}}, 0x1000080000, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {after}
    {wait}
    cvt.rzi.s32.f32 %r10, %r24;
"""
    + STORE
)
PROPER = dict(
    wgmma="wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16",
    proxy="fence.proxy.async.shared::cta;",
    fence="wgmma.fence.sync.aligned;",
    after="",
    wait="wgmma.wait_group.sync.aligned 0;",
)


def product(**changes):
    result = np.zeros(128, np.int32)
    found = run(PRODUCT.format(**{**PROPER, **changes}), [(result, 0)], threads=128, capability=90)
    return result, found


def test_asynchronous_products():
    result, found = product()
    assert found == set() and (result == 16).all()


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"proxy": ""}, "wgmma_without_proxy_fence"),
        ({"fence": ""}, "wgmma_register_without_fence"),
        ({"wait": ""}, "wgmma_register_in_flight"),
        ({"wait": "wgmma.wait_group.sync.aligned 1;"}, "wgmma_register_in_flight"),
        ({"wait": ""}, "wgmma_not_waited_for"),
        ({"after": "mov.b32 %r20, 0;"}, "wgmma_register_in_flight"),
        ({"after": "mov.b32 %r3, %r24;"}, "wgmma_register_copied_in_flight"),
        ({"after": "@%p1 st.shared.b32 [%r2], %r2;"}, "write_while_wgmma_reads"),
        ({"fence": "wgmma.fence.sync.aligned; mov.b32 %r21, %r20;"}, "wgmma_register_written_in_group"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_missing_around_a_product(changes, kind):
    assert kind in product(**changes)[1]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("div.s32 %r10, -7, 2;", -3),
        ("rem.s32 %r10, -7, 2;", -1),
        ("shr.s32 %r10, -8, 40;", -1),
        ("shl.b32 %r10, 1, 32;", 0),
        ("mul.hi.u32 %r10, 0x80000000, 6;", 3),
        ("min.relu.s32 %r10, -7, 3;", 0),
        ("min.relu.s32 %r10, 7, 3;", 3),
        ("max.relu.s32 %r10, -7, -3;", 0),
        ("prmt.b32 %r10, 0x44332211, 0x88776655, 0x7410;", 0x88552211 - 2**32),
        ("bfe.s32 %r10, 0x00f0, 4, 4;", -1),
        ("shf.l.wrap.b32 %r10, 0x80000000, 1, 1;", 3),
        ("lop3.b32 %r10, 12, 10, 3, 0xe8;", 10),
        ("cvt.rzi.s32.f32 %r10, 0fC0600000;", -3),
        ("cvt.rni.s32.f32 %r10, 0f40200000;", 2),
        ("cvt.rn.bf16x2.f32 %r10, 0f40000000, 0f3F808000;", 0x40003F80),
        ("cvt.rn.f16x2.f32 %r10, 0f477FF000, 0f33000001;", 0x7C000001),
        ("cvt.rn.bf16.s16 %rs1, -387; cvt.u32.u16 %r10, %rs1;", 0xC3C2),
        ("cvt.rn.bf16.u16 %rs1, -387; cvt.u32.u16 %r10, %rs1;", 0x477E),
        ("cvt.rn.f16.s32 %rs1, 65520; cvt.u32.u16 %r10, %rs1;", 0x7C00),
        ("max.f32 %r10, 0f7FC00000, 0f3F800000;", 0x3F800000),
        ("max.NaN.f32 %r10, 0f7FC00000, 0f3F800000;", 0x7FFFFFFF),
        ("add.ftz.f32 %r10, 0f00000001, 0f00000001;", 0),
        ("div.rn.f32 %r10, 0f43B40000, 0f42F00000;", 0x40400000),
        ("div.full.f32 %r10, 0f43B40000, 0f42F00000;", 0x40400001),
        ("ex2.approx.ftz.f32 %r10, 0f40400000;", 0x41000000),
        ("popc.b32 %r10, 0xff;", 8),
        ("setp.lt.s32 %p1|%p2, -1, 0; selp.b32 %r10, 1, 0, %p2;", 0),
        ("setp.neu.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r10, 1, 0, %p1;", 1),
        ("setp.ne.f32 %p1, 0f7FC00000, 0f7FC00000; selp.b32 %r10, 1, 0, %p1;", 0),
        ("mov.u32 %r5, %laneid; redux.sync.max.s32 %r10, %r5, 0xffffffff;", 31),
    ],
)  # fmt: skip
def test_arithmetic(body, expected):
    result = out()
    assert run(body + STORE, [(result, 0)]) == set()
    assert (result == expected).all(), f"{result[0] & 0xFFFFFFFF:#x}"


def test_shuffles():
    for kind, by, clamp, source in (
        ("bfly", 3, 31, lambda t: t ^ 3),
        ("idx", 5, 31, lambda t: t // 32 * 32 + 5),
        ("up", 1, 0, lambda t: t - (t % 32 > 0)),
        ("down", 1, 31, lambda t: t + (t % 32 < 31)),
    ):
        result = out()
        assert run(f"shfl.sync.{kind}.b32 %r10, %r1, {by}, {clamp}, -1;" + STORE, [(result, 0)]) == set()
        assert (result == source(np.arange(THREADS))).all(), kind


@pytest.mark.parametrize(("number", "units"), [("0f00000000", 0), ("0f3F99999A", 2)], ids=["exact", "approximate"])
def test_hard_rounding_stays_within_the_bounds(number, units):
    """2 to the 0 is 1 in every mode; 2 to the 1.2 may be off by two units in the last place, and is."""
    values = {}
    for mode in ("plain", "hard", "up", "down"):
        result = out()
        assert run(f"ex2.approx.ftz.f32 %r10, {number};" + STORE, [(result, 0)], mode=mode) == set()
        values[mode] = int(result[0])
    assert values["up"] - values["plain"] == values["plain"] - values["down"] == units
    assert abs(values["hard"] - values["plain"]) <= units
