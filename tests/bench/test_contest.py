"""Comparing: wrong results are not timed, orders change from round to round, ratios are pairwise."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch

from memflow_ops.bench.cases import registry
from memflow_ops.bench.cases.attention_inputs import AttentionInputs, attention_contender, ours
from memflow_ops.bench.harness import statistics
from memflow_ops.bench.harness.case import OURS, Built, Case, Contender
from memflow_ops.bench.harness.contest import Contest
from memflow_ops.bench.report import table
from memflow_ops.bench.sizes import TINY

CPU = torch.device("cpu")
CEILINGS = {"tflops_float32": 1.0, "gbs": 1.0}


def tiny(name: str) -> Case:
    (found,) = registry.chosen("cpu", ["tiny"], name)
    return found


def test_a_wrong_result_is_not_timed():
    case = tiny("op/memory_attention")
    given = AttentionInputs.make(TINY, 4, torch.float32, CPU)
    right = ours(given)
    wrong = attention_contender(given, lambda: right.call() + 1e-4, 1, given.window_and_selection())
    with pytest.raises(AssertionError, match=r"tiny/float32, wrong: head 0, group 0: error 1\.0"):
        Contest(replace(case, build=lambda *_: Built({OURS: right, "wrong": wrong})), CPU)


def test_ratios_are_taken_pair_by_pair():
    # the machine is ten times slower in the second half: the ratio does not see it, ratios of medians would
    theirs = [1.0, 1.0, 1.0, 10.0, 10.0]
    ours = [1.1, 1.1, 1.1, 11.0, 11.0]
    found = statistics.paired(ours, theirs)
    assert all(abs(value - 1.1) < 1e-9 for value in found.values()) and statistics.decided(found, 5)
    assert statistics.paired([2.0, 3.0], [1.0, None])["p50"] == 2.0
    wide = statistics.paired([1.0, 1.1, 0.9], [1.0, 1.0, 1.0])
    assert not statistics.decided(wide, 3) and "within the spread" in table.overhead(wide, 3)


@pytest.mark.parametrize("count", range(1, 9))
def test_every_contender_is_in_every_place_and_after_every_other(count):
    names = [str(number) for number in range(count)]
    orders = [statistics.in_turn(names, number) for number in range(count * (1 + count % 2))]
    assert all(sorted(order) == names for order in orders)
    for place in range(count):
        assert Counter(order[place] for order in orders) == dict.fromkeys(names, len(orders) // count)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert pairs == dict.fromkeys(permutations(names, 2), 1 + count % 2)


def test_rounds_have_different_orders_and_ratios_stay_within_a_round():
    ran = []

    def contender(name: str, **more) -> Contender:
        return Contender(lambda: ran.append(name), lambda: None, **more)

    built = Built({OURS: contender(OURS), "window": contender("window"), "slow": contender("slow", every=2)})
    found = Contest(replace(tiny("op/select"), build=lambda *_: built), CPU)
    timed = iter(range(1, 99))
    seconds = found.seconds
    found.seconds = lambda name: seconds(name) * 0 + next(timed)
    for _ in range(3):
        found.run_round()
    assert ran == [OURS, "window", "slow", "window", OURS, "slow", OURS, "window"]
    assert found.samples == {OURS: [1, 5, 7], "window": [2, 4, 8], "slow": [3, None, 6]}
    assert statistics.paired(found.samples[OURS], found.samples["slow"])["p50"] == (1 / 3 + 7 / 6) / 2


def test_contenders_may_say_nothing_of_their_work():
    case = replace(tiny("op/select"), build=lambda *_: Built({OURS: Contender(lambda: None, lambda: None)}))
    found = Contest(case, CPU)
    found.run_round()
    (alone,) = found.rows(CEILINGS, {})
    assert "tflops" not in alone and alone["over_baseline"]["p50"] == 1
