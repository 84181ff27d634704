"""The cache write: against float64, against what the model does by itself, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck
from write_cases import assert_written, make_case, write_cases

import memflow_ops as ops
from memflow_ops.model.wan.transformer import RMSNorm
from memflow_ops.rotary import apply_rotation, rope_rotation


@settings(max_examples=60)
@given(write_cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_every_number_is_rounded_once(case, dtype):
    assert_written(case, dtype, "torch")


@settings(max_examples=20)
@given(write_cases())
def test_reference_agrees_with_the_parts_of_the_model(case):
    """In float32, `torch` to the bit: streams on a CPU are what they were."""
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
            means = ops.describe_blocks(tokens, size, case.frame_tokens).unflatten(1, (case.mean_frames, -1))
            torch.testing.assert_close(got["means"], means, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_may_lie_anywhere(impl, norm, dtype):
    """At an odd place in memory, with rows of odd lengths, heads before tokens; what is handed in stays as it is."""
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
            off = 2 * torch.finfo(dtype).eps  # sums over another layout may round otherwise
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


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("optional", [True, False])
def test_opcheck(impl, optional):
    case = make_case(batch=2, options={"block_size": 5}, seed=3).to(torch.float32)
    case.mean_frames, case.described = int(optional), optional
    out = case.outputs()
    angles = [x.flatten(2) for x in case.rotation]
    weights = case.norm[:2] if optional else (None, None)
    arguments = (
        case.q, case.k, case.v, *angles, out["memory_k"], out["memory_v"], case.places, *weights, out["descriptors"],
        out["means"], case.frame_tokens, 5, case.frame_tokens, 1e-6, impl,
    )  # fmt: skip
    result = opcheck(torch.ops.memflow_ops.write_projections.default, arguments)
    assert set(result.values()) == {"SUCCESS"}


def test_compiles_whole():
    case = make_case(options={"block_size": 4}).to(torch.float32)
    case.mean_frames = 1
    expected, out = case.run("torch"), case.outputs()

    def run(q, k, v):
        options = dict(frame_tokens=case.frame_tokens, norm=case.norm, **case.options)
        pools = {name: x for name, x in out.items() if name not in ("memory_k", "memory_v")}
        return 2 * ops.write_projections(
            q, k, v, case.rotation, out["memory_k"], out["memory_v"], case.places, **pools, **options
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.q, case.k, case.v), 2 * expected["q"])
    for name, x in out.items():
        torch.testing.assert_close(x, expected[name])


def test_any_index():
    """Angles come from the positions themselves: a frame is turned alike whether it is the first or the millionth, but
    for where it stands."""
    near, far = (make_case(frames=2, first_frame=n, seed=1).to(torch.float32) for n in (3, 1_000_003))
    grid = [torch.arange(3), torch.arange(4)]
    turned = rope_rotation(16, torch.tensor([1_000_003, 1_000_004]), *grid)
    assert torch.equal(far.rotation[0], turned[0]) and not torch.equal(near.rotation[0], far.rotation[0])
    a, b = near.run("torch")["q"], far.run("torch")["q"]
    # products of two frames that are as far apart are the same, wherever they are
    products = [torch.einsum("blhd,bmhd->bhlm", x, x) for x in (a, b)]
    torch.testing.assert_close(*products, rtol=1e-5, atol=2e-5)


def refused(**changes) -> None:
    case = make_case(batch=2, options={"block_size": 5}).to(torch.float32)
    case.mean_frames = 1
    arguments = dict(
        q=case.q, k=case.k, v=case.v, rotation=case.rotation, places=case.places, frame_tokens=case.frame_tokens,
        norm=case.norm, **case.outputs(), **case.options,
    )  # fmt: skip
    arguments |= {name: change(arguments[name]) for name, change in changes.items()}
    before = {name: arguments[name].clone() for name in ("memory_k", "memory_v") if name not in changes}
    try:
        ops.write_projections(**arguments)
    finally:
        assert all(torch.equal(arguments[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda q: q[:, 1:], ValueError, r"whole frames of 12 tokens and an even head size, got \(2, 23, 2, 16\)"),
        ("k", lambda k: k[:, :12], ValueError, r"k must have shape \(2, 24, 2, 16\), got \(2, 12, 2, 16\)"),
        ("v", lambda v: v.double(), TypeError, "v must have the dtype of q, torch.float32, got torch.float64"),
        ("memory_v", lambda x: x[:, :12], ValueError, r"memory_v must have shape \(2, 60, 2, 16\)"),
        ("memory_k", lambda x: x[:, :50], ValueError, "memory_k must hold whole frames of 12 tokens"),
        ("places", lambda x: x.long(), TypeError, "places must be int32, got torch.int64"),
        ("places", lambda x: x[:, :1], ValueError, r"places must have shape \(2, 2\), got \(2, 1\)"),
        ("rotation", lambda r: (r[0].double(), r[1]), TypeError, "cosines of rotation must be a float32 tensor"),
        ("rotation", lambda r: (r[0], r[1][:, 1:]), ValueError, r"sines of rotation must have shape \(1 or 2, \(24, 1"),
        (
            "norm",
            lambda n: n._replace(weight_k=n.weight_k[1:]),
            ValueError,
            r"weight_k of norm must have shape \(32,\)",
        ),
        ("descriptors", lambda x: x[:, 1:], ValueError, r"descriptors must have shape \(2, 15, 2, 16\)"),
        ("means", lambda x: x.repeat(1, 3, 1, 1, 1), ValueError, "means must be of 1 to 2 frames"),
        ("block_size", lambda n: 0, ValueError, "block_size must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(name, change, error, message):
    with pytest.raises(error, match=message):
        refused(**{name: change})


def test_gradients_are_refused():
    with pytest.raises(NotImplementedError, match="no backward"):
        refused(q=lambda q: q.requires_grad_())
