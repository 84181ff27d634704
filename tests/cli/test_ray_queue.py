"""The queue of `memflow generate --ray` over actors that only pretend, so that every way of failing can be tried."""

import sys
from types import SimpleNamespace

import pytest
import typer

from memflow_ops.cli import ray_stories
from memflow_ops.cli.ray_stories import Crew, Made, Worker, _Queue
from memflow_ops.files import InUse


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


def node(name, address, alive=True, **resources):
    """As `ray.nodes` tells of it."""
    return {"NodeID": name, "NodeManagerAddress": address, "Alive": alive, "Resources": resources}


NODES = [
    node("a", "10.0.0.1", CPU=8.0, GPU=2.0),
    node("b", "10.0.0.2", CPU=1.0),
    node("c", "10.0.0.3", CPU=4.0, GPU=4.0),
    node("d", "10.0.0.3", CPU=1.0, GPU=1.0),
    node("e", "10.0.0.2", alive=False, CPU=64.0, GPU=8.0),
]


@pytest.mark.parametrize(
    ("crew", "on_cluster", "beside"),
    [
        (Crew(1, 0, 100), 14, {"a": 8, "b": 1, "c": 5, "d": 5}),
        (Crew(1, 1, 100), 7, {"a": 2, "b": 1, "c": 5, "d": 5}),
        (Crew(2, 1, 100), 4, {"a": 2, "b": 1, "c": 2, "d": 2}),
        (Crew(0.1, 0, 1000), 140, {"a": 80, "b": 10, "c": 50, "d": 50}),
        (Crew(1, 0, 3), 3, {"a": 3, "b": 1, "c": 3, "d": 3}),
        (Crew(16, 0, 3), 0, {"a": 1}),
    ],
)
def test_actors_of_a_machine_are_as_many_as_it_has_room_for(crew, on_cluster, beside):
    """Two of these nodes are one machine, and one is gone. A node without room for one, where there is one in spite of
    it, has one."""
    assert crew.on_cluster(NODES) == on_cluster
    assert {name: crew.beside(NODES, name) for name in beside} == beside


@pytest.fixture
def worker(monkeypatch):
    """A worker on node a, beside three others, and how many it was told divide the memory of its machine."""
    here = SimpleNamespace(get_node_id=lambda: "a")
    ray = SimpleNamespace(nodes=lambda: NODES, get_runtime_context=lambda: here)
    monkeypatch.setitem(sys.modules, "ray", ray)
    told = []

    def load(sharing):
        told.append(sharing)
        return [], SimpleNamespace(device=None), [["of stream 0"]]

    made = Worker(SimpleNamespace(load=load, sources=None), Crew(2, 0, 9))
    assert told == [4]
    return made


def test_an_actor_waits_for_a_stream_that_another_process_has_open(worker, monkeypatch):
    """That process may be an actor of a command that was killed a moment ago."""
    answers = [InUse("another process"), InUse("another process"), ["its plans"]]

    def open_snapshots(plans, sources, device):
        assert plans == ["of stream 0"]
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray_stories, "open_snapshots", open_snapshots)
    monkeypatch.setattr(ray_stories, "POLL_SECONDS", 0.01)
    assert worker._open(0) == ["its plans"] and not answers

    answers[:] = [InUse("another process is writing")]
    monkeypatch.setattr(ray_stories, "IN_USE_SECONDS", -1.0)
    assert worker.make(0) == Made([], "InUse: another process is writing")


def test_a_cluster_that_does_not_come_up_is_told_in_one_line(monkeypatch, capfd):
    def init(**_):
        raise Exception("The node timed out\nduring startup")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    with pytest.raises(typer.Exit) as end:
        ray_stories.make_stories(None, ["a story"], [1], "local", 1, gpu=False)
    assert end.value.exit_code == 2
    assert capfd.readouterr().err == "memflow: no Ray cluster at local: The node timed out during startup\n"
