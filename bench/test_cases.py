"""`make bench`: every case of the registry under pytest-benchmark. `--compare`: held against the stored results.

pytest-benchmark times ours; before each of its rounds the others are timed in turn, so that ratios are pairwise.
"""

import pytest
import torch


@torch.no_grad()
def test_case(case, session, benchmark, request):
    contest = session.contest(case)
    benchmark.group = case.level
    benchmark.pedantic(contest.ours, setup=contest.others, rounds=session.rounds_of(case))
    if not request.config.getoption("--compare"):
        (ours, *_) = session.finish(contest)
        benchmark.extra_info.update(over_baseline=ours["over_baseline"], baseline=ours["baseline"])
        return
    worse = session.worse(contest)
    if worse:  # once more, before noise is taken for it: all rounds are judged together
        for _ in range(session.rounds_of(case)):
            contest.others()
            contest.ours()
        worse = session.worse(contest)
    if worse:
        pytest.fail("; ".join(worse), pytrace=False)
