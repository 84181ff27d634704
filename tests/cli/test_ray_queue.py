"""The queue of `memflow generate --ray` over actors that only pretend, so that every way of failing can be tried."""

from types import SimpleNamespace

import pytest
import typer

from memflow_ops.cli.ray_stories import Made, _Queue


class RayError(Exception):
    """As Ray's errors do, of an actor, a machine or a result that is lost."""


class Actor:
    """An actor that does what a function says with each stream."""

    def __init__(self, make, about=(["of all"], "")):
        self.make, self.chunks = (SimpleNamespace(remote=method) for method in (lambda n: (make, n), lambda: None))
        self.about = SimpleNamespace(remote=lambda: (lambda _: about, 0))


def get(reference, timeout=None):
    if reference is None:
        return 0
    make, number = reference
    made = make(number)
    if isinstance(made, Exception):
        raise made
    return made


RAY = SimpleNamespace(get=get, wait=lambda all_, timeout: (all_[:1], all_[1:]), exceptions=SimpleNamespace())
RAY.exceptions.RayError = RayError


def run(*actors, streams=4, count=None):
    """The failures, and the queue that has come to them."""
    starting = iter(actors)
    queue = _Queue(RAY, lambda: next(starting), [f"stream {i}" for i in range(streams)], [1] * streams)
    return queue.run(count or len(actors)), queue


def test_every_stream_is_made_once():
    made = []

    def make(number):
        made.append(number)
        return Made([f"made {number}"], None)

    assert run(Actor(make), Actor(make))[0] == [] and sorted(made) == [0, 1, 2, 3]


def test_an_actor_that_can_make_nothing_takes_no_stream_from_the_others(capfd):
    made = []

    def make(number):
        made.append(number)
        return Made([], None)

    def refuse(number):
        return Made([], "no checkpoint at /models", refused=True)

    assert run(Actor(make), Actor(refuse))[0] == [] and sorted(made) == [0, 1, 2, 3]
    assert "An actor cannot make anything on its machine: no checkpoint at /models" in capfd.readouterr().err
    failed, _ = run(Actor(refuse), Actor(refuse), streams=2)
    assert set(failed) == {
        "stream 0: no checkpoint at /models",
        "stream 1: no checkpoint at /models",
    }


def test_an_error_of_ray_whatever_its_kind_costs_an_attempt():
    def lost(number):
        return RayError("the machine is gone") if number == 1 else Made([], None)

    failed, queue = run(*[Actor(lost) for _ in range(9)], count=2)
    assert failed == ["stream 1: 3 actors died at it (the machine is gone)"] and queue.attempts == [1, 3, 1, 1]


def test_an_actor_that_dies_while_it_loads_ends_the_command_in_one_line(capfd):
    with pytest.raises(typer.Exit):
        run(Actor(None, about=RayError("killed for\nits memory")))
    assert capfd.readouterr().err == "memflow: an actor died before it had loaded anything: killed for its memory\n"
