"""Settings that torch holds for the whole process: no operator changes one, fails under one, or gives other results."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import cache_write_cases
import pytest
import retrieval_cases
import torch
from attention_cases import small_case
from torch.utils._pytree import tree_leaves

import memflow_ops

ROOT = Path(__file__).parents[2]
INTERPRETED = pytest.param(
    "triton", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here")
)
# Each is given alone in a process of its own, because torch refuses to answer when the two forms have been mixed.
PRECISIONS = {
    "old-form": "torch.set_float32_matmul_precision('medium')",
    "everything": "torch.backends.fp32_precision = 'tf32'",
    "mixed": "torch.set_float32_matmul_precision('high'); torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
}


@pytest.mark.parametrize("setting", PRECISIONS)
def test_the_precision_of_float32_products_stays_as_it_is(setting):
    program = f"""
        import torch, memflow_ops
        def state():
            b = torch.backends
            return b.fp32_precision, b.cuda.matmul.fp32_precision, b.mkldnn.matmul.fp32_precision
        q, bank = torch.randn(1, 64, 2, 32), torch.randn(1, 128, 2, 32)
        sizes = dict(top_k=2, block_size=16, frame_tokens=32, query_group=16)
        run = lambda: memflow_ops.memory_attention(q, q, q, bank, bank, **sizes)
        chosen = lambda: memflow_ops.select_blocks(q, bank[:, :32], 9, query_group=1)
        expected, blocks = run(), chosen()
        {PRECISIONS[setting]}
        before = state()
        got = run()
        assert torch.equal(blocks, chosen())
        torch.testing.assert_close(got, expected, atol=0.1, rtol=0.1)  # Attention itself has the precision asked for.
        assert state() == before, (before, state())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_no_setting_is_touched_even_for_a_moment(impl, monkeypatch):
    """Another thread would see it, and would compute in it."""
    for name in ("_set_float32_matmul_precision", "_set_fp32_precision_setter", "_set_cublas_allow_tf32"):
        monkeypatch.setattr(torch._C, name, lambda *_: pytest.fail("an operator changes the precision of products"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: pytest.fail("an operator changes it"))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: pytest.fail("an operator changes the number of threads"))
    run_all(impl)


def test_scores_are_exact_to_float32():
    """Blocks whose scores differ by less than a product in a lower precision can tell are told apart."""
    q = torch.tensor([1.0, 1.0]).view(1, 1, 1, 2)
    steps = 1 + torch.arange(8) * 2.0**-22
    descriptors = torch.stack([steps.flip(0), torch.zeros(8)], -1).view(1, 8, 1, 2)
    for impl in ("reference", "torch"):
        for count in (1, 3, 7):
            got = memflow_ops.select_blocks(q, descriptors, count, impl=impl)
            assert got.flatten().tolist() == list(range(count))


def run_all(impl: str) -> list[torch.Tensor]:
    """What every operator gives, and its gradients, from inputs that are made under torch's own defaults."""
    case = small_case(memory_slots=torch.tensor([[1, 0], [0, 1]], dtype=torch.int32),
                      memory_frames=torch.tensor([1, 2], dtype=torch.int32)).to(torch.float32)  # fmt: skip
    written = cache_write_cases.make_case(mean_frames=1, options={"block_size": 5}).to(torch.float32)
    scores = {"linear": 0.5, "softmax": None, "coverage": None}
    retrieved = retrieval_cases.rounded(retrieval_cases.make_case(parts=2, candidates=4), torch.float32)
    with DEFAULTS():
        leaves = case.requires_grad()
        out, lse = case.run(impl)
        indices = case.indices(impl)
        described = memflow_ops.describe_blocks(case.memory_k, 4, 10, impl=impl)
        resumed = memflow_ops.attend_selected(
            case.q, case.memory_k, case.memory_v, indices, block_size=4, frame_tokens=10, query_group=3,
            resume=(out, lse), impl=impl,
        )  # fmt: skip
        merged = memflow_ops.merge_states(*resumed, out, lse)
        loss = sum(x.sum() for x in (*merged, described))
        results = [out, lse, indices, described, *merged, *torch.autograd.grad(loss, leaves), written.run(impl)]
        for score, redundancy in scores.items():
            options = dict(count=3, score=score, redundancy=redundancy, impl=impl)
            results.append(memflow_ops.retrieve_frames(**retrieved, **options))
            if score != "coverage":
                results.append(memflow_ops.frame_relevance(case.q, case.memory_k.unflatten(1, (2, 10)), score=score))
    return [x.detach() for x in tree_leaves(results)]


class DEFAULTS:
    """A context for the defaults of torch for new tensors; without them it changes nothing."""

    dtype, device = torch.float32, None

    def __enter__(self):
        torch.set_default_dtype(self.dtype)
        torch.set_default_device(self.device)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("defaults", [(torch.float64, "meta"), (torch.bfloat16, None)], ids=str)
@pytest.mark.parametrize("impl", ["reference", "torch", INTERPRETED])
def test_defaults_for_new_tensors_change_nothing(impl, defaults, monkeypatch):
    if impl == "triton" and defaults[1] is None:
        pytest.skip("the interpreter is slow, and one of the defaults shows what both do")
    torch.manual_seed(0)
    expected = run_all(impl)
    monkeypatch.setattr(DEFAULTS, "dtype", defaults[0])
    monkeypatch.setattr(DEFAULTS, "device", defaults[1])
    torch.manual_seed(0)
    got = run_all(impl)
    assert len(got) == len(expected) > 20
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.device == theirs.device
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


# The functions of torch whose result has the default dtype or lies on the default device unless told otherwise.
FACTORIES = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
             "randint", "randn", "randperm", "scalar_tensor", "tensor", "zeros"}  # fmt: skip


def unstated(source: str) -> list[str]:
    """Calls of factories that leave dtype or device to torch's defaults, as source text."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in FACTORIES]
    of_torch = [call for call in named if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"]
    return [
        ast.unparse(call) for call in of_torch if not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}
    ]


def test_every_new_tensor_says_its_dtype_and_device():
    folders = ("memflow_ops/ops", "memflow_ops/impl", "memflow_ops/cache", "memflow_ops/integrations", "kernels")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 40
    found = {str(path.relative_to(ROOT)): unstated(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: calls for name, calls in found.items() if calls}
    assert unstated("torch.zeros(3, dtype=x.dtype)") and unstated("torch.arange(3, device=x.device)")
