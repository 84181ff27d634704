"""The options of `make bench` and `make bench-compare`, which are those of `Session` in run.py."""

from pathlib import Path

import pytest

from memflow_ops.bench.cases.registry import GROUPS
from memflow_ops.bench.run import RESULTS, Session

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser):
    group = parser.getgroup("memflow bench")
    group.addoption("--size", action="append", default=[], choices=GROUPS, help="of the cases; may be repeated")
    group.addoption("--case", default="", help="part of a case's name")
    group.addoption("--contender", action="append", default=[], help="part of a contender's name; may be repeated")
    group.addoption("--rounds", type=int, default=None, help="of timing; default: each case has its own")
    group.addoption("--device", default="auto")
    group.addoption("--out", type=Path, default=RESULTS, help="folder of the results")
    group.addoption("--compare", action="store_true", help="hold against the stored results instead of replacing them")


def pytest_configure(config):
    option = config.getoption
    try:
        config.stash[_SESSION] = Session(
            *(option(name) for name in ("device", "size", "case", "rounds", "out", "compare", "contender"))
        )
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc):
    cases = metafunc.config.stash[_SESSION].cases
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture
def session(request) -> Session:
    return request.config.stash[_SESSION]
