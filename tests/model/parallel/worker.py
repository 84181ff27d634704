"""One of four processes that run all cases, as four ranks and as two pairs; what they make goes to files.

python worker.py RANK FOLDER
"""

import runpy
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from split_streams import CASES, STOPPED, make_model, make_streamer, run

from memflow_ops.cache.policies import Retrieved
from memflow_ops.model.parallel.ranks import Ranks
from memflow_ops.model.parallel.ulysses import SplitTokens, heads_to_tokens, tokens_to_heads
from memflow_ops.model.parallel.weights import shard_weights, weight_bytes

COUNT = 4
EXAMPLE = Path(__file__).parents[3] / "examples" / "sharded_heads.py"


def whole(seed: int, *shape: int) -> torch.Tensor:
    """The same numbers in every process."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def own(x: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """This rank's tokens of x (B, tokens, ...)."""
    sizes = ranks.tokens(x.shape[1])
    return x.split(sizes, 1)[ranks.rank].clone()


def check_exchange(ranks: Ranks) -> None:
    """There and back, with fewer key heads than query heads, and tokens that the ranks do not divide."""
    for tokens in (8, 11):
        sizes = ranks.tokens(tokens)
        for dtype in (torch.float32, torch.bfloat16):
            q, k = whole(1, 2, tokens, 8, 6).to(dtype), whole(2, 2, tokens, 4, 6).to(dtype)
            got = tokens_to_heads([own(q, ranks), own(k, ranks)], sizes, ranks.group)
            for x, heads in zip((q, k), got, strict=True):
                share = ranks.heads(x.shape[2])
                assert torch.equal(heads, share.of(x)) and heads.stride(-1) == 1
            back = heads_to_tokens(got[0], sizes, sizes[ranks.rank], ranks.group)
            assert torch.equal(back, own(q, ranks))


def check_gradients(ranks: Ranks) -> None:
    """Gradients of rank-dependent sums: each comes to the rank whose token it belongs to."""
    q = whole(1, 1, 6, 4, 2)
    mine = own(q, ranks).requires_grad_()
    sizes = ranks.tokens(6)
    (heads,) = tokens_to_heads([mine], sizes, ranks.group)
    weights = ranks.heads(4).of(whole(5, 1, 6, 4, 2))
    back = heads_to_tokens(heads * weights, sizes, sizes[ranks.rank], ranks.group)
    back.sum().backward()
    torch.testing.assert_close(mine.grad, own(whole(5, 1, 6, 4, 2), ranks))
    split = SplitTokens(ranks, 6)
    try:
        split.undo(mine)
    except NotImplementedError:
        return
    raise AssertionError("tokens that need a gradient were gathered")


def check_compiled(ranks: Ranks) -> None:
    sizes, q = ranks.tokens(10), whole(1, 1, 10, 4, 2)

    def there_and_back(x):
        (heads,) = tokens_to_heads([x], sizes, ranks.group)
        return heads_to_tokens(2 * heads, sizes, sizes[ranks.rank], ranks.group)

    if ranks.rank == 0:  # One is enough, and takes seconds; the others do the same uncompiled.
        there_and_back = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(there_and_back(own(q, ranks)), 2 * own(q, ranks))


def check_agreement(ranks: Ranks) -> None:
    assert ranks.least(7 - ranks.rank) == 8 - ranks.count
    assert ranks.any(ranks.rank == ranks.count - 1) and not ranks.any(False)
    assert ranks.tell(f"rank {ranks.rank} " + "é" * 600)[1] == "rank 1 " + "é" * 600
    x = whole(ranks.rank, 3, 2)
    torch.testing.assert_close(ranks.mean(x), torch.stack([whole(r, 3, 2) for r in range(ranks.count)]).mean(0))


def check_sharded_weights(ranks: Ranks) -> None:
    """The same bits as with whole weights, which take a rank only its part."""
    want = run(make_streamer(make_model(), "memflow", ranks), 3)
    model = make_model()
    blocks, all_of_it = weight_bytes(model.blocks), weight_bytes(model)
    shard_weights(model, ranks)
    assert weight_bytes(model.blocks) <= blocks / ranks.count * 1.2
    assert weight_bytes(model) - weight_bytes(model.blocks) == all_of_it - blocks
    got = run(make_streamer(model, "memflow", ranks), 3)
    assert torch.equal(got["frames"], want["frames"])
    assert weight_bytes(model.blocks) <= blocks / ranks.count * 1.2  # and so after the passes


def check_stopped_and_resumed(ranks: Ranks) -> None:
    """Stopped on four ranks and resumed on four, to the bit; a pair and a single process resume in main and in the
    test."""
    for case in STOPPED[:2]:
        first, second = make_streamer(make_model(case), case, ranks), make_streamer(make_model(case), case, ranks)
        run(first, 5)
        second.load_state_dict(first.state_dict())
        got, want = run(second), run(first)
        assert torch.equal(got["frames"], want["frames"])
        assert all(got[same] == want[same] for same in ("told", "scores", "banks"))
        for mine, other in zip(got["codes"], want["codes"], strict=True):
            assert mine["places"] == other["places"]
            assert all(torch.equal(a, b) for a, b in zip(mine["codes"], other["codes"], strict=True))


def check_history_on_disk(ranks: Ranks) -> None:
    """Each rank has a folder for its heads. Resumed by as many ranks, the stream goes on to the same bits."""
    sizes = {"device_frames": 4, "disk_frames": 9, "bank_frames": 2}
    want = run(make_streamer(make_model(), "memflow", ranks, bank_frames=2))
    with tempfile.TemporaryDirectory() as folder:
        first = make_streamer(make_model(), "memflow", ranks, history_dir=folder, **sizes)
        run(first, 5)
        state = first.state_dict()
        got = run(first)
        assert torch.equal(got["frames"], want["frames"][:, :, 15:])
        first.close()
        second = make_streamer(make_model(), "memflow", ranks, history_dir=folder, **sizes)
        second.load_state_dict(state)
        assert torch.equal(run(second)["frames"], got["frames"])
        second.close()
    alone = make_streamer(make_model(), "memflow", device_frames=4, host_frames=9, bank_frames=2)
    try:
        alone.load_state_dict({**state, "settings": asdict(alone.settings)})
    except ValueError as error:
        assert "as many can go on from it, not 1" in str(error)
    else:
        raise AssertionError("one process took up what four have on disk")


def check_refusals(ranks: Ranks) -> None:
    class Mine:
        def choose(self, candidates, text_keys, text_lengths):
            return Retrieved.nothing(2)

    from memflow_ops.model.streaming.streamer import Streamer

    model, some = make_model(), make_streamer(make_model(), "memflow")
    for changes, words in (
        ({"policy": Mine()}, "Relevance, Coverage or Random"),
        ({"cuda_graphs": True}, "no CUDA graphs"),
    ):
        try:
            Streamer(model, 2, some.settings, encode=some.text.encode, ranks=ranks, **changes)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{changes} was accepted")


def check_example(ranks: Ranks) -> None:
    got, want = runpy.run_path(str(EXAMPLE))["main"]()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills what is not written with NaN
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), COUNT), rank=rank, world_size=COUNT)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    device = torch.device("cpu")
    for number, case in enumerate(CASES):
        model, groups = make_model(case), [dist.group.WORLD]
        if rank // 2 == number % 2:
            groups.append(pairs[rank // 2])
        for group in groups:
            ranks = Ranks(group, device)
            made = run(make_streamer(model, case, ranks), counted=case == "kept")
            torch.save(made, folder / f"{case}-{ranks.count}-{ranks.rank}.pt")
    for case in STOPPED:
        model = make_model(case)
        on_four, on_two = (make_streamer(model, case, Ranks(g, device)) for g in (dist.group.WORLD, pairs[rank // 2]))
        run(on_four, 5)
        state = on_four.state_dict()
        on_two.load_state_dict(state)
        torch.save(run(on_two), folder / f"{case}, resumed-2-{rank % 2}.pt")
        if rank == 0:
            torch.save(state, folder / f"{case}-state.pt")
    for name, check in CHECKS.items():
        error = ""
        try:
            check(Ranks(dist.group.WORLD, device))
        except Exception:
            error = traceback.format_exc()
        (folder / f"{name}-{rank}.txt").write_text(error)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
