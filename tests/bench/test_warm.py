"""`make gpu-warm`: every contender is called, and an error costs one case alone."""

from memflow_ops.bench import warm
from memflow_ops.bench.cases import selection


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
