"""What the user sets for all of torch, the default dtype and the default device, changes no stream."""

import ast
from pathlib import Path

import pytest
import torch
from test_resume import encode, make, model, modes, prompts_of

ROOT = Path(__file__).parents[3]
FACTORIES = {"arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm"}
FACTORIES |= {"scalar_tensor", "tensor", "zeros"}

__all__ = ["model"]


def unstated(path: Path):
    """The calls of a file that make a tensor without saying its dtype or device, each as its line and what is missing.

    Weights are excepted: the layers of a network follow the defaults, as all layers of torch do.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    weights = {id(part) for call in calls if call.func.attr == "Parameter" for part in ast.walk(call)}
    for call in calls:
        stated = {keyword.arg for keyword in call.keywords}
        if ast.unparse(call.func.value) != "torch" or call.func.attr not in FACTORIES or id(call) in weights:
            continue
        if not {"dtype", "device"} <= stated:
            yield f"{path.relative_to(ROOT)}:{call.lineno}: torch.{call.func.attr} has {', '.join(stated) or 'neither'}"


def test_every_tensor_that_is_made_has_its_dtype_and_device_stated():
    files = [*(ROOT / "model").rglob("*.py"), *(ROOT / "memflow_ops" / "cache").rglob("*.py")]
    assert len(files) > 50
    assert not [found for path in files for found in unstated(path)]


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def defaults(request):
    """Sets what the user might set; a tensor on the meta device has no numbers, so none gets there unnoticed."""

    def put():
        if request.param == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, request.param))

    yield put
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@modes
def test_the_frames_do_not_depend_on_the_defaults(model, changes, defaults, monkeypatch):
    known = {prompt: encode([prompt])[0] for chunk in range(8) for prompt in prompts_of(chunk)}
    monkeypatch.setattr("test_resume.encode", lambda prompts: torch.stack([known[prompt] for prompt in prompts]))
    expected = [make(model, changes)]
    expected = [expected[0].next_chunk(prompts_of(chunk)).frames for chunk in range(7)]
    defaults()
    streamer = make(model, changes)
    for chunk, want in enumerate(expected):
        assert torch.equal(streamer.next_chunk(prompts_of(chunk)).frames, want)
