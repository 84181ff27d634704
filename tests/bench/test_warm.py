"""`make gpu-warm` and `make gpu-preflight`: what is recorded, what is called instead, and what is said of it."""

from memflow_ops.bench import preflight, warm
from memflow_ops.bench.cases import selection
from memflow_ops.bench.parts import PARTS
from memflow_ops.bench.stand_in.launches import Compiled, Kernel, Recorded

RIGHT, WRONG = (preflight.Ran(Recorded({}, {}, 0), 1.0, error) for error in ("", "an error"))


def test_every_contender_is_called(monkeypatch):
    called, select = [], selection.selection_of
    monkeypatch.setattr(selection, "selection_of", lambda *of: called.append(of) or select(*of))
    assert warm.call_contenders("op/select/tiny/float32", "cpu", ("tiny",)) == ""
    assert len(called) == 1


def test_an_error_is_returned_in_words(monkeypatch):
    def broken(*of):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(selection, "selection_of", broken)
    assert warm.call_contenders("op/select/tiny/float32", "cpu", ("tiny",)) == "RuntimeError: no such kernel"


def test_a_part_that_does_not_run_on_the_stand_in_is_called():
    ran = dict.fromkeys(PARTS, RIGHT)
    assert warm.to_be_called(ran) == sorted(warm.TORCH_COMPILES)
    called = warm.to_be_called({**ran, "streams": WRONG, "tiles": WRONG})
    assert {name.split("/")[1] for name in called} == {"memory_attention", "block", "tiles"}


def test_the_table_counts_a_kernel_where_it_is_met_first():
    kernels = {name: Kernel("some.module", name, 90, {}, {}, {}, {}) for name in "abc"}
    some, more = ({name: kernels[name] for name in names} for names in ("ab", "bc"))
    ran = {
        "gpu-test": preflight.Ran(Recorded(some, {}, 7), 2.0, ""),
        "first": preflight.Ran(Recorded(more, {}, 5), 3.0, ""),
    }
    compiled = {name: Compiled(kernel, 1.5) for name, kernel in kernels.items()}
    lines = [line.split() for line in preflight.table(ran, compiled)[1:]]
    assert lines == [["gpu-test", "7", "2", "2", "3.0", "2.0"], ["first", "5", "2", "1", "1.5", "3.0"]]
    assert preflight.kernels_of(ran) == kernels
