"""Files of weights: what they are by their content, which of several counts, and that what was read is one's own."""

import json
import os

import pytest
import torch
from command_line import memflow
from safetensors.torch import load_file, save_file

from memflow_ops.model.checkpoints.containers import count_numbers, read_safetensors, read_weights
from memflow_ops.model.checkpoints.native import load_checkpoint, save_checkpoint
from memflow_ops.model.checkpoints.pretrained import convert, load_pretrained, read_pretrained, tuned_for
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

CONFIG = ModelConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=6, freq_dim=16
)
SAID = {"num_heads": 2, "text_len": 6}


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return {name: torch.randn_like(tensor) for name, tensor in CausalVideoModel(CONFIG).state_dict().items()}


def same(read, expected):
    assert read.keys() == expected.keys()
    return all(torch.equal(tensor, expected[name]) for name, tensor in read.items())


# ---------------------------------------------------------------------------------------------------- memory of its own

LOADERS = {
    "read_pretrained": lambda path: read_pretrained(path).weights,
    "load_pretrained": lambda path: load_pretrained(path).state_dict(),
    "load_checkpoint": lambda path: load_checkpoint(path).state_dict(),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS.keys())
def test_a_safetensors_file_that_is_overwritten_and_cut_changes_nothing(tmp_path, weights, load):
    path = tmp_path / "w.safetensors"
    save_checkpoint(path, weights, CONFIG)
    loaded = load(path)
    with open(path, "r+b") as file:  # in place: a mapping of the file would see it
        file.write(bytes(path.stat().st_size))
    assert same(loaded, weights)
    os.truncate(path, 0)
    assert same(loaded, weights)


def test_what_was_read_of_a_pt_is_not_mapped_either(tmp_path, weights):
    path = tmp_path / "w.pt"
    torch.save({"generator": weights}, path)
    read = read_pretrained(path, **SAID)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(read.weights, weights)


def test_every_dtype_and_shape_is_read_to_the_bit(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    dtypes += (
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.complex64,
        torch.uint16,
    )
    written = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in dtypes}
    written |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    save_file(written, tmp_path / "w.safetensors", {"a": "b"})
    read, metadata = read_safetensors(tmp_path / "w.safetensors")
    assert metadata == {"a": "b"} and read.keys() == written.keys()
    for name, tensor in written.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


# ------------------------------------------------------------------------------------------- which file, and what it is


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.ckpt", "5f3a"])
def test_safetensors_under_another_name(tmp_path, weights, name):
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").rename(tmp_path / name)
    assert same(read_pretrained(tmp_path / name, **SAID).weights, weights)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save_under_the_name_of_safetensors(tmp_path, weights, zipped):
    torch.save(weights, tmp_path / "w.safetensors", _use_new_zipfile_serialization=zipped)
    assert same(read_pretrained(tmp_path / "w.safetensors", **SAID).weights, weights)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 5676070424\n"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "Wan/diffusion_pytorch_model.safetensors"])
def test_a_pointer_of_git_lfs_is_called_one(tmp_path, capfd, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(POINTER)
    given = path.parent if "Wan" in name else path
    assert memflow("convert", given, tmp_path / "ours.safetensors") == 2
    said = capfd.readouterr().err
    assert f"{path} is a Git LFS pointer" in said and "5,676,070,424 bytes" in said and "git lfs pull" in said


def sharded(folder, weights, suffix=""):
    folder.mkdir(exist_ok=True)
    names, listed = sorted(weights), {}
    for i in range(2):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[i::2]}, folder / file)
        listed |= dict.fromkeys(names[i::2], file)
    index = folder / f"diffusion_pytorch_model.safetensors.index{suffix}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def test_the_index_decides_where_an_older_whole_file_lies_beside_its_shards(tmp_path, weights):
    folder = tmp_path / "transformer"
    sharded(folder, weights)
    save_file({name: tensor - 1 for name, tensor in weights.items()}, folder / "diffusion_pytorch_model.safetensors")
    assert same(read_pretrained(folder, **SAID).weights, weights)
    assert same(read_pretrained(tmp_path, **SAID).weights, weights)
    numbers = sum(tensor.numel() for tensor in weights.values())
    assert count_numbers(folder, ("diffusion_pytorch_model",), ("",)) == numbers, "counted once"


def test_averaged_weights_are_taken_or_not_as_asked(tmp_path, weights):
    other = {name: tensor + 1 for name, tensor in weights.items()}
    path = tmp_path / "w.pt"
    torch.save({"generator": other, "generator_ema": weights}, path)
    for ema, expected, part in (
        (None, weights, "generator_ema"),
        (True, weights, "generator_ema"),
        (False, other, "generator"),
    ):
        read = read_pretrained(path, ema=ema, **SAID)
        assert same(read.weights, expected) and read.part == part
        assert {read.part, read.other_part} == {"generator", "generator_ema"}


@pytest.mark.parametrize("project", ["LongLive", "MemFlow"])
def test_projects_that_do_not_infer_with_averaged_weights(tmp_path, weights, project):
    (tmp_path / project).mkdir()
    path = tmp_path / project / "base.pt"
    torch.save({"generator": weights, "generator_ema": {name: tensor + 1 for name, tensor in weights.items()}}, path)
    assert read_pretrained(path, **SAID).part == "generator"
    assert read_pretrained(path, ema=True, **SAID).part == "generator_ema"


def test_the_command_says_which_weights_it_took(tmp_path, weights, capfd):
    path = tmp_path / "w.pt"
    torch.save({"generator": weights, "generator_ema": weights}, path)
    words = ("convert", path, tmp_path / "ours.safetensors", "--num-heads", 2, "--text-len", 6)
    assert memflow(*words) == 0
    assert "its generator_ema and not its generator, which --no-ema takes" in capfd.readouterr().out
    assert memflow(*words, "--no-ema") == 0
    assert "its generator and not its generator_ema, which --ema takes" in capfd.readouterr().out
    assert load_checkpoint(tmp_path / "ours.safetensors").config == CONFIG


def test_averaged_weights_that_are_not_there_are_refused(tmp_path, weights):
    torch.save({"generator": weights}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="holds no generator_ema, which --ema asks for; it holds generator"):
        read_pretrained(tmp_path / "w.pt", ema=True, **SAID)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"no \.pt with generator_ema or generator, between which --no-ema"):
        read_pretrained(tmp_path / "w.safetensors", ema=False, **SAID)


# ------------------------------------------------------------------------------------------------------ what is in them


def test_tensors_of_a_pt_that_share_memory_are_converted(tmp_path, weights):
    bias, both = "norm3.bias", torch.randn(48)
    for name, pair in {
        "one tensor twice": (weights[f"blocks.0.{bias}"],) * 2,
        "overlapping": (both[:24], both[12:36]),
        "side by side": (both[:24], both[24:]),
        "expanded": (torch.tensor([0.5]).expand(24), both[24:]),
    }.items():
        state = {**weights, f"blocks.0.{bias}": pair[0], f"blocks.1.{bias}": pair[1]}
        torch.save(state, tmp_path / "w.pt")
        convert(read_pretrained(tmp_path / "w.pt", **SAID), tmp_path / "ours.safetensors")
        assert same(load_file(tmp_path / "ours.safetensors"), state), name


def test_tied_weights_of_a_model_are_saved(tmp_path, weights):
    state = {**weights, "blocks.1.norm3.bias": weights["blocks.0.norm3.bias"]}
    save_checkpoint(tmp_path / "w.safetensors", state, CONFIG)
    assert same(load_file(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("said", [{}, {"model_type": "i2v", "num_heads": 2}], ids=["by its shapes", "by its config"])
def test_image_to_video_under_the_names_of_text_to_video_is_refused(tmp_path, capfd, said):
    config = ModelConfig(**{**vars(CONFIG), "in_dim": 4 if said else 36, "out_dim": 4 if said else 16})
    (tmp_path / "Wan").mkdir()
    save_file(CausalVideoModel(config).state_dict(), tmp_path / "Wan" / "diffusion_pytorch_model.safetensors")
    if said:
        (tmp_path / "Wan" / "config.json").write_text(json.dumps(said))
    assert memflow("convert", tmp_path / "Wan", tmp_path / "ours.safetensors", "--num-heads", 2) == 2
    printed = capfd.readouterr().err
    assert ("takes 4 channels and makes 4" if said else "takes 36 channels and makes 16") in printed
    assert "no text-to-video model" in printed and not (tmp_path / "ours.safetensors").exists()


FOREIGN = {
    "a word": "wan",
    "of another program": '{"transformer": {"depth": 3}}',
    "of Wan": '{"_class_name": "WanModel", "num_heads": 2, "eps": 1e-05}',
}


@pytest.mark.parametrize("config", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_config_of_others_in_the_metadata_does_not_make_a_file_ours(tmp_path, weights, config):
    save_file(weights, tmp_path / "w.safetensors", {"config": config, "format": "pt"})
    read = read_pretrained(tmp_path / "w.safetensors", **SAID)
    assert read.layout == "original" and same(read.weights, weights)
    assert read.config.eps == (1e-5 if "eps" in config else 1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_floating_point_numbers_are_refused_in_our_own_file_too(tmp_path, weights, dtype):
    save_checkpoint(tmp_path / "w.safetensors", {**weights, "head.head.bias": torch.ones(16, dtype=dtype)}, CONFIG)
    for load in (read_pretrained, load_checkpoint):
        with pytest.raises(ValueError, match=rf"head.head.bias \({dtype}\)"):
            load(tmp_path / "w.safetensors")


def test_a_dtype_that_the_model_cannot_compute_in_is_refused(tmp_path, weights):
    torch.save(weights, tmp_path / "w.pt")
    read = read_pretrained(tmp_path / "w.pt", **SAID)
    for call in (lambda: read.build(torch.int8), lambda: convert(read, tmp_path / "o.safetensors", torch.int8)):
        with pytest.raises(ValueError, match=r"dtype must be one of .* got torch.int8"):
            call()


@pytest.mark.parametrize("said", [{"num_heads": 0}, {"text_len": 0}, {"text_len": True}, {"num_heads": 2.0}], ids=str)
def test_counts_that_are_none_are_refused(tmp_path, weights, said):
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=f"{next(iter(said))} must be a whole number from 1 on"):
        read_pretrained(tmp_path / "w.pt", **{**SAID, **said})


def test_long_lists_are_cut(tmp_path, weights):
    shard = tmp_path / "Wan" / "diffusion_pytorch_model-00001-of-00002.safetensors"
    sharded(tmp_path / "Wan", {**weights, **{f"extra.{i}": torch.zeros(1) for i in range(200)}})
    save_file({"other": torch.zeros(1)}, shard)
    with pytest.raises(ValueError, match=r"and \d+ more$") as said:
        read_weights(tmp_path / "Wan")
    assert len(str(said.value)) < 1500


# ------------------------------------------------------------------------------------ what the names around a file tell


@pytest.mark.parametrize(
    ("path", "memory"),
    [
        ("MemFlow/checkpoints/base.pt", "released"),
        ("models--A--MemFlow/snapshots/1f2e/base.pt", "released"),
        ("MemFlow/checkpoints/self_forcing_dmd.pt", "memflow"),
        ("MemFlow/wan_models/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors", "memflow"),
        ("memflow-ops/checkpoints/base.pt", "memflow"),
        ("a/checkpoints/base.pt", "memflow"),
    ],
)
def test_a_released_checkpoint_where_its_authors_put_it(tmp_path, path, memory):
    file = tmp_path / "x" / path
    file.parent.mkdir(parents=True)
    file.touch()
    assert tuned_for(file) == memory


def test_a_released_checkpoint_through_links(tmp_path):
    file = tmp_path / "MemFlow" / "checkpoints" / "base.pt"
    file.parent.mkdir(parents=True)
    file.touch()
    (tmp_path / "current.pt").symlink_to(file)
    (tmp_path / "folder").symlink_to(file.parent)
    blob = tmp_path / "blobs" / "5f3a"
    blob.parent.mkdir()
    blob.touch()
    (tmp_path / "MemFlow" / "linked.pt").symlink_to(blob)
    for path in ("current.pt", "folder/base.pt", "MemFlow/linked.pt"):
        assert tuned_for(tmp_path / path) == "released", path
