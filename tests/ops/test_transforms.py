"""Derivatives in forward mode and under `torch.func`: refused or right; other transformations go on working."""

import cache_write_cases
import pytest
import retrieval_cases
import torch
import torch.autograd.forward_ad as forward

import memflow_ops


def inputs() -> list[torch.Tensor]:
    sizes = {"q": (7, 4), "k": (5, 2), "v": (5, 2), "memory_k": (20, 2), "memory_v": (20, 2)}
    return [torch.randn(1, tokens, heads, 8, dtype=torch.float64) for tokens, heads in sizes.values()]


def attention(*tensors, impl="torch"):
    return memflow_ops.memory_attention(*tensors, top_k=2, block_size=4, frame_tokens=10, query_group=3, impl=impl)


def of_one_input(position: int, impl: str):
    """memory_attention as a function of one of its inputs, and that input."""
    tensors = inputs()
    return lambda x: attention(*tensors[:position], x, *tensors[position + 1 :], impl=impl), tensors[position]


def selected(position: int):
    q, _, _, k, v = inputs()
    state = memflow_ops.memory_attention(q, k[:, :3], v[:, :3], return_lse=True)
    tensors = [q, k, v, *state]
    indices = torch.zeros(1, 4, 3, 1, dtype=torch.int32)

    def run(x):
        q, k, v, *resume = [*tensors[:position], x, *tensors[position + 1 :]]
        return memflow_ops.attend_selected(q, k, v, indices, block_size=4, query_group=3, resume=resume)[0]

    return run, tensors[position]


def described():
    return lambda x: memflow_ops.describe_blocks(x, 4, 10), inputs()[3]


def retrieved():
    case = retrieval_cases.make_case(stored=5)
    return lambda x: memflow_ops.retrieve_frames(**{**case, "means": x}, count=2)[1], case["means"]


def written(name: str):
    case = cache_write_cases.make_case()

    def run(x):
        setattr(case, name, x)
        return case.run("torch")["q"]

    return run, getattr(case, name)


REFUSING = {
    **{f"memory_attention-{impl}-{i}": (of_one_input, i, impl) for impl in ("reference", "torch") for i in range(5)},
    **{f"attend_selected-{i}": (selected, i) for i in range(5)},
    "describe_blocks": (described,),
    "retrieve_frames": (retrieved,),
    **{f"write_projections-{name}": (written, name) for name in "qkv"},
}


def dual_tensor(run, x):
    with forward.dual_level():
        run(forward.make_dual(x, torch.ones_like(x)))


def dual_tensor_of_a_leaf(run, x):
    dual_tensor(run, x.clone().requires_grad_())


def jvp(run, x):
    torch.func.jvp(run, (x,), (torch.ones_like(x),))


def jvp_inside_vmap(run, x):
    torch.func.vmap(lambda x: torch.func.jvp(run, (x,), (torch.ones_like(x),))[1])(torch.stack([x, x]))


def vmap_inside_jvp(run, x):
    torch.func.jvp(torch.func.vmap(run), (torch.stack([x, x]),), (torch.ones(2, *x.shape, dtype=x.dtype),))


def jvp_of_a_gradient(run, x):
    torch.func.jvp(torch.func.grad(lambda x: run(x).sum()), (x,), (torch.ones_like(x),))


WAYS = (dual_tensor, dual_tensor_of_a_leaf, jvp, jvp_inside_vmap, vmap_inside_jvp, jvp_of_a_gradient)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSING)
def test_a_tangent_is_refused(name, way):
    make, *arguments = REFUSING[name]
    with pytest.raises(NotImplementedError, match=f"{name.split('-')[0]} has no forward-mode derivative"):
        way(*make(*arguments))


def test_inputs_without_a_tangent_are_accepted():
    """The derivative with respect to something else, such as a factor of the output, is right."""
    tensors = inputs()
    out = attention(*tensors)
    got = torch.func.jvp(lambda factor: factor * attention(*tensors), (torch.ones(()),), (torch.ones(()),))
    assert torch.equal(got[0], out) and torch.equal(got[1], out)


def test_a_selection_has_no_tangent():
    q, _, _, descriptors, _ = inputs()
    run = lambda q: memflow_ops.select_blocks(q, descriptors, 2, query_group=3)  # noqa: E731
    with forward.dual_level():
        got = run(forward.make_dual(q, torch.ones_like(q)))
    assert torch.equal(got, run(q))


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_frame_relevance_has_the_right_tangent(score):
    text, frames = torch.randn(1, 3, 2, 4).double(), torch.randn(1, 5, 2, 2, 4).double()
    run = lambda text, frames: memflow_ops.frame_relevance(text, frames, score=score)  # noqa: E731
    assert torch.autograd.gradcheck(run, (text.requires_grad_(), frames.requires_grad_()), check_forward_ad=True)


def test_merge_states_has_the_right_tangent():
    states = [torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3), torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3)]
    leaves = [x.double().requires_grad_() for x in states]
    assert torch.autograd.gradcheck(memflow_ops.merge_states, leaves, check_forward_ad=True)


def test_vmap_goes_on_working():
    q, *others = inputs()
    many = torch.stack([q, 2 * q])
    got = torch.func.vmap(lambda q: attention(q, *others))(many)
    torch.testing.assert_close(got, torch.stack([attention(q, *others) for q in many]))


def test_reverse_mode_goes_on_working_at_a_dual_level():
    q, *others = inputs()
    leaf = q.requires_grad_()
    (expected,) = torch.autograd.grad(attention(leaf, *others).sin().sum(), leaf)
    with forward.dual_level():
        (got,) = torch.autograd.grad(attention(leaf, *others).sin().sum(), leaf)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "grad of vmap", "vmap of grad"])
@pytest.mark.parametrize("case", [*REFUSING.values()], ids=REFUSING)
def test_gradients_under_torch_func_are_refused_with_a_sentence(case, transform):
    make, *arguments = case
    run, x = make(*arguments)
    total = lambda x: run(x).sum()  # noqa: E731
    asked = {
        "grad": lambda: torch.func.grad(total)(x),
        "vjp": lambda: torch.func.vjp(run, x),
        "jacrev": lambda: torch.func.jacrev(run)(x),
        "grad of vmap": lambda: torch.func.grad(lambda x: torch.func.vmap(total)(x).sum())(x[None]),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(total))(x[None]),
    }[transform]
    with pytest.raises(NotImplementedError, match=r"has no gradient under torch\.func .* use backward"):
        asked()


def test_under_torch_func_what_needs_no_gradient_runs():
    q, k, v, *_ = inputs()
    right = memflow_ops.memory_attention(q, k, v)
    detached = lambda x: (memflow_ops.memory_attention(x.detach(), k, v) * x).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(detached)(q), right)
    weight = torch.func.grad(lambda w: (memflow_ops.memory_attention(q, k, v) * w).sum())(torch.ones_like(q))
    torch.testing.assert_close(weight, right)
