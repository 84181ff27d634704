"""write_projections against float64 and against the parts of the model; write_frames."""

import pytest
import torch
from cache_write_cases import assert_written, make_case, write_cases
from hypothesis import given, settings
from hypothesis import strategies as st

import memflow_ops
from memflow_ops.impl.torch.cache_write import write_frames_on_device
from memflow_ops.model.wan.transformer import RMSNorm
from memflow_ops.ops import registration
from memflow_ops.rotary import apply_rotation, rope_rotation, time_pairs


@settings(max_examples=60)
@given(write_cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_number_is_rounded_once(case, dtype):
    assert_written(case, dtype, "torch")


@settings(max_examples=20)
@given(write_cases())
def test_reference_agrees_with_the_parts_of_the_model(case):
    """In float32 `torch` agrees to the bit, so that fused writes do not change what a CPU streams."""
    case = case.to(torch.float32)
    size = case.q.shape[3]
    plain = {"q": case.q, "k": case.k}
    if case.norm:
        for name, weight in (("q", case.norm.weight_q), ("k", case.norm.weight_k)):
            norm = RMSNorm(len(weight), case.norm.eps)
            norm.weight.data = weight
            plain[name] = norm(plain[name].flatten(2)).unflatten(-1, (-1, size)).detach()
    rotated = {name: apply_rotation(x, *case.rotation) for name, x in plain.items()}
    for impl, tolerance in (("torch", 0.0), ("reference", 2e-5)):
        got = case.run(impl)
        torch.testing.assert_close(got["q"], rotated["q"], rtol=tolerance, atol=tolerance)
        for story, frames in enumerate(case.places.tolist()):
            for frame, place in enumerate(frames):
                source = slice(frame * case.frame_tokens, (frame + 1) * case.frame_tokens)
                if 0 <= place < case.pool_frames:
                    stored = got["memory_k"][story].unflatten(0, (case.pool_frames, -1))[place]
                    torch.testing.assert_close(stored, rotated["k"][story, source], rtol=tolerance, atol=tolerance)
        if case.mean_frames:
            tokens = plain["k"][:, : case.mean_frames * case.frame_tokens]
            size = min(case.options["mean_size"] or case.frame_tokens, case.frame_tokens)
            means = memflow_ops.describe_blocks(tokens, size, case.frame_tokens).unflatten(1, (case.mean_frames, -1))
            torch.testing.assert_close(got["means"], means, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_may_lie_anywhere(impl, norm, dtype):
    """Inputs may start at an odd place, have odd strides, and have heads before tokens. They are not changed."""
    case = make_case(with_norm=norm).to(dtype)
    expected = case.run(impl)

    def moved(x, change):
        memory = torch.full((x.numel() * 2 + 1,), torch.nan, dtype=x.dtype)
        strides = list(change(x).contiguous().stride())
        strides[0] += 1
        view = memory[1:].as_strided(change(x).shape, strides).copy_(change(x))
        return change(view)

    for change in (lambda x: x, lambda x: x.transpose(1, 2)):
        case.q, case.k, case.v = (moved(x, change) for x in (case.q, case.k, case.v))
        before = case.q.clone(), case.k.clone()
        got = case.run(impl)
        for name in (name for name, x in expected.items() if x is not None):
            off = 2 * torch.finfo(dtype).eps  # Sums over another layout may be rounded in another way.
            torch.testing.assert_close(got[name], expected[name], rtol=off, atol=off, equal_nan=True)
        assert got["q"].is_contiguous()
        assert torch.equal(case.q, before[0]) and torch.equal(case.k, before[1])
    if dtype == torch.float32 and not norm:
        assert torch.equal(apply_rotation(case.q, *case.rotation), case.run("torch")["q"])


def test_rotation_compiles_as_one_graph():
    case = make_case().to(torch.float32)
    whole = torch.compile(apply_rotation, fullgraph=True, backend="aot_eager")
    x = torch.cat([case.q.new_zeros(1), case.q.flatten()])[1:].view(case.q.shape).requires_grad_()
    found, expected = whole(x, *case.rotation), apply_rotation(x, *case.rotation)
    assert torch.equal(found, expected)
    above = torch.randn_like(found)
    assert torch.equal(*(torch.autograd.grad(out, x, above)[0] for out in (found, expected)))


def test_compiles_whole():
    case = make_case(moved=7, options={"block_size": 4}).to(torch.float32)
    case.mean_frames = 1
    expected, out = case.run("torch"), case.outputs()

    def run(q, k, v):
        options = dict(frame_tokens=case.frame_tokens, norm=case.norm, **case.options)
        options["memory_rotation"] = case.memory_rotation
        pools = {name: x for name, x in out.items() if name not in ("memory_k", "memory_v")}
        return 2 * memflow_ops.write_projections(
            q, k, v, case.rotation, out["memory_k"], out["memory_v"], case.places, **pools, **options
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.q, case.k, case.v), 2 * expected["q"])
    for name, x in out.items():
        torch.testing.assert_close(x, expected[name])


def test_any_index():
    """Products of two rotated frames depend on their distance alone, at the millionth frame as at the first."""
    near, far = (make_case(frames=2, first_frame=n, seed=1).to(torch.float32) for n in (3, 1_000_003))
    grid = [torch.arange(3), torch.arange(4)]
    turned = rope_rotation(16, torch.tensor([1_000_003, 1_000_004]), *grid)
    assert torch.equal(far.rotation[0], turned[0]) and not torch.equal(near.rotation[0], far.rotation[0])
    a, b = near.run("torch")["q"], far.run("torch")["q"]
    products = [torch.einsum("blhd,bmhd->bhlm", x, x) for x in (a, b)]
    torch.testing.assert_close(*products, rtol=1e-5, atol=2e-5)


def test_frames_are_written_where_a_tensor_says():
    """Both ways of writing, the CPU's and that of other devices, write views into a view and leave out other frames."""
    pool, new = torch.randn(2, 3, 7, 5, 2, 4), torch.randn(3, 5, 3, 2, 4).transpose(1, 2)
    places = torch.tensor([[6, 0, 2], [-1, -1, -1], [7, 0, 1]], dtype=torch.int32)
    want = pool.clone()
    for story, frame, place in ((0, 0, 6), (0, 1, 0), (0, 2, 2), (2, 1, 0), (2, 2, 1)):
        want[1, story, place] = new[story, frame]
    for write in (registration.write_frames, write_frames_on_device):
        got = pool.clone()
        write(got[1], places, new)
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_pairs_that_have_no_second_angle_are_turned_as_the_others(impl):
    """Space does not turn with the frame, so that the pairs of time, which come first, are all that bounded positions
    need; the numbers are the same to the bit."""
    pairs = time_pairs(16)
    assert 1 < pairs < 8
    few, all_of_them = (make_case(batch=2, moved=7, moved_pairs=n).to(torch.bfloat16) for n in (pairs, None))
    for case in (few, all_of_them):  # in one batch element as in the other, so that only time differs
        case.rotation = tuple(part[:1] for part in case.rotation)
    found, expected = few.run(impl), all_of_them.run(impl)
    assert not torch.equal(found["memory_q"], found["q"])
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
