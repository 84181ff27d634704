"""One video on two and on four processes against the same on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from split_streams import CASES, HEADS, LAYERS, STOPPED, cache_tensors, make_model, make_streamer, run

from memflow_ops.bench.scaling import Cost
from memflow_ops.bench.sizes import Size
from memflow_ops.cache.attend import HeadShare
from memflow_ops.cache.policies import Coverage, Relevance
from memflow_ops.model.parallel.ranks import (
    OF_A_COLLECTIVE,
    LostRanks,
    check_ranks,
    launched_ranks,
    lost_if_it_fails,
    possible_ranks,
    rank_device,
)
from memflow_ops.model.parallel.retrieval import split_policy
from memflow_ops.model.parallel.state import own_state

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FEW = 8
"""Codes of keys, and as many of values, of an int8 bank that may differ between processes after a chunk, of several
hundred new ones."""
CHECKS = (
    "exchange",
    "gradients",
    "compiled",
    "agreement",
    "sharded_weights",
    "stopped_and_resumed",
    "history_on_disk",
    "refusals",
    "example",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The files of four processes that have run all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"}
    workers = [
        subprocess.Popen(
            [sys.executable, HERE / "worker.py", str(rank), folder],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        errors = [worker.communicate(timeout=900)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (worker, error) in enumerate(zip(workers, errors, strict=True)):
        assert worker.returncode == 0, f"rank {rank}: {error}"
    return folder


def of_ranks(made: Path, case: str, count: int) -> list[dict]:
    return [torch.load(made / f"{case}-{count}-{rank}.pt", weights_only=True) for rank in range(count)]


def run_alone(case: str, codes: list[dict]) -> dict:
    """What one process makes of a case. codes: what several have in an int8 bank after each chunk.

    A number on the border between two codes may be rounded to either, and one code more or less moves the next latents
    by far more than 1e-5. So the two may differ by 1 in a few new ones of each chunk; all that follows goes by those of
    the several processes.
    """
    want = run(make_streamer(make_model(case), case), codes=codes)
    for mine, other in zip(want["codes"], codes, strict=True):
        assert mine["places"] == other["places"]
        for own, theirs in zip(mine["codes"], other["codes"], strict=True):
            moved = (own.int() - theirs.int()).abs()
            assert moved.max() <= 1 and moved.sum() <= FEW
    return want


@pytest.mark.parametrize("case", CASES)
def test_a_split_stream_is_that_of_one_process(made, case):
    """Latents to rounding; banks, the blocks that were activated and all else that a chunk tells to the letter. The
    ranks hold the same to the bit."""
    want = None
    for count in (2, 4):
        got = of_ranks(made, case, count)
        if want is None or got[0]["codes"]:
            want = run_alone(case, got[0]["codes"])
        for one in got:
            assert torch.equal(one["frames"], got[0]["frames"])
            assert all(one[same] == got[0][same] for same in ("told", "scores", "banks"))
            assert [len(noted) for noted in one["collectives"]] == [len(noted) for noted in got[0]["collectives"]]
        torch.testing.assert_close(got[0]["frames"], want["frames"], rtol=0, atol=1e-5)
        assert got[0]["told"] == want["told"] and got[0]["banks"] == want["banks"]
        assert want["frames"].std() > 0.1
        if CASES[case].get("memory", "memflow") in ("memflow", "released"):
            assert all(want["told"][-1]["retrieved"])
        for scores, expected in zip(got[0]["scores"], want["scores"], strict=True):
            for story, of in zip(scores, expected, strict=True):
                assert story == pytest.approx(of, abs=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_its_part_of_the_past(made, case):
    whole = sum(tensor.nbytes for tensor in cache_tensors(make_streamer(make_model(), case)))
    for count in (2, 4):
        assert [one["bytes"] for one in of_ranks(made, case, count)] == [whole // count] * count


@pytest.mark.parametrize("case", STOPPED)
def test_what_four_processes_have_saved_two_and_one_continue(made, case):
    state = torch.load(made / f"{case}-state.pt", weights_only=True)
    one = make_streamer(make_model(case), case)
    assert state["cache"]["layout"] == one.state_dict()["cache"]["layout"]
    one.load_state_dict(state)
    before, want = of_ranks(made, case, 4)[0]["codes"][:5], None
    pair = of_ranks(made, f"{case}, resumed", 2)
    assert torch.equal(pair[0]["frames"], pair[1]["frames"])
    for got in (run(one), pair[0]):
        if want is None or got["codes"]:
            want = run_alone(case, [*before, *got["codes"]])
        frames = got["frames"].shape[2]
        torch.testing.assert_close(got["frames"], want["frames"][:, :, -frames:], rtol=0, atol=1e-5)
        assert got["told"] == want["told"][5:] and got["banks"] == want["banks"][-len(got["banks"]) :]
    with pytest.raises(ValueError, match="of a cache with kv_heads=4, here 6"):
        own_state(state["cache"], HeadShare(0, 2, 6))


@pytest.mark.parametrize("count", [2, 4])
def test_what_is_sent_does_not_depend_on_the_history(made, count):
    """Two exchanges a layer and pass, one gathering of the result a noisy pass; for a chunk one exchange of scores and
    one of counts. The clean pass ends before the last layer's result, and has no result."""
    chunks = of_ranks(made, "kept", count)[0]["collectives"]
    steps, sent = 2, []
    for noted in chunks[4:]:
        names = [name for name, _ in noted]
        assert names.count("all_to_all_single") == (steps + 1) * 2 * LAYERS - 1
        assert names.count("_allgather_base_") == steps + 2
        assert len(names) == (steps + 1) * 2 * LAYERS - 1 + steps + 2
        sent.append(sum(size for name, size in noted if name == "all_to_all_single") * (count - 1) // count)
    assert len(set(sent)) == 1
    if count == 2:  # With 4, some have a token more. Two stories in float32; the prediction is of one in bfloat16.
        size = Size("", height=4, width=6, dim=8 * HEADS, heads=HEADS, layers=LAYERS, steps=steps)
        assert sent[0] == Cost(size).sent_bytes(count) * 2 * 2


@pytest.mark.parametrize("name", CHECKS)
def test_on_four_ranks(made, name):
    for rank in range(4):
        error = (made / f"{name}-{rank}.txt").read_text()
        assert not error, f"rank {rank}: {error}"


def test_every_check_is_one_of_these(made):
    assert {path.stem.rpartition("-")[0] for path in made.glob("*.txt")} == set(CHECKS)


@pytest.mark.parametrize(("heads", "possible"), [(12, [2, 3, 4, 6, 12]), (40, [2, 4, 5, 8, 10, 20, 40]), (1, [])])
def test_heads_that_cannot_be_dealt_out_are_refused_with_what_can(heads, possible):
    assert possible_ranks(heads) == possible
    for count in (1, *possible):
        check_ranks(heads, count)
    words = f"{', '.join(map(str, possible))} processes are possible" if possible else "only 1 process is possible"
    with pytest.raises(ValueError, match=f"{heads} attention heads cannot be dealt out to 7 processes: {words}"):
        check_ranks(heads, 7)


@pytest.mark.parametrize("kind", [Relevance, Coverage])
def test_a_policy_that_is_made_from_one_of_ours_is_refused(kind):
    """It may choose otherwise, and this would be lost."""

    class Mine(kind):
        pass

    assert split_policy(kind(2), None).policy.bank_frames == 2
    with pytest.raises(ValueError, match="got a Mine"):
        split_policy(Mine(2), None)


def test_an_error_of_a_collective_is_told_from_others():
    """Weights that are dealt out are gathered by torch, beside the passes."""
    peer = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4801"
    for error in (RuntimeError(peer), dist.DistBackendError("the watchdog has given up")):
        with pytest.raises(LostRanks, match="another process has ended"), lost_if_it_fails(OF_A_COLLECTIVE):
            raise error
    for error in (RuntimeError("CUDA out of memory"), LostRanks("another process has ended (gloo)")):
        with pytest.raises(type(error)) as raised, lost_if_it_fails(OF_A_COLLECTIVE):
            raise error
        assert raised.value is error


def test_only_torchrun_makes_several():
    launched = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    assert launched_ranks(launched) == 3
    assert launched_ranks({"WORLD_SIZE": "3"}) == launched_ranks({}) == 1


def test_a_rank_takes_the_device_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert rank_device(torch.device("cpu"), {"LOCAL_RANK": "5"}) == torch.device("cpu")
    assert rank_device(torch.device("cuda"), {"LOCAL_RANK": "1"}) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="say --device cuda, got cuda:0"):
        rank_device(torch.device("cuda:0"), {"LOCAL_RANK": "1"})
    with pytest.raises(ValueError, match="process 2 of this machine has no CUDA device: torch sees 2"):
        rank_device(torch.device("cuda"), {"LOCAL_RANK": "2"})
