"""Autocast: inputs of different dtypes are cast as torch's own attention casts them; others stay as they are."""

import cache_write_cases
import pytest
import torch
from attention_cases import small_case

import memflow_ops
from memflow_ops.cache import BlockSelection, CacheLayout, FrameCache, ReleasedCache, ReleasedLayout, attend_to_memory
from memflow_ops.rotary import rope_rotation

BOTH = pytest.mark.parametrize("impl", ["reference", "torch"])


@BOTH
@pytest.mark.parametrize("wide", [("q", "memory_k"), ("q",), ("v", "memory_k", "memory_v")], ids=" ".join)
def test_inputs_of_different_dtypes_are_cast_to_that_of_autocast(impl, wide):
    """Norms kept in float32 give queries and keys wider than values."""
    case = small_case().to(torch.bfloat16)
    expected = case.run(impl)
    indices = case.indices(impl)
    for name in wide:
        setattr(case, name, getattr(case, name).float())
    with pytest.raises(TypeError, match="must have the dtype of q"):
        case.run(impl)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(case.run(impl), expected, strict=True))
        chosen = memflow_ops.select_blocks(
            case.q,
            memflow_ops.describe_blocks(case.memory_k, 4, 10, impl=impl),
            3,
            query_group=3,
            blocks_per_frame=3,
            impl=impl,
        )
    assert torch.equal(chosen, indices)


@BOTH
def test_attend_selected_and_its_resumed_state_are_cast_too(impl):
    case = small_case().to(torch.bfloat16)
    indices, options = case.indices(impl), dict(block_size=4, frame_tokens=10, query_group=3, impl=impl)
    out, lse = memflow_ops.memory_attention(case.q, case.k, case.v, return_lse=True, impl=impl)
    memory = case.memory_k, case.memory_v
    expected = memflow_ops.attend_selected(case.q, *memory, indices, resume=(out, lse), **options)
    with torch.autocast("cpu", torch.bfloat16):
        got = memflow_ops.attend_selected(case.q.float(), *memory, indices, resume=(out.float(), lse), **options)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))


def test_gradients_reach_inputs_that_were_cast():
    case = small_case().to(torch.bfloat16)
    case.q = case.q.float()
    leaves = case.requires_grad()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(case.run("torch")[0].float().sum(), leaves)
    assert [x.dtype for x in gradients] == [torch.float32, *[torch.bfloat16] * 4]
    assert all(x.isfinite().all() and x.any() for x in gradients)


def test_float64_is_refused_under_autocast_too():
    case = small_case().to(torch.bfloat16)
    case.q = case.q.double()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=r"k must have the dtype of q, .*float64"),
    ):
        case.run("torch")


def test_a_cast_compiles_whole():
    case = small_case().to(torch.bfloat16)
    case.q = case.q.float()

    def run(q):
        with torch.autocast("cpu", torch.bfloat16):
            return memflow_ops.memory_attention(q, case.k, case.v, case.memory_k, case.memory_v, **case.options)

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(case.q), run(case.q))


@BOTH
@pytest.mark.parametrize("cache", [torch.float32, torch.bfloat16], ids=str)
def test_projections_are_cast_to_the_dtype_of_the_cache(impl, cache):
    case = cache_write_cases.make_case(mean_frames=1, options={"block_size": 5}).to(torch.bfloat16).to(cache)
    expected = case.run(impl)
    written = case.outputs()
    q, k = (x.to(torch.float32) for x in (case.q, case.k))
    pools = written.pop("memory_k"), written.pop("memory_v")
    options = dict(frame_tokens=case.frame_tokens, norm=case.norm, impl=impl, **written, **case.options)
    with torch.autocast("cpu", torch.bfloat16):
        got = memflow_ops.write_projections(q, k, case.v.bfloat16(), case.rotation, *pools, case.places, **options)
    assert torch.equal(got, expected["q"])
    for name, x in {"memory_k": pools[0], "memory_v": pools[1], **written}.items():
        assert x is None or torch.equal(x, expected[name]), name


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("released", [False, True])
def test_a_pass_through_a_cache(released, dtype, needs_grad):
    """A cache of any dtype takes what layers under autocast give it."""
    sizes = dict(layers=1, batch=1, frame_tokens=6, kv_heads=2, head_dim=8, window_frames=3, sink_frames=0)
    cache = (
        ReleasedCache(ReleasedLayout(**sizes, dtype=dtype))
        if released
        else FrameCache(CacheLayout(**sizes, dtype=dtype))
    )
    q, k, v = torch.randn(3, 1, 18, 2, 8).bfloat16()
    rotation = rope_rotation(8, torch.arange(3), torch.arange(2), torch.arange(3))
    cache.update_bank([])
    cache.begin_chunk()
    attend = attend_to_memory(cache, rotation, BlockSelection(2), remember=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(0, q.float().requires_grad_(needs_grad), k.float(), v)
    assert out.dtype == dtype
    exact = attend(0, *(x.to(dtype) for x in (q, k, v)))
    torch.testing.assert_close(out, exact, atol=1e-6, rtol=0)
