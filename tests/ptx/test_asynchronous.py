"""Named barriers, mbarriers, bulk copies of tensors and warps with tasks of their own: what the emulator makes of them.

Each kind of mistake is made once, and must be found.
"""

import numpy as np
import pytest

pytest.importorskip("triton")

from ptx_emulator.build import why_not
from ptx_emulator.tensor_maps import tensor_map
from small_programs import STORE, THREADS, out, run

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "g++ is there")

ARRIVE = "mbarrier.arrive.shared::cta.b64 _, "
EXPECT = "mbarrier.arrive.expect_tx.shared::cta.b64 _, "
COPY = "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes "
WAIT = """
{{
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [{0}], {1};
    @!complete bra.uni waitLoop;
}}
"""

# One copy of a box to shared memory, of which every thread then stores a word. The mbarrier lies behind the box.
ONE_COPY = """
    mov.b32 %r3, {barrier}; mov.b32 %r4, 0; mov.b32 %r5, {column}; mov.b32 %r6, {row}; mov.b32 %r7, 0;
    setp.eq.b32 %p1, %r1, 0;
    {init}
    {fence}
    {sync}
    {expect}
    @%p1 {copy} [%r4], [%rd29, {{%r5, %r6}}], [%r3];
    {wait}
    ld.shared.b32 %r10, [%r2];
"""
PROPER = dict(
    barrier=256,
    column=0,
    row=0,
    init="@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;",
    fence="fence.proxy.async.shared::cta;",
    sync="bar.sync 0;",
    expect=f"@%p1 {EXPECT}[%r3], 256;",
    copy=COPY,
    wait=WAIT.format("%r3", "%r7"),
)


def copied(swizzle=0, width=32, mode="plain", address_bits=64, **changes):
    """What is in shared memory after the copy of a box of 256 bytes out of a tensor (6, 48) of int16, and findings."""
    source, result = np.arange(1, 6 * 48 + 1, dtype=np.int16).reshape(6, 48), out()
    given = tensor_map(source.ctypes.data, 2, (6, 48), (48, 1), (128 // width, width), swizzle)
    body = ONE_COPY.format(**{**PROPER, **changes}) + STORE
    of_map = dict(tensor_map=given, address_bits=address_bits)
    found = run(body, [(result, 0), (source, 1)], **of_map, capability=90, mode=mode)
    return source, result.view(np.int16).reshape(-1, width), found


def test_a_tensor_map_may_be_addressed_in_32_bits():
    """As triton 3.9 does it."""
    _, wide, found = copied()
    _, narrow, also_found = copied(address_bits=32)
    assert np.array_equal(wide, narrow) and wide.any() and not found and not also_found


@pytest.mark.parametrize("mode", ["plain", "hard", "reverse"])
@pytest.mark.parametrize(("swizzle", "width"), [(0, 8), (0, 32), (32, 16), (64, 32), (128, 64)])
def test_a_box_lies_swizzled_in_shared_memory(swizzle, width, mode):
    source, result, found = copied(swizzle, width, mode, column=16, row=-1)
    assert found == set()
    padded = np.zeros((20, 160), np.int16)
    padded[1:7, :48] = source
    box = padded[: 128 // width, 16 : 16 + width].reshape(-1, 8)  # units of 16 bytes
    units = np.arange(len(box))
    expected = np.empty_like(box)
    expected[units ^ (units >> 3 & max(swizzle // 16 - 1, 0))] = box
    assert (result == expected.reshape(-1, width)).all()


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"wait": ""}, {"read_before_bulk_copy", "bulk_copy_not_waited_for"}),
        ({"fence": ""}, {"mbarrier_without_proxy_fence"}),
        ({"sync": ""}, {"mbarrier_missing", "mbarrier_init_not_seen"}),
        ({"init": ""}, {"mbarrier_missing"}),
        ({"expect": f"@%p1 {ARRIVE}[%r3];"}, {"read_before_bulk_copy"}),
        ({"expect": "", "wait": f"@%p1 {ARRIVE}[%r3];" + WAIT.format("%r3", "%r7")}, {"bulk_copy_not_expected"}),
        ({"expect": f"@%p1 {EXPECT}[%r3], 512;"}, {"endless_wait"}),
        ({"expect": ""}, {"endless_wait"}),
        ({"expect": f"{EXPECT}[%r3], 4;"}, {"mbarrier_arrivals"}),
        ({"wait": WAIT.format("%r3", "%r99")}, {"undefined_guard"}),
        ({"copy": COPY.replace("2d", "3d")}, None),
        ({"wait": WAIT.format("%r3", "%r7") + "st.shared.b32 [256], %r1;"}, {"mbarrier_accessed"}),
        ({"barrier": 252}, {"misaligned"}),
        ({"barrier": 128}, {"mbarrier_accessed"}),
    ],
)
def test_what_is_wrong_around_a_copy(changes, kinds):
    if kinds is None:
        with pytest.raises(ValueError, match="of the PTX"):
            copied(**changes)
    else:
        for mode in ("plain", "reverse"):
            assert copied(**changes, mode=mode)[2] & kinds, mode


def test_a_copy_needs_a_tensor_map():
    source, result = np.zeros(64, np.int32), out()
    found = run(ONE_COPY.format(**PROPER) + STORE, [(result, 0), (source, 1)], tensor_map=bytes(128), capability=90)
    assert "bad_tensor_map" in found
    for wrong in (dict(base=8), dict(strides=(12, 1)), dict(box=(1, 512)), dict(swizzle=64), dict(shape=(0, 8))):
        with pytest.raises(ValueError, match="no tensor map"):
            tensor_map(**{**dict(base=0, element_size=2, shape=(4, 8), strides=(8, 1), box=(1, 8), swizzle=0), **wrong})


# Warp 0 copies four boxes into two slots in turn, warp 1 stores what it finds there: rows of 32 numbers.
RING = """
    mov.b32 %r7, 0; mov.b32 %r8, 0; mov.b32 %r9, 0;
    setp.eq.b32 %p1, %r1, 0;
    @%p1 mbarrier.init.shared::cta.b64 [256], 1;
    @%p1 mbarrier.init.shared::cta.b64 [264], 1;
    @%p1 mbarrier.init.shared::cta.b64 [272], 1;
    @%p1 mbarrier.init.shared::cta.b64 [280], 1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    and.b32 %r11, %r1, 31;
    setp.eq.b32 %p2, %r11, 0;
$L_next:
    and.b32 %r12, %r8, 1;
    shl.b32 %r4, %r12, 7;
    shl.b32 %r12, %r12, 3;
    add.s32 %r3, %r12, 256;
    add.s32 %r5, %r12, 272;
    shr.u32 %r13, %r8, 1;
    and.b32 %r13, %r13, 1;
    xor.b32 %r14, %r13, 1;
    setp.ge.u32 %p3, %r1, 32;
    @%p3 bra $L_consume;
    {producer_waits}
    @%p1 {expect} [%r3], 128;
    @%p1 {copy} [%r4], [%rd29, {{%r9, %r8}}], [%r3];
    bra.uni $L_done;
$L_consume:
    {consumer_waits}
    {early}
    shl.b32 %r15, %r11, 2;
    add.s32 %r16, %r15, %r4;
    ld.shared.b32 %r10, [%r16];
    shl.b32 %r17, %r8, 7;
    add.s32 %r17, %r17, %r15;
    cvt.u64.u32 %rd3, %r17;
    add.s64 %rd4, %rd30, %rd3;
    st.global.b32 [%rd4], %r10;
    {together}
    {release}
$L_done:
    add.s32 %r8, %r8, 1;
    setp.lt.u32 %p4, %r8, 4;
    @%p4 bra $L_next;
"""
RING_PROPER = dict(
    expect=EXPECT,
    copy=COPY,
    producer_waits=WAIT.format("%r5", "%r14"),
    consumer_waits=WAIT.format("%r3", "%r13"),
    early="",
    together="bar.warp.sync -1;",
    release=f"@%p2 {ARRIVE}[%r5];",
)


def ring(mode="plain", **changes):
    source, result = np.arange(128, dtype=np.int32).reshape(4, 32), np.zeros((4, 32), np.int32)
    given = tensor_map(source.ctypes.data, 4, (4, 32), (32, 1), (1, 32), 0)
    body = RING.format(**{**RING_PROPER, **changes})
    found = run(body, [(result, 0), (source, 1)], tensor_map=given, capability=90, mode=mode)
    return (result == source).all(), found


@pytest.mark.parametrize("mode", ["plain", "reverse", "hard"])
def test_a_ring_of_slots(mode):
    assert ring(mode) == (True, set())


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"producer_waits": ""}, {"bulk_copy_over_reads", "write_before_bulk_copy"}),
        ({"producer_waits": WAIT.format("%r5", "%r13")}, {"endless_wait"}),
        ({"consumer_waits": ""}, {"read_before_bulk_copy", "store_of_undefined"}),
        ({"release": ""}, {"endless_wait"}),
        ({"early": f"@%p2 {ARRIVE}[%r5];", "release": ""}, {"bulk_copy_over_reads"}),
    ],
    ids=["no wait for a slot", "the other parity", "no wait for a copy", "not released", "released before it is read"],
)
def test_what_is_wrong_in_a_ring(changes, kinds):
    for mode in ("plain", "reverse", "hard"):
        assert ring(mode, **changes)[1] & kinds, mode


# A product whose operand B, 256 bytes of ones, is in the slot; then the slot is released, and warp 4 fills it again.
PRODUCT = """
    mov.b32 %r3, 256; mov.b32 %r4, 0; mov.b32 %r5, 264; mov.b32 %r7, 0;
    setp.eq.b32 %p1, %r1, 128;
    @%p1 mbarrier.init.shared::cta.b64 [%r3], 1;
    @%p1 mbarrier.init.shared::cta.b64 [%r5], 1;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.lt.u32 %p3, %r1, 128;
    @%p3 bra $L_multiply;
    @%p1 {expect} [%r3], 256;
    @%p1 {copy} [%r4], [%rd29, {{%r7, %r7}}], [%r3];
    {wait_for_slot}
    @%p1 {expect} [%r3], 256;
    @%p1 {copy} [%r4], [%rd29, {{%r7, %r7}}], [%r3];
    mov.b32 %r8, 1;
    {wait_for_second}
    bra.uni $L_done;
$L_multiply:
    {wait_for_copy}
    mov.b32 %r20, 0x3F803F80; mov.b32 %r21, %r20; mov.b32 %r22, %r20; mov.b32 %r23, %r20;
    mov.b32 %r24, 0; mov.b32 %r25, 0; mov.b32 %r26, 0; mov.b32 %r27, 0;
    wgmma.fence.sync.aligned;
    {multiply} {{%r24,%r25,%r26,%r27}}, {{%r20,%r21,%r22,%r23}}, 0x1000080000, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    {before}
    {sync}
    setp.eq.b32 %p2, %r1, 0;
    @%p2 {arrive} [%r5];
    {after}
    cvt.rzi.s32.f32 %r10, %r24;
    add.s64 %rd2, %rd30, %rd1;
    st.global.b32 [%rd2], %r10;
$L_done:
"""
PRODUCT_PROPER = dict(
    expect=EXPECT,
    copy=COPY,
    arrive=ARRIVE,
    multiply="wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16",
    wait_for_copy=WAIT.format("%r3", "%r7"),
    wait_for_slot=WAIT.format("%r5", "%r7"),
    wait_for_second=WAIT.format("%r3", "%r8"),
    sync="bar.sync 1, 128;",
    before="wgmma.wait_group.sync.aligned 0;",
    after="",
)


def product(mode="plain", **changes):
    source, result = np.full((1, 128), 0x3F80, np.int16), np.zeros(128, np.int32)
    given = tensor_map(source.ctypes.data, 2, (1, 128), (128, 1), (1, 128), 0)
    body = PRODUCT.format(**{**PRODUCT_PROPER, **changes})
    found = run(body, [(result, 0), (source, 1)], tensor_map=given, threads=160, capability=90, mode=mode)
    return (result == 16).all(), found


@pytest.mark.parametrize("mode", ["plain", "reverse", "hard"])
def test_a_product_of_what_was_copied(mode):
    assert product(mode) == (True, set())


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"before": "", "after": PRODUCT_PROPER["before"]}, {"bulk_copy_over_reads"}),
        ({"before": "wgmma.wait_group.sync.aligned 1;", "after": PRODUCT_PROPER["before"]}, {"bulk_copy_over_reads"}),
        ({"sync": ""}, {"bulk_copy_over_reads"}),
        ({"wait_for_copy": ""}, {"read_before_bulk_copy", "bulk_copy_over_reads"}),
        ({"wait_for_slot": ""}, {"bulk_copy_over_reads", "write_before_bulk_copy", "write_while_wgmma_reads"}),
        ({"sync": "bar.sync 1;"}, {"missing_arrivals"}),
    ],
    ids=["released before its product", "one product too many in flight", "three warps not asked", "no wait for a copy",
         "no wait for the slot", "a barrier of all threads"],
)  # fmt: skip
def test_what_is_wrong_around_a_product_of_a_slot(changes, kinds):
    for mode in ("plain", "reverse", "hard"):
        assert product(mode, **changes)[1] & kinds, mode


# Of three warps the first two exchange numbers; the third one has another barrier of its own.
NAMED = """
    setp.ge.u32 %p1, %r1, 64;
    st.shared.b32 [%r2], %r1;
    @%p1 bra $L_third;
    {first}
    xor.b32 %r3, %r2, 128;
    ld.shared.b32 %r10, [%r3];
    add.s64 %rd2, %rd30, %rd1;
    st.global.b32 [%rd2], %r10;
    bra.uni $L_done;
$L_third:
    {third}
$L_done:
"""


def test_barriers_of_some_warps():
    for mode in ("plain", "reverse", "hard"):
        result = out()
        body = NAMED.format(first="bar.sync 1, 64;", third="bar.sync 2, 32;")
        assert run(body, [(result, 0)], threads=96, mode=mode) == set()
        assert (result == np.arange(THREADS) ^ 32).all()
    own = "setp.lt.u32 %p2, %r1, 32; @%p2 bar.sync 1, 32; @!%p2 bar.sync 2, 32;"
    races = {"shared_read_after_write", "shared_write_after_read"}
    assert run(NAMED.format(first=own, third=""), [(out(), 0)], threads=96, capability=90) & races
    found = run(
        NAMED.format(first="bar.sync 1, 64;", third="bar.sync 1, 96;"), [(out(), 0)], threads=96, mode="reverse"
    )
    assert "barrier_counts_differ" in found
    assert "missing_arrivals" in run(NAMED.format(first="bar.sync 1, 96;", third=""), [(out(), 0)], threads=96)


def test_registers_that_warps_hand_over():
    body = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $L_more; {} bra.uni $L_done;\n$L_more:\n {}\n$L_done:\n"
    less, more = "setmaxnreg.dec.sync.aligned.u32 24;", "setmaxnreg.inc.sync.aligned.u32 {};"
    assert run(body.format(less, more.format(104)), max_registers=64) == set()
    assert run(body.format(less, more.format(112)), max_registers=64) == {"endless_wait"}
    assert run(body.format("", more.format(72)), max_registers=64) == {"endless_wait"}
    assert run(body.format(less, more.format(104))) == {"bad_register_count"}
    assert run("setmaxnreg.inc.sync.aligned.u32 56;", max_registers=64) == {"bad_register_count"}


def test_a_branch_by_a_table():
    body = """
$L_table:{}.branchtargets
        $L_a,
        $L_b;
    shr.u32 %r3, %r1, 5;
    brx.idx %r3, $L_table;
$L_a:
    mov.b32 %r10, 7;
    bra.uni $L_c;
$L_b:
    mov.b32 %r10, 8;
$L_c:
"""
    for between in (" ", "\n"):
        result = out()
        assert run(body.format(between) + STORE, [(result, 0)]) == set()
        assert (result == np.repeat([7, 8], 32)).all()
    assert "branch_out_of_table" in run(body.format(" ") + STORE, [(np.zeros(96, np.int32), 0)], threads=96)


def test_labels_belong_to_their_block():
    body = "mov.u32 %r10, 0;"
    for _ in range(2):
        body += """
{
    .reg .pred more;
    again:
    add.s32 %r10, %r10, 1;
    setp.lt.s32 more, %r10, 5;
    @more bra again;
}
"""
    result = out()
    assert run(body + STORE, [(result, 0)]) == set()
    assert (result == 6).all()
    with pytest.raises(ValueError, match="no label again"):
        run(body + "bra again;")
