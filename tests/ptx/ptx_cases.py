"""The cases of compiled kernels: `make test` runs QUICK on sm_80 and sm_90, `make ptx` all of them in more modes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from problems import (
    attention,
    description,
    every_kind_of_score,
    in_gluon,
    int8_attention,
    last_wave_split,
    ranked_by_mass,
    resumed,
    retrieval,
    second_query,
    selection,
    tie_of_equal_groups,
    with_candidates,
    writing,
)
from ptx_emulator.program import Program
from ptx_emulator.runner import Emulator, emulated

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

Change = Callable[[Program], Program]

CASES: dict[str, Callable[[], None]] = {}
QUICK: list[str] = []


def case(name: str, function: Callable[..., None], *args, quick: bool = False, **kwargs) -> None:
    assert name not in CASES, name
    CASES[name] = partial(function, *args, **kwargs)
    if quick:
        QUICK.append(name)


def unchanged(program: Program) -> Program:
    return program


@dataclass(frozen=True)
class Outcome:
    """What a case came to."""

    error: str
    """How the result is wrong; "" if it is right."""
    faults: list[str]
    notes: Counter[str]
    """Findings that are no faults, by kind."""
    kernels: Counter[str]
    """Instructions executed by warps, by kernel."""
    seconds: float


def execute_case(name: str, capability: int, mode: str = "plain", change: Change = unchanged) -> tuple[str, Emulator]:
    """Run a case: how its result is wrong ("" if it is right), and the emulator with all that was found.

    `change` is done to the programs of the kernels before they run.
    """
    torch.manual_seed(0)
    error = ""
    with emulated(capability, mode) as emulator:
        emulator.change = change
        try:
            CASES[name]()
        except (AssertionError, RuntimeError) as caught:
            error = f"{type(caught).__name__}: {caught}"
    return error, emulator


def run(name: str, capability: int, mode: str = "plain") -> Outcome:
    """Run a case, and say what it came to."""
    start = time.process_time()
    error, emulator = execute_case(name, capability, mode)
    kernels: Counter[str] = Counter()
    for program, execution in emulator.executions:
        kernels[program.name] += int(execution.executed.sum())
    notes = Counter(found.kind.name for found in emulator.found if not found.kind.fault)
    faults = [str(found) for found in emulator.faults]
    return Outcome(error, faults, notes, kernels, time.process_time() - start)


# Longer walks than there are slots; a second head, whose keys are further on; ragged tiles and rows.
IN_GLUON = ("window, in Gluon", "bank, in Gluon", "resumed, in Gluon")
case("window, in Gluon", in_gluon, attention, BF16, batch=2, head_dim=128, queries=140, dense=300)
case("bank, in Gluon", in_gluon, attention, BF16, head_dim=128, queries=136, group=128, bank=(3, 136, 64), top_k=9,
     slots=True)  # fmt: skip
case("resumed, in Gluon", in_gluon, resumed, FP16, batch=2, heads=(4, 2), queries=100, group=100, dense=50,
     bank=(3, 300, 128), top_k=9, slots=True, valid=(3, 0), scale=-0.1)  # fmt: skip

NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
# Of each kind the shortest for `make test`.
case("window", attention, BF16, dense=100, quick=True)
case("window, causal, valid keys", attention, BF16, batch=2, dense=100, causal=True, used=(100, 37), quick=True)
case("bank", attention, BF16, queries=128, bank=(3, 100, 64), slots=True, quick=True)
case("bank, int8", int8_attention, BF16, queries=128, bank=(3, 100, 64), slots=True, quick=True)
case("bank, candidates", with_candidates, BF16, bank=(9, 37, 8), top_k=7, slots=True, quick=True)
case("per query", attention, BF16, queries=33, bank=(3, 37, 16), group=1, slots=True, quick=True)
case("last wave split", last_wave_split, BF16, heads=(1, 1), queries=128, bank=(5, 37, 8), top_k=9, quick=True)
case("backward", attention, BF16, queries=80, dense=40, bank=(2, 70, 32), backward=True, quick=True)
case("window in pages", attention, BF16, dense=72, pages=(24, [3, 0, 1]), backward=True, quick=True)
case("selection of groups", selection, BF16, 16, frames=12, blocks=25, top_k=24, valid=(12, 5), slots=True, quick=True)
case("selection per query", selection, BF16, 1, frames=5, blocks=25, top_k=6, valid=(4, 1), slots=True, quick=True)
case("normalised", ranked_by_mass, BF16, "normalised", 70, queries=150, valid=(4, 3), quick=True)
case("tie of groups of 120", tie_of_equal_groups, BF16, 120, quick=True)
case("descriptors", description, BF16, 37, 16, 64, quick=True)
case("cache write, clean pass", writing, BF16, frames=2, grid=(7, 8), heads=(3, 1), head_dim=64, quick=True,
     options={"block_size": 16, "mean_size": 24})  # fmt: skip
case("retrieval, coverage", retrieval, BF16, "coverage", words=33, heads=(4, 2), head_dim=40, stored=70, candidates=35,
     quick=True)  # fmt: skip

for dtype, name in NAMES.items():
    group = 128 if dtype != FP32 else 32  # as many rows as a tile has
    case(f"window, {name}, D 128", attention, dtype, head_dim=128, queries=140, dense=200)
    case(f"window, causal, {name}, D 128", attention, dtype, batch=2, head_dim=128, queries=140, dense=150, causal=True,
         used=(150, 90))  # fmt: skip
    case(f"window and bank, {name}, D 128", attention, dtype, heads=(4, 2), head_dim=128, queries=group + 8,
         group=group, dense=70, bank=(4, 136, 64), top_k=5, slots=True, valid=(3,))  # fmt: skip
    case(f"second query, {name}, D 128", second_query, dtype, heads=(2, 1), head_dim=128, queries=group + 8,
         group=group, dense=70, bank=(3, 37, 16), top_k=4, slots=True)  # fmt: skip
    case(f"bank, frames by group, {name}", attention, dtype, queries=48, group=16, bank=(3, 37, 16), top_k=4,
         valid=((0, 2, 3),))  # fmt: skip
    case(f"candidates, {name}, D 128", with_candidates, dtype, batch=2, head_dim=128, queries=group + 8, group=group,
         bank=(9, 37, 8), top_k=7, slots=True, valid=(9, 4))  # fmt: skip
    case(f"per query, {name}, D 128", attention, dtype, head_dim=128, queries=33, group=1, bank=(3, 136, 64), dense=33,
         slots=True)  # fmt: skip
    case(f"bank, int8, {name}, D 128", int8_attention, dtype, heads=(4, 2), head_dim=128, queries=group + 8,
         group=group, dense=70, bank=(4, 136, 64), top_k=5, slots=True, valid=(3,))  # fmt: skip
    case(f"per query, int8, {name}, D 128", int8_attention, dtype, head_dim=128, queries=33, group=1,
         bank=(3, 136, 64), dense=33, slots=True)  # fmt: skip
    case(f"groups of 4, {name}", attention, dtype, queries=68, group=4, bank=(2, 140, 32), top_k=3)
    case(f"last wave split, {name}", last_wave_split, dtype, batch=2, heads=(1, 1), head_dim=128, queries=128,
         bank=(5, 37, 8), top_k=9, slots=True)  # fmt: skip
    case(f"resumed, {name}", resumed, dtype, head_dim=128, queries=80, dense=50, bank=(3, 70, 32))
    case(f"resumed per query, {name}", resumed, dtype, queries=20, group=1, dense=50, bank=(3, 37, 16))
    if dtype != FP32:
        case(f"window, in Gluon, {name}", in_gluon, attention, dtype, queries=70, dense=1100)
        case(f"bank, in Gluon, {name}", in_gluon, attention, dtype, batch=2, queries=260, group=80,
             bank=(9, 140, 64), top_k=20, valid=(9, 2), slots=True)  # fmt: skip
        case(f"bank of large blocks, in Gluon, {name}, D 128", in_gluon, attention, dtype, head_dim=128, queries=128,
             group=128, bank=(3, 700, 256), top_k=6)  # fmt: skip
        case(f"resumed, in Gluon, {name}, D 128", in_gluon, resumed, dtype, head_dim=128, queries=80, group=80,
             dense=50, bank=(3, 70, 64))  # fmt: skip
    case(f"negative scale, {name}", attention, dtype, dense=40, bank=(2, 50, 32), scale=-0.3)
    case(f"not aligned, {name}", attention, dtype, queries=80, dense=40, bank=(2, 50, 32), shifted=True, backward=True)
    case(f"not aligned per query, {name}, D 17", attention, dtype, head_dim=17, queries=40, group=1, bank=(2, 50, 32),
         shifted=True)  # fmt: skip
    case(f"backward, {name}, D 128", attention, dtype, head_dim=128, queries=group + 8, group=group, dense=130,
         bank=(2, 136, 64), slots=True, backward=True)  # fmt: skip
    case(f"backward, causal, {name}", attention, dtype, batch=2, queries=70, dense=100, causal=True, used=(100, 37),
         backward=True)  # fmt: skip
    case(f"window in pages, causal, {name}", attention, dtype, batch=2, queries=70, dense=72, causal=True,
         used=(72, 37), pages=(24, [3, 0, 1]), backward=True)  # fmt: skip
    case(f"backward per query, {name}", attention, dtype, queries=40, group=1, dense=33, bank=(2, 70, 32),
         slots=True, backward=True)  # fmt: skip
    case(f"selection of groups, {name}", selection, dtype, 8, frames=5, blocks=4, top_k=7, valid=(3, 5), slots=True)
    case(f"selection per query, {name}", selection, dtype, 1, frames=12, blocks=25, top_k=100, queries=20)
    case(f"by moments, {name}", ranked_by_mass, dtype, "moments", 16)
    case(f"by moments per query, {name}", ranked_by_mass, dtype, "moments", 1, queries=20)
    case(f"normalised, {name}", ranked_by_mass, dtype, "normalised", 64)
    case(f"normalised, many blocks, {name}", ranked_by_mass, dtype, "normalised", 90, frames=60, top_k=12)
    case(f"selection beyond the bank, {name}", selection, dtype, 16, frames=3, blocks=4, top_k=30, valid=(0, -1))
    case(
        f"selection per query beyond the bank, {name}", selection, dtype, 1, frames=3, blocks=4, top_k=30, valid=(2, 7)
    )
    for top_k in (1, 3, 8, 14, 20):
        case(f"every kind of score, groups, k {top_k}, {name}", every_kind_of_score, dtype, 2, top_k)
        case(f"every kind of score, per query, k {top_k}, {name}", every_kind_of_score, dtype, 1, top_k)
    case(f"descriptors, strided, {name}", description, dtype, 70, 100, 40, strided=True)
    case(f"cache write, {name}, D 128", writing, dtype, frames=2, grid=(9, 11), heads=(12, 12), head_dim=128,
         options={"block_size": 24, "mean_size": 48})  # fmt: skip
    case(f"cache write, second query, {name}", writing, dtype, batch=2, frames=2, grid=(7, 8), heads=(3, 1),
         head_dim=64, moved=5, options={"block_size": 16, "mean_size": None})  # fmt: skip
    case(f"cache write, not the clean pass, {name}", writing, dtype, frames=2, grid=(7, 8), heads=(3, 1), mean_frames=0,
         described=False, options={"block_size": 16, "mean_size": None})  # fmt: skip
    for score in ("linear", "softmax", "coverage"):
        case(f"retrieval, {score}, {name}", retrieval, dtype, score, None if score == "coverage" else 0.1, words=33,
             heads=(4, 2), head_dim=40, stored=70, candidates=35)  # fmt: skip
    case(f"retrieval, ties, {name}", retrieval, dtype, "linear", words=7, heads=(2, 2), head_dim=16, stored=40,
         whole_numbers=True)  # fmt: skip

for block in (16, 24, 128):
    case(f"bank, int8, blocks of {block}", int8_attention, BF16, head_dim=128, queries=128, group=128,
         bank=(2, 140, block), top_k=6)  # fmt: skip
for block in (16, 32, 128):
    case(
        f"bank, blocks of {block}", attention, BF16, head_dim=128, queries=128, group=128, bank=(2, 140, block), top_k=6
    )
    case(
        f"per query, blocks of {block}",
        attention,
        BF16,
        head_dim=128,
        queries=40,
        group=1,
        bank=(2, 140, block),
        dense=33,
    )
    case(f"backward, blocks of {block}", attention, BF16, dense=40, bank=(2, 140, block), backward=True)
for head_dim in (40, 96, 256):
    case(f"bank, D {head_dim}", attention, BF16, head_dim=head_dim, queries=80, dense=40, bank=(2, 100, 64))
    case(f"backward, D {head_dim}", attention, BF16, head_dim=head_dim, queries=80, dense=40, bank=(1, 100, 64),
         top_k=1, backward=True)  # fmt: skip
for group in (126, 128):
    case(f"tie of groups of {group}", tie_of_equal_groups, BF16, group)
case("groups of 16, two batches", attention, BF16, batch=2, heads=(4, 2), head_dim=128, queries=48, group=16,
     bank=(3, 37, 16), top_k=4, slots=True, backward=True)  # fmt: skip
case("empty bank", attention, BF16, bank=(2, 37, 16), valid=(0,))
case("no valid keys", attention, BF16, dense=60, used=(0,), backward=True)
case("descriptors of tokens, fp32, D 256", description, FP32, 5, 1, 256)
case("cache write, one projection, far frames", writing, BF16, batch=2, frames=3, grid=(3, 7), heads=(5, 5),
     head_dim=40, fused=True, first_frame=100_000, mean_frames=3,
     options={"block_size": 4, "mean_size": 4})  # fmt: skip
case("cache write, 40 heads", writing, BF16, frames=1, grid=(3, 7), heads=(40, 40), head_dim=128, with_norm=False,
     options={"block_size": 64, "mean_size": None})  # fmt: skip
case("cache write, tiny heads", writing, FP32, frames=2, grid=(1, 3), heads=(1, 1), head_dim=2,
     options={"block_size": 1, "mean_size": 3})  # fmt: skip
case("retrieval, softmax over parts", retrieval, BF16, "softmax", 0.1, words=33, heads=(3, 3), head_dim=64, stored=30,
     parts=5)  # fmt: skip
case("retrieval, coverage, 128 words", retrieval, BF16, "coverage", count=6, layers=3, batch=1, words=128, head_dim=128,
     stored=100)  # fmt: skip
