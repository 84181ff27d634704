"""An int8 bank: what it stands for, what is computed with it, and what is refused."""

import pytest
import torch
from attention_cases import Case, assert_within_tolerance, cases, dense_attention, small_case
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_cases import in_float64, int8_case, numbers

import memflow_ops
from memflow_ops.bench.inputs import correlated_tokens
from memflow_ops.ops import registration

LOW = [torch.float32, torch.bfloat16, torch.float16]
BOTH = pytest.mark.parametrize("impl", ["reference", "torch"])
SCORES = st.sampled_from(["mean", "moments"])


@given(cases(), st.sampled_from([torch.float64, *LOW]), SCORES)
@settings(max_examples=150)
def test_what_is_stored_is_within_half_a_step(case, dtype, score):
    if case.memory_k is None:
        return
    case = case.to(dtype)
    size, frame = case.options["block_size"], case.options["frame_tokens"]
    descriptors = memflow_ops.describe_blocks(case.memory_k, size, frame, moments=1 if score == "mean" else 2)
    made = memflow_ops.quantise_memory(case.memory_k, case.memory_v, descriptors, block_size=size, frame_tokens=frame)
    assert made.memory_k.dtype == made.memory_v.dtype == torch.int8
    assert made.memory_k_scale.dtype == made.memory_v_scale.dtype == dtype
    assert not (made.memory_k == -128).any() and not (made.memory_v == -128).any()
    k, v = numbers(made, descriptors, size, frame)
    per_frame = -(-frame // size)
    token = torch.arange(k.shape[1])
    block = token // frame * per_frame + token % frame // size
    # A scale is rounded to the dtype, so the largest of its numbers may lie a little beyond 127 steps.
    step = 0.5 + 127 * torch.finfo(dtype).eps
    assert ((k - case.memory_k.double()).abs() <= step * made.memory_k_scale.double()[:, block] + 1e-12).all()
    assert ((v - case.memory_v.double()).abs() <= step * made.memory_v_scale.double().unsqueeze(-1) + 1e-12).all()


@given(cases(), SCORES)
@settings(max_examples=100)
def test_reference_is_attention_to_the_numbers_that_are_stored(case, score):
    if case.memory_k is None or not case.memory_k.shape[1]:
        return
    int8, exact = int8_case(case, score)
    for ours, theirs in zip(int8.run("reference"), exact.run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@given(cases(), st.sampled_from(LOW), SCORES)
@settings(max_examples=150)
def test_torch_is_as_exact_as_dense_attention(case, dtype, score):
    if case.memory_k is None or not case.memory_k.shape[1]:
        return
    int8, rounded = int8_case(case.to(dtype), score)
    indices = selection(int8)
    out, lse = int8.run("torch")
    exact, exact_lse = in_float64(int8).run("reference")
    if torch.equal(selection(in_float64(int8), "reference"), indices):
        assert_within_tolerance(out, dense_attention(rounded, indices)[0], exact, repr(int8))
        assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)


def selection(case: Case, impl: str = "torch"):
    options = case.options
    names = ("top_k", "query_group", "memory_frames", "memory_slots", "score", "block_size", "frame_tokens")
    chosen = {name: options[name] for name in names}
    chosen["block_size"] = min(chosen["block_size"], chosen["frame_tokens"])
    return memflow_ops.select_blocks(case.q, options["memory_descriptors"], impl=impl, **chosen)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_the_selection_is_that_of_the_exact_bank_to_the_bit(impl, dtype):
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, n, 2, 16).to(dtype) for n in (40, 9, 9))
    keys, values = torch.randn(2, 2, 90, 2, 16).to(dtype)
    case = Case(q, k, v, keys, values, dict(top_k=4, block_size=8, frame_tokens=30, query_group=5))
    chosen = []
    for bank in (int8_case(case)[0], case):
        options = bank.options
        geometry = (4, 8, 30, 5, 0.25, False, "mean")
        names = ("memory_descriptors", "memory_k_scale", "memory_v_scale")
        scales = [options.get(name) for name in names]
        tensors = (*bank.tensors().values(), None, *scales, None, None, None, None)
        chosen.append(registration.memory_attention(*tensors, *geometry, impl, "own")[2])
    assert torch.equal(*chosen) and (chosen[0] >= 0).all()


@BOTH
def test_what_is_not_selected_is_not_read(impl):
    torch.manual_seed(2)
    case = small_case()
    int8, _ = int8_case(case)
    clean = int8.run(impl)
    size, frame = case.options["block_size"], case.options["frame_tokens"]
    per_frame = -(-frame // size)
    seen = torch.zeros(int8.memory_k.shape[:3], dtype=torch.bool)
    chosen = selection(int8)
    slots = case.options["memory_slots"]
    heads = case.q.shape[2] // case.k.shape[2]
    for b, h, g, e in chosen.ge(0).nonzero().tolist():
        index = int(chosen[b, h, g, e])
        frame_number = index // per_frame if slots is None else int(slots[b, index // per_frame])
        first = frame_number * frame + index % per_frame * size
        seen[b, first : min(first + size, (frame_number + 1) * frame), h // heads] = True
    token = torch.arange(seen.shape[1])
    block = token // frame * per_frame + token % frame // size
    of_blocks = torch.zeros(int8.options["memory_k_scale"].shape[:3], dtype=torch.bool)
    of_blocks[:, block] |= seen
    assert not of_blocks.all(), "the test needs a block that nobody has chosen"
    int8.options["memory_k_scale"] = int8.options["memory_k_scale"].masked_fill(~of_blocks[..., None], torch.nan)
    int8.options["memory_v_scale"] = int8.options["memory_v_scale"].masked_fill(~seen, torch.nan)
    for ours, theirs in zip(int8.run(impl), clean, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("outliers", "size"), [(0, 1), (4, 6), (4, 20)])
def test_the_output_is_off_by_less_than_a_percent(outliers, size):
    """Keys as smooth as a video's, some of whose channels are many times as large as the others."""
    tokens = lambda count, seed: correlated_tokens(1, count, 2, 128, torch.float32, seed)  # noqa: E731
    q, keys, values = tokens(128, 1), tokens(1560, 2), tokens(1560, 3)
    keys[..., torch.randperm(128)[:outliers]] *= size
    options = dict(top_k=12, block_size=64, frame_tokens=1560, query_group=128)
    int8, _ = int8_case(Case(q, q[:, :0], q[:, :0], keys, values, options))
    out, want = int8.run("torch")[0], Case(q, q[:, :0], q[:, :0], keys, values, options).run("torch")[0]
    error = float((out - want).norm() / want.norm())
    assert 1e-5 < error < 0.01, error


@BOTH
def test_what_is_not_finite_is_not_hidden(impl):
    torch.manual_seed(3)
    q, keys, values = (torch.randn(1, n, 1, 8) for n in (4, 12, 12))
    for broken in (0, 1):
        for bad in (torch.nan, torch.inf):
            bank = [keys.clone(), values.clone()]
            bank[broken][0, 5, 0, 3] = bad
            descriptors = memflow_ops.describe_blocks(bank[0], 4, 12)
            made = memflow_ops.quantise_memory(*bank, descriptors, block_size=4, frame_tokens=12)
            out, _ = memflow_ops.attend_selected(
                q, *made[:2], torch.tensor([[[[0, 1]]]], dtype=torch.int32), block_size=4, frame_tokens=12,
                query_group=None, memory_descriptors=descriptors, memory_k_scale=made[2], memory_v_scale=made[3],
                impl=impl,
            )  # fmt: skip
            assert out.isnan().any()
            spared, _ = memflow_ops.attend_selected(
                q, *made[:2], torch.tensor([[[[0, 2]]]], dtype=torch.int32), block_size=4, frame_tokens=12,
                query_group=None, memory_descriptors=descriptors, memory_k_scale=made[2], memory_v_scale=made[3],
                impl=impl,
            )  # fmt: skip
            assert spared.isfinite().all()


def test_equal_keys_and_zeros_are_exact():
    keys, values = torch.full((1, 8, 1, 4), 3.25), torch.zeros(1, 8, 1, 4)
    descriptors = memflow_ops.describe_blocks(keys, 4, 8)
    made = memflow_ops.quantise_memory(keys, values, descriptors, block_size=4, frame_tokens=8)
    k, v = numbers(made, descriptors, 4, 8)
    assert torch.equal(k, keys.double()) and torch.equal(v, values.double())


BANK = dict(frame_tokens=6, block_size=4)


def valid(**changes):
    """Arguments of memory_attention with an int8 bank that work; `changes` breaks them."""
    make = lambda tokens, heads=2: torch.randn(2, tokens, heads, 8)  # noqa: E731
    keys, values = make(12), make(12)
    descriptors = memflow_ops.describe_blocks(keys, 4, 6)
    made = memflow_ops.quantise_memory(keys, values, descriptors, **BANK)
    good = dict(q=make(6, 4), k=make(5), v=make(5), memory_descriptors=descriptors, **made._asdict(), **BANK)
    return {**good, **changes}


X = torch.randn
BAD = {
    "values not int8": (dict(memory_v=X(2, 12, 2, 8)), TypeError, "memory_v must be int8 like the rest of the bank"),
    "keys not int8": (dict(memory_k=X(2, 12, 2, 8)), TypeError, "memory_k must be int8 like the rest of the bank"),
    "no scale": (dict(memory_k_scale=None), ValueError, "an int8 bank is read with memory_k_scale too"),
    "no descriptors": (
        dict(memory_descriptors=None, memory_v_scale=None), ValueError, "with memory_descriptors, memory_v_scale too",
    ),
    "exact": (dict(memory_k=X(2, 12, 2, 8), memory_v=X(2, 12, 2, 8)), ValueError, "memory_k_scale is given, but .*32"),
    "scale's dtype": (dict(memory_k_scale=X(2, 4, 2, 8).half()), TypeError, "memory_k_scale must have the dtype of q"),
    "scale's shape": (dict(memory_k_scale=X(2, 12, 2, 8)), ValueError, r"_k_scale must have shape \(2, 4, 2, 8\)"),
    "value scale's shape": (dict(memory_v_scale=X(2, 12, 2, 1)), ValueError, r"_v_scale must have shape \(2, 12, 2\)"),
    "value scale's dtype": (dict(memory_v_scale=X(2, 12, 2).half()), TypeError, "memory_v_scale must have the dtype"),
    "no tensor": (dict(memory_v_scale=3.0), TypeError, r"memory_v_scale must be a tensor \(B, Lm, Hkv\), got float"),
    "sparse": (dict(memory_v_scale=X(2, 12, 2).to_sparse()), TypeError, "memory_v_scale must be a dense tensor"),
    "another device": (dict(memory_v_scale=X(2, 12, 2, device="meta")), ValueError, "memory_v_scale must be on the de"),
    "no bank": (dict(memory_k=None, memory_v=None, memory_descriptors=None), ValueError, "_k_scale is given without"),
    "unsigned": (dict(memory_k=torch.zeros(2, 12, 2, 8).byte()), TypeError, "memory_k must be int8 .* torch.uint8"),
    "window": (dict(k=torch.zeros(2, 5, 2, 8).char()), TypeError, "k must be float16.*int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_before_anything_runs(name, monkeypatch):
    changes, error, message = BAD[name]
    monkeypatch.setattr("memflow_ops.ops.registration.memory_attention", lambda *_: pytest.fail("the op ran"))
    with pytest.raises(error, match=message):
        memflow_ops.memory_attention(**valid(**changes))


def test_what_is_valid_is_accepted():
    assert memflow_ops.memory_attention(**valid()).shape == (2, 6, 4, 8)
    wide = valid(score="moments")
    wide["memory_descriptors"] = torch.cat([wide["memory_descriptors"], X(2, 4, 2, 8).abs()], -1)
    assert memflow_ops.memory_attention(**wide).shape == (2, 6, 4, 8)
    empty = dict(memory_k=torch.zeros(2, 0, 2, 8).char(), memory_v=torch.zeros(2, 0, 2, 8).char())
    empty |= dict(memory_descriptors=X(2, 0, 2, 8), memory_k_scale=X(2, 0, 2, 8), memory_v_scale=X(2, 0, 2))
    given = valid(**empty)
    assert torch.equal(memflow_ops.memory_attention(**given), memflow_ops.memory_attention(*(given[n] for n in "qkv")))


@pytest.mark.parametrize("name", ["q", "k", "v", "memory_descriptors", "memory_k_scale", "memory_v_scale"])
def test_gradients_are_refused_in_a_sentence(name, monkeypatch):
    given = valid()
    given[name].requires_grad_()
    with torch.no_grad():
        want = memflow_ops.memory_attention(**given)
    with monkeypatch.context() as patch, pytest.raises(NotImplementedError, match="int8 bank has no backward: call it"):
        patch.setattr("memflow_ops.ops.registration.memory_attention", lambda *_: pytest.fail("the op ran"))
        memflow_ops.memory_attention(**given)
    assert want.shape == (2, 6, 4, 8)
    if name == "q":
        indices = torch.zeros(2, 4, 1, 1, dtype=torch.int32)
        names = ("memory_descriptors", "memory_k_scale", "memory_v_scale")
        with pytest.raises(NotImplementedError, match="int8 bank has no backward"):
            memflow_ops.attend_selected(
                given["q"], given["memory_k"], given["memory_v"], indices, query_group=None, **BANK,
                **{name: given[name] for name in names},
            )  # fmt: skip


@BOTH
def test_autocast_leaves_the_integers_alone(impl):
    given = valid(impl=impl)
    floats = ("q", "k", "v", "memory_descriptors", "memory_k_scale", "memory_v_scale")
    low = given | {name: given[name].bfloat16() for name in floats}
    want = memflow_ops.memory_attention(**low)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(memflow_ops.memory_attention(**low), want), "inputs of one dtype are computed in it"
        assert torch.equal(memflow_ops.memory_attention(**low | {"q": low["q"].float()}), want)
        assert memflow_ops.memory_attention(**given).dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(v=X(1, 12, 1, 4)), "v must have shape"),
        (dict(frame_tokens=5), "k must hold whole frames of 5"),
        (dict(descriptors=X(1, 4, 1, 8)), r"descriptors must have shape \(1, 3, 1, 8\)"),
        (dict(block_size=0), "block_size must be at least 1"),
    ],
)
def test_quantise_memory_refuses(changes, message):
    given = dict(k=X(1, 12, 1, 8), v=X(1, 12, 1, 8), descriptors=X(1, 3, 1, 8), block_size=4, frame_tokens=12)
    with pytest.raises(ValueError, match=message):
        memflow_ops.quantise_memory(**given | changes)
    assert memflow_ops.quantise_memory(**given).memory_k.shape == (1, 12, 1, 8)


def test_an_int8_bank_compiles_whole():
    given = valid()
    names = [name for name, x in given.items() if torch.is_tensor(x)]
    run = lambda *x: memflow_ops.memory_attention(**given | dict(zip(names, x, strict=True)))  # noqa: E731
    inputs = [given[name] for name in names]
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs))
