"""By what a run knows the weights that it was begun with."""

import json

import pytest
import torch
from safetensors.torch import save_file

from memflow_ops.model.checkpoints.fingerprint import SAMPLED_IN_FILES, fingerprint, fingerprint_of_files

ALL = ("",)


def weights():
    generator = torch.Generator().manual_seed(0)
    sizes = {"encoder.norm": (5,), "decoder.in": (40, 9), "decoder.norm": (1,), "decoder.out": (9, 40)}
    return {name: torch.randn(size, generator=generator).bfloat16() for name, size in sizes.items()}


def save(folder, kind, content):
    """Weights in one of the forms that they come in; returns what is to be named."""
    folder.mkdir()
    if kind == "file":
        save_file(content, folder / "model.safetensors")
        return folder / "model.safetensors"
    if kind == "pt":
        torch.save(content, folder / "model.pth")
        return folder / "model.pth"
    names = sorted(content)
    shards = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    for file, of in shards.items():
        save_file({name: content[name] for name in of}, folder / file)
    listed = {name: file for file, of in shards.items() for name in of}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


@pytest.mark.parametrize("kind", ["file", "pt", "shards"])
def test_files_are_known_by_every_weight_that_is_used_and_by_no_other(tmp_path, kind):
    own = weights()
    path = save(tmp_path / "same", kind, own)
    expected = fingerprint(own.items(), SAMPLED_IN_FILES)
    assert fingerprint_of_files(path, ("model",), ALL) == expected
    assert fingerprint(reversed(own.items()), SAMPLED_IN_FILES) == expected
    marks = {fingerprint_of_files(path, ("model",), ("decoder.",))}
    for name in own:
        changed = {**own, name: own[name] + 1}
        marks.add(fingerprint_of_files(save(tmp_path / name, kind, changed), ("model",), ("decoder.",)))
    assert len(marks) == 4  # as it is, which another weight of the encoder does not change, and each of the decoder's


def test_a_name_a_shape_and_a_dtype_count():
    x = torch.zeros(4, 4)
    others = ({"a": x}, {"b": x}, {"a": x.flatten()}, {"a": x.half()})
    assert len({fingerprint(other.items()) for other in others}) == 4
