"""`make bench`: every case of the registry under pytest-benchmark; with `--compare` held against the stored results.

pytest-benchmark times ours. Before and after ours, the others are timed in turn, so that ratios are pairwise.
"""

import pytest
import torch


@torch.no_grad()
def test_case(case, session, benchmark, request):
    contest = session.contest(case)
    benchmark.group = case.level
    benchmark.pedantic(contest.ours, setup=contest.before, teardown=contest.after, rounds=session.rounds_of(case))
    if not request.config.getoption("--compare"):
        (ours, *_) = session.finish(contest)
        benchmark.extra_info.update(over_baseline=ours["over_baseline"], baseline=ours["baseline"])
        return
    try:
        worse = session.worse(contest)
    except ValueError as error:  # The stored ratio is over another baseline.
        worse = str(error)
    if worse:
        pytest.fail(worse, pytrace=False)
