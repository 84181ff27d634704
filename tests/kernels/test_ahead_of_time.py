"""The machine code of a few kernels for sm_90, at the sizes of Wan 2.1 1.3B. All of them, elsewhere too: `make aot`."""

from collections import Counter

import pytest

pytest.importorskip("triton")

import compiled_launches

from memflow_ops.bench.aot import shipped as table
from memflow_ops.bench.aot.gate import complaints
from memflow_ops.bench.aot.hazards import hazards
from memflow_ops.kernels.aot import SHARED_MEMORY_LIMIT
from memflow_ops.kernels.sass import Instruction, main_loop


@pytest.fixture
def compiled(compiling):
    """compiled(function, *arguments): kernel name -> machine code, for each launch that the function plans."""

    def check(function, *arguments):
        machines = compiling(function, *arguments)
        assert all(machine.shared_bytes <= SHARED_MEMORY_LIMIT[90] for _, machine in machines)
        return machines

    return check


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("small bank", ["block_means_kernel", "span_kernel", "attend_kernel"]),
        ("bank", ["block_means_kernel", "span_kernel", "merge_kernel", "attend_kernel"]),
        (
            "bank, last wave split",
            ["block_means_kernel", "span_kernel", "merge_kernel", "attend_kernel", "merge_splits_kernel"],
        ),
        ("per query", ["select_rows_kernel", "union_kernel", "attend_kernel"]),
        ("bank, int8", ["block_means_kernel", "span_kernel", "merge_kernel", "attend_kernel"]),
        ("window, in Gluon", ["hopper_attend_kernel"]),
        ("bank, in Gluon", ["block_means_kernel", "span_kernel", "merge_kernel", "hopper_attend_kernel"]),
    ],
)
def test_shipped_configurations(compiled, case, kernels):
    machines = compiled(compiled_launches.shipped, case)
    assert [name for name, _ in machines] == kernels
    for name, machine in machines:
        assert machine.spills == 0 and machine.stack_bytes == 0, name
        assert machine.remarks == () and hazards(machine.code) == [], name
        if name in ("attend_kernel", "select_rows_kernel", "hopper_attend_kernel"):
            assert machine.opcodes["HGMMA"] >= 8, name
            assert 0 < machine.loop_opcodes["HGMMA"] <= machine.opcodes["HGMMA"], name
        else:
            assert machine.tensor_core_products == 0, f"{name}: scores of groups are IEEE float32 products"


def test_the_mean_of_a_group_is_a_correctly_rounded_quotient(compiled):
    """A product with the rounded reciprocal would break ties between scores that are equal."""
    (_, means), *_ = compiled(compiled_launches.shipped, "small bank")
    assert "div.rn.f32" in means.ptx


@pytest.mark.parametrize("query_group", [64, 128])
def test_few_rows_get_four_warps(compiled, query_group):
    launch = table.memory_attention(90, query_group=query_group)[-1]
    assert launch.arguments["BLOCK_M"] == query_group and launch.options["num_warps"] == query_group // 16
    ((_, machine),) = compiled(compiled_launches.attention, query_group)
    assert machine.spills == 0


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("cache write, clean pass", ["write_projections_kernel", "means_of_sums_kernel"]),
        ("retrieval, coverage", ["products_kernel", "word_shares_kernel", "take_coverage_kernel"]),
    ],
)
def test_what_is_around_the_attention_does_not_spill(compiled, case, kernels):
    machines = compiled(compiled_launches.shipped, case)
    assert [name for name, _ in machines] == kernels
    for name, machine in machines:
        assert machine.spills == 0 and machine.stack_bytes == 0, name
        assert bool(machine.tensor_core_products) == (name == "products_kernel"), name


def test_the_backward_does_not_spill(compiled):
    machines = compiled(compiled_launches.shipped, "backward, window too")
    assert [name for name, _ in machines] == ["row_terms_kernel", "backward_queries_kernel", "backward_keys_kernel"]
    for name, machine in machines:
        assert machine.spills == 0, name
        assert bool(machine.loop_opcodes["HGMMA"]) == (name != "row_terms_kernel"), name


def test_float32_stays_off_the_tensor_cores(compiled):
    assert all(machine.tensor_core_products == 0 for _, machine in compiled(compiled_launches.float32_per_query))


def test_fusion_does_not_depend_on_the_default(compiled):
    ((_, machine),) = compiled(compiled_launches.without_fusion_by_default, "cache write")
    assert "fma.rn.f32" in machine.ptx and machine.opcodes["FFMA"]


def test_sizes_of_one_become_constants(compiled):
    """The just-in-time compiler makes a constant of an integer that is 1, which is another kernel to it."""
    assert len(compiled(compiled_launches.sizes_of_one)) >= 6


def test_the_just_in_time_compiler_finds_every_shipped_launch(compiling):
    count, anew = compiling(compiled_launches.compiled_anew)
    assert count > 700 and anew == []


def test_a_launch_takes_its_code_from_the_cache(compiling):
    """Integers that 16 divides make other code than those that it does not."""
    assert compiling(compiled_launches.found_by_the_jit, 1560, 1572) == [True]
    assert compiling(compiled_launches.found_by_the_jit, 1560, 1600) == [False]


def test_products_of_window_and_bank_do_not_wait_for_one_another(compiled):
    """They do in one launch where blocks are shorter than a tile and each row has its own, so there are two."""
    names, machines = zip(*compiled(compiled_launches.window_and_blocks_of_16), strict=True)
    assert names == ("union_kernel", "attend_kernel", "attend_kernel")
    assert all(machine.remarks == () for machine in machines)
    ((_, together),) = compiled(compiled_launches.window_and_blocks_of_16_together)
    assert "C7515" in together.remarks
    gradients = compiled(compiled_launches.backward_of_window_and_blocks_of_16)
    assert [machine.remarks for _, machine in gradients] == [(), ()]


def test_the_main_loop_is_the_one_with_the_products():
    code = lambda *words: [Instruction(address, "", opcode, rest) for address, opcode, rest in words]  # noqa: E731
    product_loop = code((16, "FADD", ""), (32, "HGMMA", ""), (48, "BRA", "0x10"))
    other_loop = code((64, "FADD", ""), (80, "FADD", ""), (96, "FADD", ""), (112, "BRA", "0x40"))
    rare_loop = code((128, "HGMMA", ""), (144, "FSEL", ""), (160, "FSEL", ""), (176, "BRA", "0x80"))
    end = code((192, "BRA", "0x0"), (208, "BRA", "0x200"))
    whole = [*code((0, "MOV", "")), *product_loop, *other_loop, *rare_loop, *end]
    assert main_loop(whole) == Counter(FADD=1, HGMMA=1, BRA=1)
    assert main_loop([*other_loop, *end]) == Counter(FADD=3, BRA=1)


def test_the_representative_cases_are_shipped_ones():
    assert table.shipped().keys() >= table.REPRESENTATIVE


def test_what_the_gate_objects_to():
    row = dict(registers=100, spills=0, shared_bytes=1000, HGMMA=8, loop_instructions=50, barriers_outside=20)
    table_of = lambda **changed: {"sm_90": {"bank: attend_kernel": {**row, **changed}}}  # noqa: E731
    keys = {"sm_90": {"backward: backward_keys_kernel": {**row, "remarks": ["C7517", "C7519"]}}}
    assert complaints("3.7.1", keys, {}) == []
    assert complaints("3.9.0", table_of(spills=30, loop_spills=1), {}, strict=False) == []
    (line,) = complaints("3.9.0", table_of(spills=2, loop_spills=2), {}, strict=False)
    assert "2 spills in the main loop" in line
    stored = {"3.7.1": table_of()}
    assert complaints("3.7.1", table_of(registers=110, loop_instructions=55), stored) == []
    for changed, words in (
        (dict(registers=111), "registers grew from 100 to 111"),
        (dict(loop_instructions=56), "loop_instructions grew from 50 to 56"),
        (dict(spills=1), "1 spills"),
        (dict(loop_spills=2), "2 spills in the main loop"),
        (dict(HGMMA=0), "no tensor-core products"),
        (dict(shared_bytes=2**20), "shared memory"),
        (dict(jit_compiles_anew=True), "would not find"),
        (dict(barriers_outside=23), "barriers_outside grew from 20 to 23"),
        (dict(remarks=["C7510"]), "products wait for one another (C7510)"),
        (dict(remarks=["C7515", "C7517"]), "products wait for one another (C7515, C7517)"),
        (dict(remarks=["C7517"]), "a wait between products (C7517)"),
        (dict(hazards=["0x10 FMUL: touches an accumulator"]), "0x10 FMUL: touches an accumulator"),
    ):
        (line,) = complaints("3.7.1", table_of(**changed), stored)
        assert words in line and "sm_90, bank: attend_kernel" in line
