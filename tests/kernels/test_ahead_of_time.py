"""The machine code of a few kernels for sm_90, at the sizes of Wan 2.1 1.3B. All of them, elsewhere too: `make aot`."""

import os
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted functions cannot be compiled", allow_module_level=True)

from memflow_ops.bench import aot as table
from memflow_ops.kernels.aot import SHARED_MEMORY_LIMIT, compile_launch, main_loop
from memflow_ops.kernels.attention.forward import Chosen, plan_attend, plan_select_and_attend
from memflow_ops.kernels.selection.describe import plan_block_means
from memflow_ops.kernels.selection.groups import plan_select


@pytest.fixture(autouse=True, scope="module")
def fresh_cache(tmp_path_factory):
    """Compile for real."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def compiled(launch):
    machine = compile_launch(launch, 90)
    assert machine.shared_bytes <= SHARED_MEMORY_LIMIT[90]
    return machine


@pytest.mark.parametrize("case", ["one launch", "two launches", "two launches, last wave split", "per query"])
def test_shipped_configurations(case):
    launches = {launch.kernel.fn.__name__: launch for launch in table.shipped()[case](90)}
    assert (
        list(launches)
        == {
            "one launch": ["attend_kernel"],
            "two launches": ["block_means_kernel", "span_kernel", "attend_kernel"],
            "two launches, last wave split": [
                "block_means_kernel",
                "span_kernel",
                "attend_kernel",
                "merge_splits_kernel",
            ],
            "per query": ["select_rows_kernel", "union_kernel", "attend_kernel"],
        }[case]
    )
    for name, launch in launches.items():
        machine = compiled(launch)
        assert machine.spills == 0 and machine.stack_bytes == 0, name
        if name in ("attend_kernel", "select_rows_kernel"):
            assert machine.opcodes["HGMMA"] >= 8, name
            assert 0 < machine.loop_opcodes["HGMMA"] <= machine.opcodes["HGMMA"], name
        else:
            assert machine.tensor_core_products == 0, f"{name}: scores of groups are IEEE float32 products"


def test_the_mean_of_a_group_is_a_correctly_rounded_quotient():
    """A product with the rounded reciprocal would break ties between scores that are equal."""
    (launch,) = table.shipped()["one launch"](90)
    assert "div.rn.f32" in compiled(launch).ptx


@pytest.mark.parametrize("query_group", [64, 128])
def test_few_rows_get_four_warps(query_group):
    launch = table.memory_attention(90, query_group=query_group)[-1]
    assert launch.arguments["BLOCK_M"] == query_group and launch.options["num_warps"] == query_group // 16
    assert compiled(launch).spills == 0


@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        ("cache write, clean pass", ["write_projections_kernel", "means_of_sums_kernel"]),
        ("retrieval, coverage", ["products_kernel", "word_shares_kernel", "take_coverage_kernel"]),
    ],
)
def test_what_is_around_the_attention_does_not_spill(case, kernels):
    launches = table.shipped()[case](90)
    assert [launch.kernel.fn.__name__ for launch in launches] == kernels
    for launch in launches:
        machine = compiled(launch)
        assert machine.spills == 0 and machine.stack_bytes == 0, launch.kernel.fn.__name__
        multiplies = launch.kernel.fn.__name__ == "products_kernel"
        assert bool(machine.tensor_core_products) == multiplies, launch.kernel.fn.__name__


def test_the_backward_does_not_spill():
    launches = {launch.kernel.fn.__name__: launch for launch in table.shipped()["backward, window too"](90)}
    assert list(launches) == ["row_terms_kernel", "backward_queries_kernel", "backward_keys_kernel"]
    for name, launch in launches.items():
        machine = compiled(launch)
        assert machine.spills == 0, name
        assert bool(machine.loop_opcodes["HGMMA"]) == (name != "row_terms_kernel"), name


def test_float32_stays_off_the_tensor_cores():
    for launch in table.memory_attention(90, dtype=torch.float32, query_group=1):
        assert compiled(launch).tensor_core_products == 0


def test_sizes_of_one_become_constants():
    """The just-in-time compiler makes a constant of an integer that is 1, which is another kernel to it."""
    meta = table.meta
    q, indices = meta(1, 1, 1, 16), meta(1, 1, 1, 1, dtype=torch.int32)
    memory = dict(memory_slots=meta(1, 1).int(), resume_out=q, resume_lse=meta(1, 1, 1).float())
    sizes = dict(block_size=1, frame_tokens=1, query_group=1, softmax_scale=0.25)
    launches = [
        *plan_attend(q, q, q, q, q, Chosen(indices), **sizes, **memory)[0],
        plan_block_means(q, 1, 1, q.dtype)[0],
    ]
    launches += plan_select_and_attend(q, q, q, q, q, q, top_k=1, **sizes, **memory)[0]
    for length in (1, 2):
        bank = meta(1, length, 1, 16)
        launches += plan_select(bank, bank, 1, length, meta(1).int(), None, 1)[0]
    for launch in launches:
        compiled(launch)


def test_the_main_loop_is_the_one_with_the_products():
    product_loop = [(16, "FADD", ""), (32, "HGMMA", ""), (48, "BRA", " 0x10")]
    other_loop = [(64, "FADD", ""), (80, "FADD", ""), (96, "FADD", ""), (112, "BRA", " 0x40")]
    rare_loop = [(128, "HGMMA", ""), (144, "FSEL", ""), (160, "FSEL", ""), (176, "BRA", " 0x80")]
    end = [(192, "BRA", " 0x0"), (208, "BRA", " 0x200")]
    code = [(0, "MOV", ""), *product_loop, *other_loop, *rare_loop, *end]
    assert main_loop(code) == Counter(FADD=1, HGMMA=1, BRA=1)
    assert main_loop([*other_loop, *end]) == Counter(FADD=3, BRA=1)


def test_what_the_gate_objects_to():
    row = dict(registers=100, spills=0, shared_bytes=1000, HGMMA=8, loop_instructions=50)
    table_of = lambda **changed: {"sm_90": {"one launch: attend_kernel": {**row, **changed}}}  # noqa: E731
    stored = {"3.7.1": table_of()}
    assert table.complaints("3.7.1", table_of(registers=110, loop_instructions=55), stored) == []
    for changed, words in (
        (dict(registers=111), "registers grew from 100 to 111"),
        (dict(loop_instructions=56), "loop_instructions grew from 50 to 56"),
        (dict(spills=1), "1 spills"),
        (dict(loop_spills=2), "2 spills in the main loop"),
        (dict(HGMMA=0), "no tensor-core products"),
        (dict(shared_bytes=2**20), "shared memory"),
    ):
        (line,) = table.complaints("3.7.1", table_of(**changed), stored)
        assert words in line and "sm_90, one launch: attend_kernel" in line
