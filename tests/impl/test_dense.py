"""Dense backends for the local window: every implementation continues them; one that cannot attend is refused."""

import sys
from types import SimpleNamespace

import pytest
import torch

import memflow_ops
from memflow_ops.geometry import Geometry
from memflow_ops.impl import dense, why_not_import
from memflow_ops.impl.reference import attention

OPTIONS = dict(top_k=2, block_size=4, frame_tokens=10, query_group=3, return_lse=True)


def inputs(dtype=torch.float64, heads=(4, 2)):
    make = lambda tokens, count: torch.randn(2, tokens, count, 8, dtype=dtype)  # noqa: E731
    return make(7, heads[0]), make(5, heads[1]), make(5, heads[1]), make(20, heads[1]), make(20, heads[1])


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_continued_by_any_implementation(impl, heads):
    tensors = [x.requires_grad_() for x in inputs(heads=heads)]
    states, gradients = [], []
    for backend in ("own", "cpu", "auto"):
        out, lse = memflow_ops.memory_attention(*tensors, impl=impl, dense_backend=backend, **OPTIONS)
        states.append((out, lse))
        gradients.append(torch.autograd.grad((out * out).sum() + lse.sum(), tensors))
    for other in (1, 2):
        torch.testing.assert_close(states[other], states[0])
        torch.testing.assert_close(gradients[other], gradients[0])
    window = [
        memflow_ops.memory_attention(*tensors[:3], dense_backend=name, return_lse=True) for name in ("own", "cpu")
    ]
    torch.testing.assert_close(window[1], window[0])


def test_any_strides():
    q, k, v, _, _ = inputs()
    wide = torch.randn(2, 7, 4, 3, 8, dtype=torch.float64)[:, :, :, 1].copy_(q)
    far = torch.randn(2, 2, 5, 9, dtype=torch.float64).transpose(1, 2)[..., :8].copy_(k)
    got = memflow_ops.memory_attention(wide, far, v, dense_backend="cpu")
    assert got.is_contiguous()
    torch.testing.assert_close(got, memflow_ops.memory_attention(q, k, v, impl="reference"))


def test_what_auto_stands_for_on_a_cpu():
    q, k, v, *_ = inputs(torch.float32)
    assert dense.resolve("auto", "triton", q, k, v) == "cpu"
    assert dense.resolve("auto", "torch", q, k, v) == "own"
    assert dense.resolve("cpu", "torch", q, k[:, :0], v[:, :0]) == "own"


def test_refused_where_it_cannot_be_used():
    tensors = inputs(torch.bfloat16)
    with pytest.raises(ValueError, match="dense_backend must be one of auto, own, cudnn, flash, flash_attn, cpu, got"):
        memflow_ops.memory_attention(*tensors, dense_backend="fastest", **OPTIONS)
    for name in ("cudnn", "flash", "flash_attn"):
        with pytest.raises(ValueError, match=f"dense_backend='{name}' cannot attend here: it needs a CUDA device"):
            memflow_ops.memory_attention(*tensors, dense_backend=name, **OPTIONS)


@pytest.mark.parametrize("form", ["a last dimension of 1", "longer"])
def test_whatever_form_the_lse_has(form, monkeypatch):
    q, k, v, *_ = inputs(torch.float32)
    expected = dense.attend("cpu", q, k, v, 0.3)
    original = dense._BACKENDS["cpu"]

    def other_form(*arguments):
        out, lse = original(*arguments)
        return out, lse[..., None] if form != "longer" else torch.nn.functional.pad(lse, (0, 50), value=torch.nan)

    monkeypatch.setitem(dense._BACKENDS, "cpu", other_form)
    got = dense.attend("cpu", q, k, v, 0.3)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert got[1].shape == (2, 4, 7)


def test_what_can_be_read_16_bytes_at_a_time():
    x = torch.zeros(2, 3, 2, 8, dtype=torch.bfloat16)
    assert dense.is_aligned(x) and dense.is_aligned(x[1:, 1:, 1:])
    assert not dense.is_aligned(torch.zeros(97, dtype=torch.bfloat16)[1:].view(2, 3, 2, 8))
    assert not dense.is_aligned(torch.zeros(2, 3, 2, 12, dtype=torch.bfloat16)[..., :8])
    assert dense.is_aligned(torch.zeros(1, 3, 1, 8, dtype=torch.bfloat16).as_strided((1, 3, 1, 8), (3, 8, 5, 1)))


@pytest.fixture
def imported_anew():
    """What can be imported is looked up once per process; in such a test it is looked up again."""
    why_not_import.cache_clear()
    yield
    why_not_import.cache_clear()


@pytest.mark.usefixtures("imported_anew")
def test_flash_attn_is_called_by_its_own_convention(monkeypatch):
    """Stand-ins with the layout and the arguments of flash-attn 2 and 4; 3 is called like 2."""
    q, k, v, *_ = inputs(torch.float32)
    expected = memflow_ops.memory_attention(q, k, v, impl="reference", return_lse=True, softmax_scale=0.3)
    seen = []

    def version_2(q, k, v, dropout_p=0.0, softmax_scale=None, return_attn_probs=False):
        seen.append((q.shape, return_attn_probs))
        geometry = Geometry(block_size=1, frame_tokens=1, query_group=q.shape[1], softmax_scale=softmax_scale)
        state = attention.attend(q, k, v, None, None, torch.empty(*q.shape[0:3:2], 1, 0, dtype=torch.int32), geometry)
        return (*state, None) if return_attn_probs else state[0]

    def version_4(q, k, v, softmax_scale=None, return_lse=False):
        return version_2(q, k, v, softmax_scale=softmax_scale, return_attn_probs=return_lse)[:2]

    def without_lse(q, k, v, softmax_scale=None):
        return version_2(q, k, v, softmax_scale=softmax_scale)

    for function in (version_2, version_4):
        monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=function))
        assert dense.flash_attn_module() == "flash_attn_interface"
        torch.testing.assert_close(dense.attend("flash_attn", q, k, v, 0.3), expected, atol=1e-5, rtol=1e-5)
    assert seen == [((2, 14, 2, 8), True)] * 2, "heads that share keys are folded into queries"
    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=without_lse))
    with pytest.raises(RuntimeError, match="returned no LSE"):
        dense.attend("flash_attn", q, k, v, 0.3)


BROKEN = {
    "ImportError: undefined symbol: _ZN3c10": 'raise ImportError("undefined symbol: _ZN3c10")',
    "OSError: libcudart.so.12: cannot open": 'raise OSError("libcudart.so.12: cannot open\\nmore about it")',
    "RuntimeError: wrong device": 'raise RuntimeError("wrong device")',
    "AssertionError: without a message": "assert False",
    "No module named 'nvidia_cutlass'": "import nvidia_cutlass",
}


@pytest.mark.usefixtures("imported_anew")
@pytest.mark.parametrize("said", BROKEN)
def test_a_package_whose_import_fails_is_one_that_cannot_be_used(said, tmp_path, monkeypatch):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(BROKEN[said])
    monkeypatch.syspath_prepend(tmp_path)
    assert dense.flash_attn_module() == ""
    assert dense.why_no_flash_attn() == f"the import of flash_attn.cute fails: {said}"
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 9, 2, 64))
    assert said in dense.why_not("flash_attn", query, query, query)


@pytest.mark.usefixtures("imported_anew")
def test_a_broken_version_leaves_an_older_one_that_works(tmp_path, monkeypatch):
    package = tmp_path / "flash_attn"
    (package / "cute").mkdir(parents=True)
    (package / "__init__.py").write_text("def flash_attn_func(): ...")
    (package / "cute" / "__init__.py").write_text("raise RuntimeError('for Hopper only')")
    monkeypatch.syspath_prepend(tmp_path)
    assert dense.flash_attn_module() == "flash_attn" and dense.why_no_flash_attn() == ""
    for name in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(name, None)
