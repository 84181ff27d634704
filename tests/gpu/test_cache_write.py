"""The cache write and retrieval on a GPU: against float64, without a host sync, in CUDA graphs. `make gpu-test`."""

import pytest
import torch
from cache_write_cases import WriteCase, assert_written, write_cases
from cache_write_cases import make_case as make_write_case
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_cases import make_case, retrieve_cases, rounded
from torch.library import opcheck

import memflow_ops
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.policies import Coverage, Relevance
from memflow_ops.rotary import rope_rotation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCORES = ["linear", "softmax", "coverage"]


class OnGpu(WriteCase):
    """A case that runs its half precisions on the GPU."""

    def run(self, impl):
        if self.q.dtype == torch.float64:
            return super().run(impl)
        return {name: x.cpu() for name, x in WriteCase.run(self.moved("cuda"), impl).items()}


# Few examples: each is of other sizes, and compiles its kernels anew.
@settings(max_examples=15)
@given(write_cases(), st.sampled_from(DTYPES))
def test_every_number_is_rounded_once(case, dtype):
    assert_written(OnGpu(**vars(case)), dtype, "triton")


def test_a_wan_layer():
    case = make_write_case(frames=3, grid=(30, 52), heads=(12, 12), head_dim=128, first_frame=1500, pool_frames=7)
    case.mean_frames = 1
    case.options["block_size"] = 64
    assert_written(OnGpu(**vars(case)), torch.bfloat16, "triton")
    runs = [OnGpu(**vars(case.to(torch.bfloat16))).run("triton") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0]), "runs are alike to the bit"


def without_sync(run):
    """Runs it twice, the second time with host syncs forbidden."""
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run):
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = run()
    return graph, out


def test_a_graph_of_the_write_follows_the_places():
    case = make_write_case(frames=2, grid=(7, 9), options={"block_size": 16}).to(torch.bfloat16).moved("cuda")
    case.mean_frames = 1
    out = case.outputs()
    pools = (out.pop("memory_k"), out.pop("memory_v"))

    def run():
        return memflow_ops.write_projections(
            case.q, case.k, case.v, case.rotation, *pools, case.places, frame_tokens=63, norm=case.norm, **out,
            block_size=16,
        )  # fmt: skip

    without_sync(run)
    graph, q = captured(run)
    for places in ([[3, 1]], [[0, 4]], [[-1, 2]]):
        case.places.copy_(torch.tensor(places))
        for pool in (*pools, out["descriptors"]):
            pool.fill_(77.0)
        graph.replay()
        expected = case.moved("cpu").to(torch.float32).run("reference")
        torch.testing.assert_close(pools[0].cpu().float(), expected["memory_k"], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(pools[1].cpu().float(), expected["memory_v"], rtol=0, atol=0)
        torch.testing.assert_close(out["descriptors"].cpu().float(), expected["descriptors"], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(q.cpu().float(), expected["q"], rtol=1e-2, atol=1e-2)


@pytest.mark.alone
def test_the_write_beyond_two_to_the_31_elements():
    frames = 1400
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of device memory")
    shape = (1, frames * 1560, 12, 128)
    far = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    assert far[0].numel() > 2**31
    near = [torch.empty((1, 2 * 1560, 12, 128), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    q, k, v = torch.randn(3, 1, 1560, 12, 128, device="cuda").bfloat16()
    rotation = tuple(x.cuda() for x in rope_rotation(128, torch.tensor([4000]), torch.arange(30), torch.arange(52)))
    for pools, place in ((far, frames - 1), (near, 1)):
        where = torch.tensor([[place]], dtype=torch.int32, device="cuda")
        memflow_ops.write_projections(q, k, v, rotation, *pools, where, frame_tokens=1560, impl="triton")
    assert all(torch.equal(a[:, -1560:], b[:, -1560:]) for a, b in zip(far, near, strict=True))


def to_gpu(case):
    return {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in case.items()}


@settings(max_examples=15)
@given(retrieve_cases(), st.sampled_from(DTYPES))
def test_retrieves_as_the_reference(case, dtype):
    tensors, options = case
    low = rounded(tensors, dtype)
    expected = memflow_ops.retrieve_frames(**rounded(low, torch.float64), **options, impl="reference")
    indices, scores = memflow_ops.retrieve_frames(**to_gpu(low), **options, impl="triton")
    assert torch.equal(indices.cpu(), expected[0])
    torch.testing.assert_close(scores.cpu().double(), expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("redundancy", [None, 0.02])
@pytest.mark.parametrize("score", SCORES)
def test_a_wan_history(score, redundancy):
    """30 layers and 240 prototypes; choices differ from float64 only where two scores are all but equal."""
    if score == "coverage" and redundancy is not None:
        pytest.skip("coverage has no redundancy limit")
    case = to_gpu(make_case(layers=30, batch=1, words=64, heads=(12, 12), head_dim=128, stored=256, candidates=240))
    low = rounded(case, torch.bfloat16)
    run = lambda: memflow_ops.retrieve_frames(**low, count=8, score=score, redundancy=redundancy, impl="triton")  # noqa: E731
    indices, scores = without_sync(run)
    again = run()
    assert torch.equal(indices, again[0]) and torch.equal(scores, again[1])
    exact = rounded(low, torch.float64)
    expected = memflow_ops.retrieve_frames(**exact, count=8, score=score, redundancy=redundancy, impl="torch")
    assert (indices == expected[0]).double().mean() >= 0.75
    torch.testing.assert_close(scores.double()[:, 0], expected[1][:, 0], rtol=1e-3, atol=1e-6)
    graph, replayed = captured(run)
    low["candidates"].copy_(low["candidates"].flip(1))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))


@pytest.mark.parametrize("policy", [Relevance(2), Relevance(2, "softmax", 0.9), Coverage(2)], ids=lambda p: p.score)
def test_a_chunk_waits_for_nothing_while_the_device_holds_the_past(policy):
    layout = CacheLayout(2, 1, 20, 2, 16, bank_frames=2, device_frames=20, block_size=8, dtype=torch.bfloat16)
    cache = FrameCache(layout, "cuda")
    text = [torch.randn(1, 5, 2, 16, device="cuda").bfloat16() for _ in range(2)]
    lengths = torch.tensor([3], dtype=torch.int32, device="cuda")
    q, k, v = torch.randn(3, 1, 60, 2, 16, device="cuda").bfloat16()

    def chunk() -> None:
        if cache.candidate_frames()[0]:
            cache.set_bank_on_device(policy.choose_on_device(cache.candidates(), text, lengths).indices)
        frames = torch.arange(3, device="cuda") + cache.begin_chunk()
        rotation = rope_rotation(16, frames, torch.arange(4, device="cuda"), torch.arange(5, device="cuda"))
        for layer in range(2):
            cache.write_projections(layer, q, k, v, rotation, remember=True)
            cache.memory(layer)
        cache.commit()

    for _ in range(6):
        chunk()  # compiles
    without_sync(chunk)
    chosen = policy.choose_on_device(cache.candidates(), text, lengths)
    expected = chosen.read().frames
    cache.set_bank_on_device(chosen.indices)
    assert cache.bank() == [[0, 1, 2, *sorted(expected[0])]]


@pytest.mark.parametrize("score", SCORES)
def test_registered_rightly(score):
    case = to_gpu(rounded(make_case(candidates=4), torch.float32))
    weights = torch.ones(1, dtype=torch.float64, device="cuda")
    redundancy = None if score == "coverage" else 0.5
    arguments = (
        *(case[n] for n in ("text_keys", "means", "candidates", "text_lengths")),
        weights,
        3,
        score,
        redundancy,
    )
    result = opcheck(torch.ops.memflow_ops.retrieve_frames.default, (*arguments, 0.4, "triton"))
    assert set(result.values()) == {"SUCCESS"}
