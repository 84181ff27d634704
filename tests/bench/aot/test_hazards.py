"""The reader of machine code finds the faults that are planted in the loop of the window's kernel for sm_90.

window.sass is an excerpt of what `make aot` compiles: triton 3.7.1, bfloat16, 128 dimensions. Most of the arithmetic
between the products is left out; products, waits, barriers, copies and branches are all there from the loop on.
"""

from pathlib import Path

import pytest

pytest.importorskip("triton")

from memflow_ops.bench.aot.hazards import hazards, registers
from memflow_ops.kernels.sass import Instruction, instructions, main_loop

EXCERPT = (Path(__file__).parent / "window.sass").read_text()
WAIT = "/*1f50*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
LAST_WAIT = "/*3700*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
PRODUCT = "/*33b0*/                   HGMMA.64x128x16.F32.BF16 R24, R132, gdesc[UR16].tnspB, R24, gsb0 ;"
BARRIER = "/*33c0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;"


def test_the_kernel_as_it_is_has_none():
    assert main_loop(instructions(EXCERPT))["HGMMA"] == 12
    assert hazards(instructions(EXCERPT)) == []


@pytest.mark.parametrize(
    ("line", "instead", "place", "fault"),
    [
        (WAIT, "", "0x2370 FMNMX", "touches an accumulator of the product at 0x1f20"),
        (WAIT, WAIT.replace("0x0", "0x1"), "0x2370 FMNMX", "touches an accumulator of the product at 0x1f20"),
        (WAIT, WAIT.replace("WARPGROUP", "@P0 WARPGROUP"), "0x2370 FMNMX", "touches an accumulator"),
        (LAST_WAIT, "", "0x3c50 FSEL", "touches an accumulator of the product at 0x33b0"),
        (PRODUCT, PRODUCT + "\n        /*33b8*/  MOV R135, R0 ;", "0x33b8 MOV", "overwrites an operand"),
        (PRODUCT, PRODUCT + "\n        /*33b8*/  LDS.64 R134, [R0] ;", "0x33b8 LDS", "overwrites an operand"),
        (PRODUCT, PRODUCT + "\n        /*33b8*/  STS.128 [R0], R20 ;", "", ""),
        (PRODUCT, PRODUCT + "\n        /*33b8*/  STS.128 [R0], R22 ;", "0x33b8 STS", "touches an accumulator"),
        (PRODUCT, PRODUCT.replace("R24", "R28"), "0x33b0 HGMMA", "accumulates over accumulators"),
        (PRODUCT, PRODUCT.replace("R132", "R84"), "0x33b0 HGMMA", "multiplies accumulators"),
        (PRODUCT, PRODUCT.replace("R24", "R122"), "0x33b0 HGMMA", "accumulates over an operand"),
        (BARRIER, "", "0x3400 LDGSTS", "copies into a buffer that a product of an earlier iteration may still read"),
        (BARRIER, BARRIER.replace("BAR", "@P0 BAR"), "0x3400 LDGSTS", "copies into a buffer"),
        (BARRIER, BARRIER.replace("0x0", "0x1, 0x80"), "0x3400 LDGSTS", "copies into a buffer"),
    ],
)
def test_a_planted_fault_is_seen(line, instead, place, fault):
    assert EXCERPT.count(line) == 1
    found = hazards(instructions(EXCERPT.replace(line, instead)))
    assert any(x.startswith(place) and fault in x for x in found) == bool(fault)
    assert bool(found) == bool(fault)


@pytest.mark.parametrize(
    ("text", "written", "read"),
    [
        ("IMAD.WIDE.U32 R26, R142, 0x2, R30", {26, 27}, {142, 30, 31}),
        ("LDG.E.128 R24, desc[UR32][R76.64]", {24, 25, 26, 27}, {76, 77}),
        ("LDGSTS.E.BYPASS.128 [R117+0x800], desc[UR32][R12.64], P3", set(), {117, 12, 13}),
        ("LDSM.16.M88.4 R28, [R90+UR7]", {28, 29, 30, 31}, {90}),
        ("STS.64 [R41+UR10], R60", set(), {41, 60, 61}),
        ("ISETP.GE.AND P0, PT, R225, R182, PT", set(), {225, 182}),
        ("SHFL.BFLY PT, R121, R122, 0x2, 0x1f", {121}, {122}),
        ("LOP3.LUT P6, RZ, R250, 0x60, RZ, 0xc0, !PT", set(), {250}),
        ("IADD3 R22, P0, P1, R211, -R172, R15", {22}, {211, 172, 15}),
        ("R2UR UR56, R196", set(), {196}),
        ("CS2R R24, SRZ", {24, 25}, set()),
        ("MUFU.EX2 R21, |R22|", {21}, {22}),
        ("HMMA.16816.F32 R4, R8, R12, R4", {4, 5, 6, 7}, {*range(4, 16)}),
    ],
)
def test_registers_of_an_instruction(text, written, read):
    (instruction,) = instructions(f"        /*0010*/                   {text} ;\n")
    assert registers(instruction) == (written, read)


def test_a_product_that_is_printed_otherwise_is_an_error():
    with pytest.raises(ValueError, match="not an HGMMA as sm_90 has it"):
        hazards([Instruction(0, "", "HGMMA", ".64x64x16.F64 R88, gdesc[UR20], RZ")])
